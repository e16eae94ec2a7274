"""Shards that come back older than the others: one clock, targets of one update, finite states."""

import contextlib
import uuid

import numpy as np
import pytest
import tensorflow as tf

from infra.parameter_server import checkpoint, run_control, sessions
from infra.parameter_server import shard as shard_lib
from infra.parameter_server.protocol import RequestRefusedError
from infra.parameter_server.server import ParameterServer
from tests.support.parameter_servers import LAYOUT, ask, config, connect

_ZEROS = np.zeros(LAYOUT.size, np.float32)
_ONES = np.ones(LAYOUT.size, np.float32)
_PERIOD = 50


class Shards:
    """Two shards in this process, each of which can be set back to what it once was."""

    def __init__(self, stack, **changes):
        usual = {'target_update_period': _PERIOD, 'max_staleness': 1000, 'average_updates': 100}
        self._config = config(**{**usual, **changes})
        self._stack = stack
        self.servers = [self._serve(shard) for shard in range(2)]
        self.addresses = [server.address for server in self.servers]
        self.client = stack.enter_context(connect(self.addresses))
        self.client.initialise(_ZEROS)

    def _serve(self, shard, **options):
        server = ParameterServer(self._config, shard, **options)
        self._stack.callback(server.stop)
        return server

    def state(self, shard):
        return self.servers[shard].shard.snapshot()

    def set_back(self, shard, state):
        """As if the process had been killed and started from an older state."""
        for connection in self.client.connections:
            connection.drop()
        self.servers[shard].stop()
        port = self.servers[shard].port
        self.servers[shard] = self._serve(shard, port=port, state=state)

    def push(self, count):
        for _ in range(count):
            reply = self.client.push(_ONES, self.client.pull().version)
            assert reply.rejected is None
        return reply.snapshot


@pytest.fixture
def shards():
    with contextlib.ExitStack() as stack:
        made = Shards(stack)
        yield made
        made.client.close()  # before the servers stop: they wait for their streams


@pytest.mark.parametrize('shard', [0, 1])
def test_targets_are_of_one_update_again_within_a_period_of_a_setback(shards, shard):
    shards.push(3)
    state = shards.state(shard)
    shards.push(37)
    shards.set_back(shard, state)
    torn = []
    for _ in range(3 * _PERIOD):
        snapshot = shards.push(1)
        torn.append(len(set(snapshot.target_versions)) > 1)
    # Update 41 is the first after the setback: none is due before update 50, and then both are.
    assert not any(torn)
    assert snapshot.version == 40 + 3 * _PERIOD
    # The setback lost 37 updates of the one slice: it, and its target, stay 37 behind for ever.
    target = shards.client.pull_target()
    assert target.target_versions == (150, 150)
    parts = target.parts
    np.testing.assert_allclose(parts[1 - shard], -150, atol=1e-2)
    np.testing.assert_allclose(parts[shard], -113, atol=1e-2)


def test_a_setback_across_a_target_takes_the_target_at_once(shards):
    shards.push(_PERIOD - 10)
    state = shards.state(1)
    shards.push(20)
    shards.set_back(1, state)
    assert shards.push(1).target_versions == (_PERIOD, _PERIOD)


def test_the_clock_that_workers_see_never_runs_backwards(shards):
    state = shards.state(0)
    shards.push(20)
    shards.client.pull(agent_steps=80)
    with connect(shards.addresses) as gone:  # nobody will tell its steps again
        gone.pull(agent_steps=10)
    before = shards.client.pull().clock
    assert (before.updates, before.agent_steps) == (20, 90)
    shards.set_back(0, state)
    after = shards.client.pull().clock
    assert (after.updates, after.agent_steps) == (20, 90)
    # 80 of the 90 are told again; the clock stands until the count has caught up.
    assert shards.client.pull(agent_steps=5).clock.agent_steps == 90
    assert shards.client.pull(agent_steps=7).clock.agent_steps == 92
    with connect(shards.addresses) as new:
        clock = new.pull().clock
        assert (clock.updates, clock.agent_steps) == (20, 92)
    assert shards.push(1).clock.updates == 21


def test_a_state_of_parts_that_drifted_apart_is_healed_when_it_is_restored(shards):
    # As the first version of this project left it: shard 1 is 37 updates behind for ever, and its
    # part of the target is of another update.
    shards.push(60)
    state = shards.state(1)
    state.counters.update(version=60, target_version=0)
    shards.set_back(1, state)
    assert shards.push(1).target_versions == (50, 50)
    np.testing.assert_allclose(shards.client.pull_target().parts[1], -60, atol=1e-2)


