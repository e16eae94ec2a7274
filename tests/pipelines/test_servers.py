"""Servers by themselves: real ones, and what is refused."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from infra.parameter_server.client import ParameterClient
from infra.parameter_server.layout import Layout
from infra.parameter_server.server import load_config
from infra.replay.server import ShardConfig
from pipelines import servers
from tests.end_to_end import launching
from tests.support.waiting import eventually, has_ended

SMALL = ('--num_parameter_shards=1', '--replay_capacity=1000', '--min_replay_size=100')


@pytest.fixture
def start(tmp_path):
    """Starts servers; gives their process, its directory and its log."""
    processes = []

    def begin(*flags):
        directory, log = tmp_path / 'servers', tmp_path / 'log'
        argv = [sys.executable, '-u', 'pipelines/servers.py', f'--run_dir={directory}']
        with log.open('wb') as output:
            processes.append(
                subprocess.Popen(
                    [*argv, *SMALL, *flags], cwd=launching.ROOT, stdout=output, stderr=output
                )
            )
        return processes[-1], directory, log

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def flags_of(log: pathlib.Path) -> list[str]:
    """The flags that the servers have told, once they have."""
    assert eventually(lambda: '--replay_addresses=' in log.read_text(), 60.0), log.read_text()
    return log.read_text().splitlines()[-1].split()


def pid_of(directory: pathlib.Path, server: str) -> int:
    """Process id of a server, as it has told it."""
    return json.loads((directory / 'servers' / f'{server}.ready').read_text())['pid']


def test_a_dead_parameter_shard_is_started_again_with_its_state(start):
    process, directory, log = start()
    parameters, _ = flags_of(log)
    layout = Layout(('kernel',), ((4,),))
    with ParameterClient([parameters.partition('=')[2]], layout, timeout_seconds=90.0) as client:
        client.initialise(np.arange(4.0))
        client.claim('runs/first')
        pid = pid_of(directory, 'parameter_server_0')
        os.kill(pid, signal.SIGTERM)  # it writes its state: a kill -9 would cost up to a minute
        assert eventually(lambda: has_ended(pid), 20.0)
        np.testing.assert_array_equal(np.asarray(client.pull().values), np.arange(4.0))
        assert client.report()['shards'][0]['owner'] == 'runs/first'
    process.terminate()
    assert process.wait(20) == 0
    launching.assert_nothing_runs(directory, within_seconds=10)


def test_configurations_for_other_starters_are_those_that_the_shards_read(tmp_path, capsys):
    # More than this machine has cores: for elsewhere.
    flags = ('--preset=apex', '--num_parameter_shards=3000')
    assert servers.main([*flags, f'--config_dir={tmp_path / "c"}']) == 0
    replay, parameters = capsys.readouterr().out.split()
    assert load_config(parameters).num_parameter_shards == 3000
    with open(replay) as file:
        shard = ShardConfig.from_dict(json.load(file))
    # Ape-X (Horgan et al. 2018): alpha 0.6, batches of 512, three steps.
    assert (shard.replay.priority_exponent, shard.batch_size) == (0.6, 512)
    assert shard.trajectory.n_step == 3


def test_servers_of_bundles_are_told_with_the_one_that_keeps_telemetry(start):
    process, directory, log = start('--topology=bundled', '--num_learners=1')
    parameters, replay = flags_of(log)
    assert parameters.startswith('--parameter_addresses=127.0.0.1:')
    assert replay.startswith('--replay_addresses=127.0.0.1:')
    process.send_signal(signal.SIGHUP)  # as when its terminal goes away
    assert process.wait(20) == 0
    launching.assert_nothing_runs(directory, within_seconds=10)


def test_a_signal_while_they_start_ends_them_at_once(start):
    process, directory, log = start()
    assert eventually(lambda: 'starting servers' in log.read_text(), 30.0)
    assert eventually(lambda: len(list(launching.processes_of(directory))) >= 3, 30.0)
    pids = [each.pid for each in launching.processes_of(directory)]
    process.send_signal(signal.SIGINT)
    assert process.wait(15) == 0
    assert eventually(lambda: all(has_ended(pid) for pid in pids if pid != process.pid))


def test_a_signal_before_the_first_server_starts_ends_them_too(tmp_path, monkeypatch):
    def import_tensorflow(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(servers, 'cluster_config', import_tensorflow)
    assert servers.serve(*servers._prepare([]), tmp_path) == 0


@pytest.mark.parametrize('flag', ['--resume', '--parameter_addresses=127.0.0.1:1'])
def test_what_only_a_run_can_do_is_refused(flag, tmp_path, capsys):
    assert servers.main([flag, f'--run_dir={tmp_path / "servers"}']) == 2
    assert 'for run.py' in capsys.readouterr().err


def test_a_second_ctrl_c_ends_servers_that_hang():
    program = (
        'import time\n'
        'from pipelines.launch.interrupts import handled, raise_ended\n'
        'with handled(raise_ended):\n'
        '    try:\n'
        '        print("serving", flush=True)\n'
        '        time.sleep(60)\n'
        '    finally:\n'
        '        print("ending", flush=True)\n'
        '        time.sleep(60)\n'  # a server that hangs
    )
    with subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        for line in (b'serving\n', b'ending\n'):
            assert run.stdout.readline() == line
            run.send_signal(signal.SIGINT)
        assert run.wait(30) == 128 + signal.SIGINT


def test_an_empty_name_for_the_configurations_is_refused(capsys):
    with pytest.raises(SystemExit) as refusal:
        servers.main(['--config_dir='])
    assert refusal.value.code == 2
    assert '--config_dir: empty' in capsys.readouterr().err


def test_a_remote_directory_is_refused(capsys):
    assert servers.main(['--run_dir=gs://bucket/servers']) == 2
    assert 'not on this machine. Fix: name a local' in capsys.readouterr().err


@pytest.mark.parametrize('flag', ['--config_dir', '--run_dir'])
def test_a_game_that_cannot_be_played_is_refused_before_anything_starts(flag, tmp_path, capsys):
    for game in ('nosuch', 'warlords'):
        assert servers.main([f'--game={game}', f'{flag}={tmp_path / "servers"}']) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert 'servers.py: --game: ' in line
        assert game in line
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_told_before_anything_is_written(tmp_path, capsys):
    argv = ['--replay_capacity=100000000', f'--run_dir={tmp_path / "servers"}']
    assert servers.main(argv) == 2
    assert 'GiB' in capsys.readouterr().err
    assert not (tmp_path / 'servers').exists()
