"""Client and shards together: versions, clock, staleness, targets, repeats, transports."""

import contextlib
import os
import socket
import threading

import numpy as np
import pytest

from infra.parameter_server import run_control
from infra.parameter_server.layout import Layout
from infra.parameter_server.protocol import (
    LayoutMismatchError,
    NotInitialisedError,
    ParameterServerUnavailable,
    RequestRefusedError,
)
from infra.parameter_server.server import ParameterServer, ServerStartError
from tests.support.parameter_servers import LAYOUT, ask, config, connect, serve, stranger
from tests.support.waiting import eventually

_ZEROS = np.zeros(LAYOUT.size, np.float32)
_ONES = np.ones(LAYOUT.size, np.float32)
_TRANSPORTS = [
    pytest.param({'shared_memory': True}, id='shared_memory'),
    pytest.param({'shared_memory': False}, id='float32'),
    pytest.param({'shared_memory': False, 'wire': 'bfloat16'}, id='bfloat16'),
    pytest.param({'shared_memory': False, 'wire': 'int8'}, id='int8'),
]


@pytest.fixture
def addresses():
    with serve(config()) as servers:
        yield [server.address for server in servers]


@pytest.fixture
def client(addresses):
    with connect(addresses) as connected:
        connected.initialise(_ZEROS)
        yield connected


@pytest.mark.parametrize('transport', _TRANSPORTS)
class TestEveryTransport:
    def test_a_push_brings_back_the_parameters_after_it(self, addresses, transport):
        with connect(addresses, **transport) as client:
            assert client.initialise(np.arange(19.0))
            snapshot = client.pull()
            np.testing.assert_array_equal(snapshot.values, np.arange(19.0))
            reply = client.push(2 * _ONES, snapshot.version)
            # Small whole numbers are exact in bfloat16 too.
            np.testing.assert_allclose(reply.snapshot.values, np.arange(19.0) - 2, atol=1e-5)
            assert reply.rejected is None
            assert reply.snapshot.version == 1

    def test_values_are_none_until_a_shard_changes(self, addresses, transport):
        with connect(addresses, **transport) as client, connect(addresses) as other:
            client.initialise(_ZEROS)
            assert client.pull().values is not None
            assert client.pull().values is None
            other.push(_ONES, 0, pull=False)
            np.testing.assert_allclose(client.pull().values, -_ONES, atol=1e-5)

    def test_the_gradient_may_change_once_push_async_returned(self, addresses, transport):
        with connect(addresses, **transport) as client:
            client.initialise(_ZEROS)
            version = client.pull().version
            gradient = _ONES.copy()
            future = client.push_async(gradient, version)
            gradient[:] = 100
            np.testing.assert_allclose(future.result(10).snapshot.values, -_ONES, atol=1e-5)

    def test_first_parameters_are_exact_in_the_server(self, addresses, transport):
        values = np.random.default_rng(0).normal(size=19).astype(np.float32)
        with connect(addresses, **transport) as client, connect(addresses) as exact:
            client.initialise(values)
            np.testing.assert_array_equal(exact.pull().values, values)