def test_a_clock_that_no_restart_explains_is_refused(shards):
    shards.push(1)
    version = 1 + shard_lib.MOST_LOST_UPDATES + 1
    with pytest.raises(RequestRefusedError, match='no restart explains'):
        shards.client.push(_ONES, version)
    assert shards.client.pull().version == 1


class TestFinite:
    @pytest.mark.parametrize('optimizer', ['adagrad', 'rmsprop', 'adam'])
    def test_parameters_and_slots_stay_finite_under_any_gradients(self, optimizer):
        rng = np.random.default_rng(1)
        with contextlib.ExitStack() as stack:
            shards = Shards(stack, optimizer=optimizer, learning_rate=0.1)
            for exponent in range(-30, 38):
                gradient = (10.0**exponent * rng.normal(size=LAYOUT.size)).astype(np.float32)
                for _ in range(3):
                    reply = shards.client.push(gradient, shards.client.pull().version)
                # Norms above 1e15 are refused, smaller ones taken.
                assert (reply.rejected is None) == (np.linalg.norm(gradient.astype(float)) <= 1e15)
            reply = shards.client.push(_ONES, shards.client.pull().version)
            assert reply.rejected is None
            for shard in range(2):
                for name, array in shards.state(shard).arrays.items():
                    assert np.isfinite(array).all(), name

    def test_a_shard_that_is_not_finite_goes_back_to_its_last_good_state(self, shards):
        shards.push(_PERIOD + 9)  # the last good state is that of the last target
        for server in shards.servers[:1]:
            server.shard._slice.parameters[:] = np.nan
        snapshot = shards.push(1)
        assert snapshot.version == _PERIOD + 10  # the clock continues
        values = shards.client.pull_target().parts[0]
        np.testing.assert_allclose(values, -_PERIOD, atol=1e-2)
        with connect(shards.addresses) as other:
            values = other.pull().parts
        np.testing.assert_allclose(values[0], -_PERIOD, atol=1e-2)
        np.testing.assert_allclose(values[1], -_PERIOD - 10, atol=1e-2)
        assert [s['rollbacks'] for s in shards.client.report()['shards']] == [1, 0]
        # The mean of -10, -20 and so on to -50, as of the last target; the other's goes to -60.
        averages = [shards.state(shard).arrays['average'] for shard in range(2)]
        np.testing.assert_allclose(averages[0], -30, atol=1e-2)
        np.testing.assert_allclose(averages[1], -35, atol=1e-2)

    def test_a_state_that_is_saved_is_finite(self, shards):
        shards.push(1)
        slots = shards.servers[0].shard._slice.state
        slots['accumulator'][:] = np.inf
        state = shards.state(0)
        assert all(np.isfinite(array).all() for array in state.arrays.values())


def test_a_refusal_that_was_answered_before_a_restart_is_answered_so_again(shards):
    shards.push(3)
    shard = shards.servers[0].shard
    assert shard.push('y', 1, 'a flaw', 0).rejected == 'invalid'
    accepted = shard.push('z', 1, (_ONES, tf.constant(_ONES[: shard.size])), 3)
    shards.set_back(0, shards.state(0))
    again = shards.servers[0].shard
    assert again.push('y', 1, 'a flaw', 0).rejected == 'invalid'
    assert again.push('z', 1, (_ONES, None), 3).update == accepted.update == 4
    assert again.clock()['version'] == 4


