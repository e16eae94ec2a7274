"""Stopping a run from elsewhere: a real process that holds a run directory."""

import dataclasses
import json
import signal
import subprocess
import sys

import pytest

from pipelines import stop
from pipelines.experiment import config as config_lib
from pipelines.experiment import presets
from pipelines.storage.run_directory import CHECKPOINT_RUN_FILE, RunDirectory, command
from tests.support.waiting import eventually

# Holds the directory; ends itself after a signal, when it has been told to.
HOLD = """
import signal, sys, time
from pipelines.storage.run_directory import RunDirectory
received = []
signal.signal(signal.SIGINT, lambda *_: received.append(1))
with RunDirectory.open(sys.argv[1], resume=sys.argv[2] != 'unused') as directory:
    if sys.argv[2] == 'unused':
        directory.config_file.write_text('{}')
        directory.discard()
    print('holds', flush=True)
    while not received or sys.argv[2] == 'stubborn':
        time.sleep(0.05)
"""


@pytest.fixture
def hold(tmp_path):
    """Starts a process that holds a run's directory; gives the directory and the process."""
    processes = []

    def start(temper='mild', checkpoint=True):
        path = tmp_path / 'a run'
        if temper != 'unused':
            with RunDirectory.open(path) as directory:
                directory.config_file.write_text('{}')
                if checkpoint:
                    with directory.new_checkpoint() as staging:
                        (staging / CHECKPOINT_RUN_FILE).write_text('{}')
        argv = [sys.executable, '-c', HOLD, str(path), temper]
        processes.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
        output = processes[-1].stdout
        assert output is not None
        assert output.readline() == 'holds\n'
        return path, processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_an_active_run_is_asked_to_end_and_waited_for(hold, capsys):
    path, process = hold()
    assert stop.main([f'--run_dir={path}']) == 0
    assert process.wait(5) == 0
    assert f'ended; resume with {command("run", path, "--resume")}\n' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('temper', 'told'),
    [('mild', 'ended without a checkpoint; logs: '), ('unused', 'nothing is kept')],
)
def test_a_run_that_left_nothing_is_not_said_to_continue(hold, capsys, temper, told):
    path, _ = hold(temper, checkpoint=False)
    assert stop.main([f'--run_dir={path}']) == 0
    out = capsys.readouterr().out
    assert told in out
    assert '--resume' not in out


@pytest.mark.parametrize(
    ('game', 'complete', 'flag'),
    [('pong', True, 'max_frames'), ('CartPole-v1', True, 'max_steps'), ('pong', False, '')],
)
def test_a_run_that_ended_at_its_budget_needs_a_larger_one_if_complete(
    hold, capsys, game, complete, flag
):
    path, _ = hold()
    experiment = presets.experiment('laptop', {'max_frames': 400_000})
    environment = dataclasses.replace(experiment.environment, game=game)
    experiment = dataclasses.replace(experiment, environment=environment)
    (path / 'config.json').write_text(config_lib.to_json(experiment))
    (checkpoint,) = (path / 'checkpoints').iterdir()
    (checkpoint / CHECKPOINT_RUN_FILE).write_text('{"agent_steps": 100000}')  # of 4 frames each
    result = {'protocol': 'noop', 'episodes': 2, 'epsilon': 0.05, 'mean': 3.0, 'std': 0.0}
    evaluation = result if complete else None  # None: SIGINT while it was evaluated
    summary = {'exit_reason': 'SIGINT', 'frames': 400_000, 'evaluation': evaluation}
    (path / 'summary.json').write_text(json.dumps(summary))
    (path / 'evaluation.json').write_text(json.dumps(result))
    (path / 'policy').mkdir()
    assert stop.main([f'--run_dir={path}']) == 0
    out = capsys.readouterr().out
    assert f'ended; resume with {command("run", path, "--resume")}' in out
    assert (f'--resume` and a larger --{flag}' in out) == complete


def test_a_run_that_does_not_end_in_time_is_told_of(hold, capsys):
    path, process = hold('stubborn')
    assert stop.main([f'--run_dir={path}', '--timeout_seconds=1']) == 1
    assert 'not ended within 1 s' in capsys.readouterr().err
    assert process.poll() is None


def test_a_directory_without_a_running_run_is_refused(hold, tmp_path, capsys):
    assert stop.main([f'--run_dir={tmp_path / "nothing"}']) == 2
    path, process = hold()
    process.kill()
    process.wait()
    assert stop.main([f'--run_dir={path}']) == 2
    *_, line = capsys.readouterr().err.splitlines()
    remedy = f'resume with {command("run", path, "--resume")}'
    assert line == f'stop.py: {path}: the run has already ended. Fix: {remedy}.'


def test_a_killed_run_holds_nothing(hold):
    path, process = hold()
    directory = RunDirectory.existing(path)
    assert directory.holder() == process.pid
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert eventually(lambda: directory.holder() is None)
