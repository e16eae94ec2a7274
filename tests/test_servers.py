"""Servers by themselves: real ones, and what is refused."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from pipelines import servers
from tests.end_to_end import launching
from tests.waiting import eventually, has_ended

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


def test_a_dead_parameter_shard_ends_the_servers_since_its_state_is_lost(start):
    process, directory, log = start()
    flags_of(log)
    ready = (directory / 'servers' / 'parameter_server_0.ready').read_text()
    os.kill(int(ready.partition('"pid": ')[2].rstrip('}')), signal.SIGKILL)
    assert process.wait(20) == 1
    assert 'what this shard had learned is lost' in log.read_text()
    launching.assert_nothing_runs(directory, within_seconds=10)


def test_servers_of_bundles_are_told_with_the_one_that_keeps_telemetry(start):
    process, directory, log = start('--topology=bundled', '--num_learners=1')
    parameters, replay = flags_of(log)
    assert parameters.startswith('--parameter_addresses=127.0.0.1:')
    assert replay.startswith('--replay_addresses=127.0.0.1:')
    process.terminate()
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


@pytest.mark.parametrize('flag', ['--resume', '--parameter_addresses=127.0.0.1:1'])
def test_what_only_a_run_can_do_is_refused(flag, tmp_path, capsys):
    assert servers.main([flag, f'--run_dir={tmp_path / "servers"}']) == 2
    assert 'for run.py' in capsys.readouterr().err


def test_too_little_memory_is_told_before_anything_is_written(tmp_path, capsys):
    argv = ['--replay_capacity=100000000', f'--run_dir={tmp_path / "servers"}']
    assert servers.main(argv) == 2
    assert 'GiB' in capsys.readouterr().err
    assert not (tmp_path / 'servers').exists()
