"""Shards as processes: bad input, signals, kill -9 during a push, a hung shard."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from infra.memory import resident_bytes
from infra.parameter_server.channel import MAGIC, Channel
from infra.parameter_server.lanes import PushLanes
from infra.parameter_server.protocol import (
    PROTOCOL_VERSION,
    NotInitialisedError,
    ParameterServerUnavailable,
)
from tests.support.parameter_servers import LAYOUT, ShardProcess, config, connect
from tests.support.waiting import pause

_ZEROS = np.zeros(LAYOUT.size, np.float32)
_ONES = np.ones(LAYOUT.size, np.float32)
_RESTART_SECONDS = 90.0
_HELLO = {
    'protocol': PROTOCOL_VERSION, 'layout': dataclasses.asdict(LAYOUT), 'shard': 0,
    'num_shards': 2, 'wire': 'float32',
}  # fmt: skip


@pytest.fixture(scope='module')
def processes(tmp_path_factory):
    """Two shard processes, started side by side, that tests may kill."""
    directory = tmp_path_factory.mktemp('shards')
    with (
        ShardProcess(directory, config(), 0) as first,
        ShardProcess(directory, config(), 1) as second,
    ):
        yield [first.wait_ready(), second.wait_ready()]


@pytest.fixture
def shards(processes):
    """Both alive, with parameters that earlier tests may have moved."""
    dead = [shard for shard in processes if shard.process.poll() is not None]
    for shard in dead:
        shard.start()
    for shard in dead:
        shard.wait_ready()
    with connect(_addresses(processes)) as client:
        client.initialise(_ZEROS)
    return processes


def _addresses(shards):
    return [shard.address for shard in shards]


class TestKill:
    def test_a_killed_shard_comes_back_with_its_checkpoint_during_a_push(self, shards, tmp_path):
        with connect(_addresses(shards), timeout_seconds=_RESTART_SECONDS) as client:
            saved = client.pull()
            client.save(tmp_path / 'checkpoint')
            before = client.push(_ONES, saved.version).snapshot
            shards[1].kill()
            future = client.push_async(_ONES, before.version)
            shards[1].start(f'--restore={tmp_path / "checkpoint"}')
            shards[1].wait_ready()
            reply = future.result(_RESTART_SECONDS)
            # Shard 0 applied both; shard 1 is back where it was saved and has the second only.
            assert reply.rejected is None
            assert reply.snapshot.version == saved.version + 2
            moved = reply.snapshot.values - saved.values
            np.testing.assert_allclose(moved, [-2] * 9 + [-1] * 10, atol=1e-4)
            assert client.push(_ONES, reply.snapshot.version).rejected is None

    def test_a_shard_that_lost_its_state_is_filled_by_whoever_initialises(self, shards):
        with connect(_addresses(shards), timeout_seconds=_RESTART_SECONDS) as client:
            snapshot = client.pull()
            shards[1].kill()
            shards[1].start()
            shards[1].wait_ready()
            with pytest.raises(NotInitialisedError, match='--restore'):
                client.push(_ONES, snapshot.version)
            assert not client.initialise(snapshot.values)
            again = client.pull()
            # Shard 0 applied the gradient, shard 1 starts anew from the values given.
            assert again.version == snapshot.version + 1
            moved = again.values - snapshot.values
            np.testing.assert_allclose(moved, [-1] * 9 + [0] * 10, atol=1e-4)

    def test_a_killed_client_leaves_nothing_behind(self, shards):
        program = (
            'import sys, os, signal, numpy as np\n'
            'from tests.support.parameter_servers import connect\n'
            'client = connect(sys.argv[1:])\n'
            'client.push(np.ones(19), client.pull().version)\n'
            'os.kill(os.getpid(), signal.SIGKILL)\n'
        )
        before = set(os.listdir('/dev/shm'))
        with connect(_addresses(shards)) as client:
            updates = client.pull().clock.updates
            subprocess.run([sys.executable, '-c', program, *_addresses(shards)], timeout=60)
            left = {name for name in set(os.listdir('/dev/shm')) - before if 'gorila-' in name}
            assert not left
            deadline = time.monotonic() + 10
            while [shard['clients'] for shard in client.report()['shards']] != [1, 1]:
                assert time.monotonic() < deadline, 'the dead client is still counted'
                time.sleep(0.05)
            assert client.pull().clock.updates == updates + 1


class TestHang:
    @pytest.mark.parametrize('shared_memory', [True, False])
    def test_a_hung_shard_is_reported_in_time_and_used_again(self, shards, shared_memory):
        with connect(_addresses(shards), timeout_seconds=2, shared_memory=shared_memory) as client:
            version = client.pull().version
            pause(shards[0].process.pid)
            try:
                for _ in range(2):  # first with its stream open, then without
                    start = time.monotonic()
                    with pytest.raises(ParameterServerUnavailable) as caught:
                        client.push(_ONES, version)
                    assert time.monotonic() - start < 5
                    assert caught.value.address == shards[0].address
            finally:
                os.kill(shards[0].process.pid, signal.SIGCONT)
            assert client.pull().clock.updates >= version

    def test_two_hung_shards_take_no_longer_than_one(self, shards):
        with connect(_addresses(shards), timeout_seconds=2) as client:
            client.pull()
            for shard in shards:
                pause(shard.process.pid)
            try:
                start = time.monotonic()
                with pytest.raises(ParameterServerUnavailable):
                    client.pull()
                assert time.monotonic() - start < 3.5
            finally:
                for shard in shards:
                    os.kill(shard.process.pid, signal.SIGCONT)

    def test_as_many_pushes_as_lanes_wait_for_a_shard_side_by_side(self, shards):
        with connect(_addresses(shards)) as client, PushLanes(client, 3) as lanes:
            version = lanes.pull().version
            pause(shards[0].process.pid)
            try:
                pushes = [lanes.push_async(_ONES, version) for _ in range(3)]
                with pytest.raises(RuntimeError, match='still outstanding'):
                    lanes.push_async(_ONES, version)
                assert not any(push.done() for push in pushes)
            finally:
                os.kill(shards[0].process.pid, signal.SIGCONT)
            replies = [push.result(10) for push in pushes]
            assert {reply.staleness for reply in replies} == {0, 1, 2}
            assert lanes.pull().version == version + 3

    def test_an_idle_shard_uses_no_processor_time(self, shards):
        with connect(_addresses(shards)) as client:
            client.pull()
            start = _processor_seconds(shards[1].process.pid)
            time.sleep(2)
            # The watch for the parent's death wakes once a second; the clock ticks in 10 ms.
            assert _processor_seconds(shards[1].process.pid) - start <= 0.03


class TestMemory:
    def test_a_claimed_gigabyte_ends_its_own_stream_and_is_never_held(self, shards):
        pid = shards[0].process.pid
        before = resident_bytes(pid) or 0
        with connect(_addresses(shards)) as client, contextlib.ExitStack() as stack:
            version = client.pull().version
            for number in range(20):
                peer = stack.enter_context(
                    socket.create_connection(('127.0.0.1', shards[0].port), 10)
                )
                stream = Channel(peer, time.monotonic() + 10)
                stream.send({**_HELLO, 'session': f'stranger {number}'})
                assert stream.receive()[0] == {'shared_memory': False}
                peer.sendall(_a_gigabyte_to_come({'operation': 'push', 'sequence': 1}))
                peer.sendall(bytes(1 << 16))
                assert '36 are allowed' in stream.receive()[0]['message']
                with pytest.raises(OSError):
                    stream.receive()
            assert client.push(_ONES, version).rejected is None
        assert (resident_bytes(pid) or 0) - before < 100 << 20


def _a_gigabyte_to_come(header):
    """The beginning of a message with a body of 1 GiB."""
    text = json.dumps(header).encode()
    return MAGIC + len(text).to_bytes(4, 'big') + (1 << 30).to_bytes(8, 'big') + text


class TestSignals:
    def test_sigint_is_ignored_and_sigterm_ends_with_zero(self, shards):
        with connect(_addresses(shards)) as client:
            client.pull()  # a live client must not delay the end
            shards[0].process.send_signal(signal.SIGINT)
            time.sleep(0.2)
            assert shards[0].process.poll() is None
            shards[0].process.send_signal(signal.SIGTERM)
            assert shards[0].process.wait(5) == 0


class TestBadInput:
    def test_a_busy_port_is_one_line_and_exit_code_2(self, tmp_path):
        with socket.create_server(('127.0.0.1', 0)) as taken:
            port = taken.getsockname()[1]
            with ShardProcess(tmp_path, config(), 0, port=port) as shard:
                _assert_refused(shard, f'cannot listen on 127.0.0.1:{port}')

    def test_a_damaged_checkpoint_is_one_line_and_exit_code_2(self, tmp_path):
        with ShardProcess(tmp_path, config(), 0, f'--restore={tmp_path}') as shard:
            _assert_refused(shard, f'{tmp_path}/manifest.json is missing')

    def test_an_unknown_field_is_one_line_and_exit_code_2(self, tmp_path):
        (tmp_path / 'other.json').write_text('{"num_shards": 2}')
        with ShardProcess(tmp_path, config(), 0, f'--config={tmp_path / "other.json"}') as shard:
            _assert_refused(shard, "unexpected keyword argument 'num_shards'")


def _assert_refused(shard, message):
    code, output = shard.wait_failed()
    assert code == 2
    assert message in output
    assert 'Traceback' not in output


def _processor_seconds(pid):
    with open(f'/proc/{pid}/stat') as file:
        fields = file.read().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