class TestHostileClients:
    @pytest.mark.parametrize('value', [float('nan'), -1, 1.5, True, '3', None, 2**70])
    @pytest.mark.parametrize('field', ['version', 'seen_updates', 'seen_agent_steps'])
    def test_counts_that_are_none_are_refused_and_change_nothing(self, shards, field, value):
        fields = {'version': 0, 'pull': False, 'flaw': 'none', field: value}
        with pytest.raises(RequestRefusedError, match=field):
            ask(shards.client, 'push', **fields)
        assert shards.push(1).clock.updates == 1

    def test_no_client_makes_a_shard_write_outside_its_checkpoints(self, tmp_path):
        with contextlib.ExitStack() as stack:
            root = tmp_path / 'checkpoints'
            root.mkdir()
            (root / 'link').symlink_to(tmp_path)
            server = ParameterServer(config(num_parameter_shards=1), 0, checkpoint_root=str(root))
            stack.callback(server.stop)
            client = stack.enter_context(connect([server.address]))
            client.initialise(_ZEROS)
            (root / 'one').mkdir()
            for target, written in [
                (tmp_path / 'elsewhere', False),
                (root / '..' / 'elsewhere', False),
                (root / 'link' / 'elsewhere', False),
                (root / 'none', False),
                (root / 'one', True),
                (root / 'one', False),  # written already
            ]:
                there = target.exists()
                reply = ask(client, 'save', directory=str(target))
                assert target.exists() == there
                assert reply.get('octets', False) != written

    def test_no_client_writes_over_a_checkpoint(self, tmp_path):
        with contextlib.ExitStack() as stack:
            one = config(num_parameter_shards=1)
            server = ParameterServer(one, 0, checkpoint_root=str(tmp_path))
            stack.callback(server.stop)
            client = stack.enter_context(connect([server.address]))
            client.initialise(_ZEROS)
            client.save(tmp_path / 'kept')
            client.push(_ONES, 0)
            assert ask(client, 'save', directory=str(tmp_path / 'kept'))['octets']
            checkpoint.validate(str(tmp_path / 'kept'))

    def test_sessions_and_workers_are_bounded(self, shards, monkeypatch):
        monkeypatch.setattr(sessions, 'MAX_SESSIONS', 3)
        monkeypatch.setattr(run_control, 'MAX_ENLISTED', 3)
        shard = shards.servers[0].shard
        for number in range(10):
            shard.open_session(f'gone {number}')
            shard.close_session(f'gone {number}')
            shards.client.enlist('actor', f'{number}')
        assert len(shard.snapshot().counters['sessions']) == 3
        assert len(shard.snapshot().counters['enlisted']) == 3
        shards.client.pull(agent_steps=5)  # the client that is connected was not forgotten
        assert shards.client.pull(agent_steps=1).clock.agent_steps == 6
        for number in range(2):
            shard.open_session(f'here {number}')
        with pytest.raises(ValueError, match='has 3 clients already'):
            shard.open_session('one too many')
        with pytest.raises(ValueError, match='32 streams of this client'):
            for _ in range(33):
                shard.open_session('here 0')

    def test_as_many_workers_as_are_remembered_fit_into_the_answers(self, shards, tmp_path):
        shard = shards.servers[0].shard
        for number in range(run_control.MAX_ENLISTED):
            shard.control.enlist(f'{number:064}', 'actor', f'{number:0256}')
        for number in range(sessions.MAX_SESSIONS - 1):
            shard.open_session(f'{number:064}')
            shard.close_session(f'{number:064}')
        assert shards.client.report()['shards'][0]['reruns'] == {}
        shards.client.save(tmp_path / 'saved')
        checkpoint.validate(str(tmp_path / 'saved'))

    def test_a_worker_of_no_kind_is_refused(self, shards):
        with pytest.raises(RequestRefusedError, match='one of actor, learner, bundle'):
            shards.client.enlist('x' * 200, '0')

    def test_the_clock_is_not_moved_step_by_step_further_than_a_restart_explains(self, shards):
        client, largest = shards.client, shard_lib.MOST_LOST_UPDATES
        shards.push(2)

        def see(shard, **fields):
            ask(client, 'pull', shard=shard, known=None, **fields)

        # Shard 1 learns the clock only from the clients: it may be moved as far as shard 0 was.
        see(0, seen_updates=largest)
        with pytest.raises(RequestRefusedError, match='no restart explains update'):
            see(0, seen_updates=2 * largest)
        with pytest.raises(RequestRefusedError, match='no restart explains agent step'):
            see(0, seen_agent_steps=2**52)
        with connect(shards.addresses) as other:
            assert other.pull().clock.updates == largest
            assert other.pull().clock.agent_steps == 0
            assert len(other.report()['shards']) == 2
            assert other.push(_ONES, largest).rejected is None
        with pytest.raises(RequestRefusedError, match='no restart explains update'):
            see(1, seen_updates=2 * largest + 100)

    def test_an_empty_shard_takes_no_clock_but_with_its_first_parameters(self):
        with contextlib.ExitStack() as stack:
            server = ParameterServer(config(num_parameter_shards=1), 0)
            stack.callback(server.stop)
            client = stack.enter_context(connect([server.address]))
            ask(client, 'report', seen_updates=2**52)
            assert server.shard.clock()['version'] == 0
            client.initialise(_ZEROS)
            assert client.pull().clock.updates == 0

    def test_names_of_any_length_are_refused(self, shards, monkeypatch):
        with pytest.raises(RequestRefusedError, match='at most 256 characters'):
            shards.client.enlist('actor', 'x' * 300)
        monkeypatch.setattr(
            uuid.UUID, 'hex', 'x' * 100
        )  # of which a client makes its session's name
        with connect(shards.addresses) as client:
            with pytest.raises(RequestRefusedError, match='at most 64 characters'):
                client.pull()