class TestInitialise:
    def test_the_first_writer_wins(self, addresses):
        with connect(addresses) as first, connect(addresses) as second:
            assert first.initialise(_ZEROS)
            assert not second.initialise(_ONES)
            np.testing.assert_array_equal(second.pull().values, _ZEROS)

    def test_exactly_one_of_many_writers_wins_on_all_shards(self, addresses):
        won = []

        def write(value):
            with connect(addresses) as client:
                if client.initialise(np.full(19, value, np.float32)):
                    won.append(value)

        threads = [threading.Thread(target=write, args=(value,)) for value in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(won) == 1
        with connect(addresses) as client:
            np.testing.assert_array_equal(client.pull().values, np.full(19, won[0]))

    def test_a_writer_that_died_on_its_way_is_replaced(self, addresses):
        # As if the winner had reached shard 0 only.
        with connect(addresses) as winner, connect(addresses, timeout_seconds=2) as second:
            ask(winner, 'initialise', _ONES[:9])
            assert not second.initialise(_ZEROS)
            # Shard 0 holds the winner's nine values, shard 1 the second's ten.
            np.testing.assert_array_equal(second.pull().values, [1] * 9 + [0] * 10)

    def test_a_pull_waits_for_the_first_writer(self, addresses):
        with connect(addresses) as reader, connect(addresses) as writer:
            timer = threading.Timer(0.5, writer.initialise, [_ONES])
            timer.start()
            np.testing.assert_array_equal(reader.pull().values, _ONES)
            timer.join(10)

    def test_the_wait_is_bounded(self, addresses):
        with connect(addresses, timeout_seconds=0.5) as client:
            with pytest.raises(NotInitialisedError, match=r'call initialise'):
                client.pull()
            with pytest.raises(NotInitialisedError):
                client.push(_ONES, 0)

    def test_values_that_are_not_finite_are_refused(self, addresses):
        with connect(addresses) as client, pytest.raises(ValueError, match='finite'):
            client.initialise(np.full(19, np.inf))


class TestStaleness:
    def test_a_gradient_is_refused_exactly_beyond_the_bound(self, client):
        # max_staleness is 3: after three more updates version 0 is 3 old, after four 4 old.
        for version in range(3):
            assert client.push(_ONES, version).rejected is None
        assert client.push(_ONES, 0).rejected is None
        reply = client.push(_ONES, 0)
        assert (reply.rejected, reply.staleness) == ('stale', 4)
        assert 'the gradient is 4 updates old, max_staleness is 3' in reply.message
        assert reply.snapshot.version == 4
        # One judge: the other shard never saw it.
        assert [shard['rejected'] for shard in client.report()['shards']] == [
            {'stale': 1, 'invalid': 0},
            {'stale': 0, 'invalid': 0},
        ]
        assert client.report()['shards'][1]['version'] == 4

    @pytest.mark.parametrize('transport', _TRANSPORTS)
    @pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf, 1e20])
    @pytest.mark.parametrize('where', [0, 18])
    def test_a_gradient_that_is_not_finite_in_one_slice_is_applied_in_none(
        self, addresses, transport, value, where
    ):
        with connect(addresses, **transport) as client:
            client.initialise(_ZEROS)
            gradient = _ONES.copy()
            gradient[where] = value
            reply = client.push(gradient, 0)
            assert reply.rejected == 'invalid'
            np.testing.assert_array_equal(reply.snapshot.values, _ZEROS)
            assert client.report()['shards'][0]['rejected'] == {'stale': 0, 'invalid': 1}
            assert client.push(_ONES, 0).rejected is None

    def test_a_rejected_gradient_brings_the_newest_parameters_even_without_a_pull(
        self, client, addresses
    ):
        with connect(addresses) as other:
            other.push(_ONES, 0)
        reply = client.push(np.nan * _ONES, 0, pull=False)
        assert reply.snapshot.version == 1
        np.testing.assert_allclose(reply.snapshot.values, -_ONES, atol=1e-5)

    def test_gradients_of_another_length_are_refused_by_the_client(self, client):
        with pytest.raises(ValueError, match='do not fit the layout'):
            client.push(np.ones(18, np.float32), 0)


class TestTarget:
    def test_it_is_the_parameters_at_the_last_multiple_of_the_period(self, client):
        # Period 4: target 0 (zeros) until update 4, then -4, at update 8 then -8.
        for update in range(1, 10):
            reply = client.push(_ONES, update - 1)
            expected = update // 4 * 4
            assert reply.snapshot.target_versions == (expected, expected)
            target = client.pull_target()
            if update % 4 == 0 or update == 1:
                np.testing.assert_allclose(target.values, -expected * _ONES, atol=1e-4)
            else:
                assert target.values is None

    def test_refused_gradients_do_not_count(self, client):
        for update in range(3):
            client.push(_ONES, update)
        client.push(np.nan * _ONES, 3)
        assert client.pull().target_versions == (0, 0)
        assert client.push(_ONES, 3).snapshot.target_versions == (4, 4)


class TestClock:
    def test_pulls_bring_agent_steps_and_pushes_updates(self, client, addresses):
        with connect(addresses) as actor:
            assert actor.pull(agent_steps=5).clock.agent_steps == 5
            assert actor.pull(agent_steps=7).clock.agent_steps == 12
            assert client.pull(agent_steps=3).clock.agent_steps == 15
            clock = client.push(_ONES, 0).snapshot.clock
            assert (clock.updates, clock.agent_steps, clock.stopping) == (1, 15, False)

    def test_the_step_size_falls_with_the_updates_of_the_run_on_every_shard(self):
        with serve(config(learning_rate_updates=2)) as servers:
            with connect([server.address for server in servers]) as client:
                client.initialise(_ZEROS)
                for version, expected in enumerate((-1.0, -1.5, -1.5)):  # steps of 1, 1/2 and 0
                    values = client.push(_ONES, version).snapshot.values
                    np.testing.assert_allclose(values, expected * _ONES, atol=1e-5)

    def test_a_stop_request_reaches_everyone(self, client, addresses):
        with connect(addresses) as other:
            client.request_stop()
            assert other.pull().clock.stopping
            assert client.push(_ONES, 0).snapshot.clock.stopping

    def test_a_run_that_left_its_shards_stops_its_workers(self, client, addresses, monkeypatch):
        client.claim('run')
        assert not client.pull().clock.stopping
        monkeypatch.setattr(run_control, 'LEASE_SECONDS', 0.3)
        with connect(addresses) as worker:
            assert eventually(lambda: worker.pull().clock.stopping)
            client.report(owner='run')  # it was only busy
            assert not worker.pull().clock.stopping

    def test_a_worker_begun_again_in_another_session_is_counted(self, client, addresses):
        assert client.enlist('actor', '0 of submission 3') == 0
        assert client.enlist('actor', '0 of submission 3') == 0  # a repeated message
        with connect(addresses) as again:
            assert again.enlist('actor', '0 of submission 3') == 1
            assert again.enlist('actor', '1 of submission 3') == 0
        assert client.report()['shards'][0]['reruns'] == {'actor': 1}

    def test_the_report_counts_clients(self, client, addresses):
        with connect(addresses) as other:
            assert [shard['clients'] for shard in other.report()['shards']] == [2, 2]


