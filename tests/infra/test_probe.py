"""`python -m infra.probe` against real shards: alive, not there, stopped, and of another kind."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time

import portpicker
import pytest

from infra import probe
from infra.replay.config import ReplayConfig
from infra.replay.server import ShardConfig, build_tables, start_server, stop_server
from infra.replay.trajectory import FramePart, TrajectorySpec
from infra.tls import server_context
from tests.support import certificates, parameter_servers, replay_shard
from tests.support.engines import ROOT
from tests.support.waiting import pause

REPLAY = ShardConfig(
    ReplayConfig(replay_capacity=100, min_replay_size=10), TrajectorySpec(FramePart((8, 8)))
)
BOUND_SECONDS = 1.0  # of a question to a process that hangs


def run(*arguments):
    """Exit code, standard output and standard error of the command."""
    ended = subprocess.run(
        [sys.executable, '-m', 'infra.probe', *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    return ended.returncode, ended.stdout, ended.stderr


@contextlib.contextmanager
def replay_server():
    server = start_server(build_tables(REPLAY, 0))
    try:
        yield f'127.0.0.1:{server.port}'
    finally:
        stop_server(server)


@contextlib.contextmanager
def hanging(process):
    """A process that is stopped: its port still takes connections, and nobody answers."""
    pause(process.pid)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.fixture(scope='module')
def parameter_addresses():
    with parameter_servers.serve(parameter_servers.config()) as servers:
        yield [server.address for server in servers]


def test_every_parameter_shard_that_serves_is_named(parameter_addresses):
    code, output, errors = run('parameter', ','.join(parameter_addresses))
    assert (code, errors) == (0, '')
    assert output == 'parameter shard 0, update 0; parameter shard 1, update 0\n'


def test_a_replay_shard_that_serves_is_named():
    with replay_server() as address:
        code, output, errors = run('replay', address)
    assert code == 0, errors
    assert output.startswith('replay shard, ')
    assert output.count('\n') == 1


@pytest.mark.parametrize('kind', sorted(probe.QUESTIONS))
def test_where_nobody_listens_one_line_names_the_address(kind):
    address = f'127.0.0.1:{portpicker.pick_unused_port()}'
    code, output, errors = run(kind, address)
    assert (code, output) == (1, '')
    assert errors.startswith(f'{address}: no {kind} shard answers (')
    assert errors.count('\n') == 1


def test_one_shard_that_is_away_fails_the_question_to_all(parameter_addresses):
    away = f'127.0.0.1:{portpicker.pick_unused_port()}'
    with pytest.raises(probe.NoAnswer, match=away):
        probe.probe('parameter', [*parameter_addresses, away])


def test_a_parameter_shard_that_hangs_fails_within_the_bound(tmp_path):
    config = parameter_servers.config(num_parameter_shards=1)
    with parameter_servers.ShardProcess(tmp_path, config, 0) as shard:
        shard.wait_ready()
        assert probe.probe('parameter', [shard.address], BOUND_SECONDS)
        with hanging(shard.process):
            _assert_no_answer_within_the_bound('parameter', shard.address)
        assert probe.probe('parameter', [shard.address])


def test_a_replay_shard_that_hangs_fails_within_the_bound(tmp_path):
    with replay_shard.ShardProcess(REPLAY, tmp_path) as shard:
        shard.wait()
        assert probe.probe('replay', [shard.address], BOUND_SECONDS)
        with hanging(shard.process):
            _assert_no_answer_within_the_bound('replay', shard.address)
        assert probe.probe('replay', [shard.address])


def _assert_no_answer_within_the_bound(kind, address):
    start = time.monotonic()
    with pytest.raises(probe.NoAnswer, match=address):
        probe.probe(kind, [address], BOUND_SECONDS)
    assert time.monotonic() - start < BOUND_SECONDS + 2.0


def test_a_shard_of_the_other_kind_is_no_answer(parameter_addresses):
    with pytest.raises(probe.NoAnswer):
        probe.probe('replay', parameter_addresses[:1], BOUND_SECONDS)
    with replay_server() as address, pytest.raises(probe.NoAnswer):
        probe.probe('parameter', [address], BOUND_SECONDS)


def test_a_port_that_is_silent_is_no_answer():
    # A port that takes connections and says nothing, which a probe of the port alone would pass.
    with socket.create_server(('127.0.0.1', 0)) as silent:
        address = f'127.0.0.1:{silent.getsockname()[1]}'
        for kind in probe.QUESTIONS:
            with pytest.raises(probe.NoAnswer):
                probe.probe(kind, [address], BOUND_SECONDS)


def test_a_probe_that_waits_sees_a_shard_that_starts_meanwhile():
    port = portpicker.pick_unused_port()
    started = []

    def start():
        config = parameter_servers.config(num_parameter_shards=1)
        started.append(parameter_servers.ParameterServer(config, 0, port=port))

    starting = threading.Timer(2.0, start)
    starting.start()
    try:
        assert probe.probe('parameter', [f'127.0.0.1:{port}'], wait_seconds=60.0)
    finally:
        starting.join()
        started[0].stop()


def test_a_shard_with_a_certificate_answers_over_tls_only(tmp_path):
    paths = certificates.issue(tmp_path)
    pair = server_context(paths['certificate'], paths['key'])
    config = parameter_servers.config(num_parameter_shards=1)
    with parameter_servers.ParameterServer(config, 0, tls=pair) as server:
        code, output, errors = run('parameter', server.address, '--tls')
        assert (code, output) == (0, 'parameter shard 0, update 0\n'), errors
        assert run('parameter', server.address, f'--timeout_seconds={BOUND_SECONDS}')[0] == 1


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (('parameter', 'nowhere'), "'nowhere' is no address"),
        (('parameter', '127.0.0.1:7101,'), "'' is no address"),
        (('replay', '127.0.0.1:7001', '--tls'), 'speaks no TLS'),
        (('replay', '127.0.0.1:7001', '--wait_seconds=-1'), 'not a positive number'),
        (('queue', '127.0.0.1:7001'), 'invalid choice'),
    ],
)
def test_bad_input_ends_with_2_and_says_why(arguments, says):
    code, output, errors = run(*arguments)
    assert (code, output) == (2, '')
    assert says in errors


def test_a_probe_imports_no_tensorflow(parameter_addresses):
    with replay_server() as replay:
        questions = [('parameter', parameter_addresses[0]), ('replay', replay)]
        code = (
            'import sys; from infra import probe;'
            f'[probe.probe(kind, [address]) for kind, address in {questions}];'
            'print("tensorflow" in sys.modules)'
        )
        ended = subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=60
        )
    assert ended.stdout == 'False\n', ended.stderr