def _break_streams(client):
    for connection in client.connections:
        connection.channel.break_off()


class _LostReply:
    """A connection whose next reply is lost: the shard acts, the client never hears."""

    def __init__(self, connection):
        self._receive = connection.receive
        self._connection = connection
        connection.receive = self.receive

    def receive(self, tensor):
        self._receive(tensor)
        self._connection.receive = self._receive
        self._connection.channel.break_off()
        return self._receive(tensor)


class TestBrokenStreams:
    @pytest.mark.parametrize('transport', _TRANSPORTS)
    def test_a_repeated_gradient_is_applied_once(self, addresses, transport):
        with connect(addresses, **transport) as client:
            client.initialise(_ZEROS)
            client.pull()
            _LostReply(client.connections[1])
            reply = client.push(_ONES, 0)
            assert reply.rejected is None
            assert reply.snapshot.version == 1
            np.testing.assert_allclose(reply.snapshot.values, -_ONES, atol=1e-5)

    def test_a_repeated_refusal_is_counted_once(self, client):
        _LostReply(client.connections[0])
        assert client.push(np.nan * _ONES, 0).rejected == 'invalid'
        assert client.report()['shards'][0]['rejected']['invalid'] == 1

    def test_repeated_agent_steps_are_counted_once(self, client):
        client.pull(agent_steps=2)
        _LostReply(client.connections[0])
        assert client.pull(agent_steps=5).clock.agent_steps == 7

    def test_the_client_connects_again_and_gets_all_parameters(self, client):
        client.push(_ONES, 0)
        _break_streams(client)
        np.testing.assert_allclose(client.pull().values, -_ONES, atol=1e-5)

    def test_an_asynchronous_gradient_survives_a_broken_stream(self, client):
        _break_streams(client)
        reply = client.push_async(_ONES, 0).result(10)
        np.testing.assert_allclose(reply.snapshot.values, -_ONES, atol=1e-5)

    def test_a_shard_that_is_gone_is_named_with_a_remedy(self):
        with serve(config()) as servers:
            addresses = [server.address for server in servers]
        with connect(addresses, timeout_seconds=0.5) as client:
            with pytest.raises(ParameterServerUnavailable, match='start it again') as caught:
                client.pull()
            assert caught.value.address == addresses[0]


class TestAsynchronousPush:
    def test_only_one_may_be_outstanding(self, client, monkeypatch):
        connection, may_end = client.connections[0], threading.Event()
        receive = connection.receive
        monkeypatch.setattr(connection, 'receive', lambda *a: may_end.wait(10) and receive(*a))
        future = client.push_async(_ONES, 0)
        with pytest.raises(RuntimeError, match='still outstanding'):
            client.push_async(_ONES, 0)
        may_end.set()
        assert future.result(10).rejected is None

    def test_a_pull_waits_for_the_push_before_it(self, client):
        future = client.push_async(_ONES, 0, pull=False)
        assert client.pull().version == 1
        assert future.result(10).snapshot.values is None


class TestMemory:
    def test_values_that_are_kept_are_not_overwritten(self, client):
        kept = [client.pull().values]
        for update in range(6):
            kept.append(client.push(_ONES, update).snapshot.values)
        for update, values in enumerate(kept):
            np.testing.assert_allclose(values, -update * _ONES, atol=1e-4)

    @pytest.mark.parametrize('transport', _TRANSPORTS)
    def test_parts_that_are_not_copied_hold_until_the_next_call_of_their_kind(
        self, addresses, transport
    ):
        with connect(addresses, copy_parts=False, **transport) as client:
            client.initialise(_ZEROS)
            parameters, target = client.pull(), client.pull_target()
            client.push(_ONES, 0, pull=False)
            assert [part.size for part in parameters.parts] == [9, 10]
            np.testing.assert_array_equal(parameters.values, _ZEROS)
            np.testing.assert_allclose(client.pull().values, -_ONES, atol=1e-5)
            np.testing.assert_array_equal(target.values, _ZEROS)

    def test_nothing_is_left_in_dev_shm(self, client):
        before = {name for name in os.listdir('/dev/shm') if name.startswith('gorila-')}
        client.pull()
        client.push(_ONES, 0)
        after = {name for name in os.listdir('/dev/shm') if name.startswith('gorila-')}
        assert after <= before


class TestMismatch:
    def test_another_layout_is_refused_naming_both(self, client, addresses):
        other = Layout(('kernel',), ((19,),))
        with contextlib.closing(type(client)(addresses, other)) as other_client:
            with pytest.raises(LayoutMismatchError) as caught:
                other_client.pull()
        assert other.fingerprint in str(caught.value)
        assert LAYOUT.fingerprint in str(caught.value)

    def test_addresses_out_of_order_are_refused(self, addresses):
        with connect(addresses[::-1]) as client:
            with pytest.raises(LayoutMismatchError, match='takes this for shard 0 of 2, but it'):
                client.pull()

    def test_another_number_of_shards_is_refused(self, addresses):
        with connect(addresses[:1]) as client:
            with pytest.raises(LayoutMismatchError, match='is shard 0 of 2'):
                client.pull()

    def test_a_gradient_of_another_length_is_refused_by_the_shard(self, addresses):
        with connect(addresses, shared_memory=False) as client:
            client.initialise(_ZEROS)
            with pytest.raises(RequestRefusedError, match='32 bytes instead of 36'):  # of 9 values
                ask(client, 'push', np.ones(8, np.float32), version=0, pull=False, flaw='')
            assert client.pull().version == 0  # over another stream

    def test_a_gradient_without_values_is_rejected(self, addresses):
        with connect(addresses, shared_memory=False) as client:
            client.initialise(_ZEROS)
            reply = ask(client, 'push', version=0, pull=False, flaw='')
            assert (reply['rejected'], reply['version']) == ('invalid', 0)
            assert 'no gradient' in reply['message']

    def test_nonsense_breaks_no_other_client(self, client, addresses):
        with stranger(addresses[0]) as stream:
            stream.send({'session': 1})
            assert stream.receive()[0]['error'] == 'refused'
        assert client.push(_ONES, 0).rejected is None

    @pytest.mark.parametrize(
        ('octets', 'says'),
        [
            (b'GET / HTTP/1.1\r\nHost: shard\r\n\r\n', b''),
            (b'GORL' + (1 << 31).to_bytes(4, 'big') + bytes(8), b'2147483648 bytes; 1048576'),
            (b'GORL' + (2).to_bytes(4, 'big') + (1 << 60).to_bytes(8, 'big') + b'{}', b'no body'),
            (b'GORL' + (2).to_bytes(4, 'big') + bytes(8) + b'[]', b'must be a JSON object'),
        ],
        ids=['another protocol', 'a long header', 'a long body', 'no object'],
    )
    def test_octets_that_are_no_message_end_their_stream_only(
        self, client, addresses, octets, says
    ):
        host, port = addresses[0].split(':')
        with socket.create_connection((host, int(port)), 10) as stream:
            stream.sendall(octets)
            answer = b''
            # The shard may have closed its end already, with octets unread.
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while more := stream.recv(4096):
                    answer += more
            assert says in answer
            assert bool(says) == bool(answer)
        assert client.push(_ONES, 0).rejected is None

    def test_an_operation_that_does_not_exist_is_refused(self, client):
        with pytest.raises(RequestRefusedError, match='KeyError'):
            ask(client, 'explode')
        assert client.pull().version == 0


def test_a_busy_port_is_named(addresses):
    port = int(addresses[0].rpartition(':')[2])
    with pytest.raises(ServerStartError, match=f'cannot listen on 127.0.0.1:{port}'):
        ParameterServer(config(), 0, port=port)


def test_a_shard_beyond_the_last_is_refused():
    with pytest.raises(ValueError, match='use 0 to 1'):
        ParameterServer(config(), 2)


def test_many_clients_push_at_once_and_nothing_is_lost():
    updates, clients = 20, 4
    with serve(config(max_staleness=1000)) as servers:
        addresses = [server.address for server in servers]
        with connect(addresses) as first:
            first.initialise(_ZEROS)

            def work():
                with connect(addresses) as client:
                    version = client.pull().version
                    for _ in range(updates):
                        version = client.push(_ONES, version).snapshot.version

            threads = [threading.Thread(target=work) for _ in range(clients)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            snapshot = first.pull()
    assert snapshot.version == 80
    np.testing.assert_allclose(snapshot.values, -80 * _ONES, atol=1e-3)
