"""What the launcher makes of signals, real ones, and of results that cannot be written."""

import contextlib
import os
import signal
import subprocess
import sys
import types

import pytest

from pipelines.experiment import command_line
from pipelines.launch.interrupts import Signals
from pipelines.launch.launcher import Launcher, Outcome
from pipelines.launch.training import LastCheckpointError
from pipelines.monitoring.display import PlainDisplay
from pipelines.monitoring.monitor import Monitor
from pipelines.monitoring.run_state import MonitorConfig
from pipelines.storage.run_directory import CHECKPOINT_RUN_FILE, RunDirectory

SHOWN = """
import os, signal, sys
from pipelines.launch.interrupts import Signals
from pipelines.monitoring import display
from pipelines.storage.run_directory import RunDirectory

with RunDirectory.open(sys.argv[1], resume=True) as directory:
    with display.open_display() as shown, Signals(shown, directory) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.fixture
def signals(directory):
    with Signals(PlainDisplay(sys.stdout), directory) as watched:
        yield watched


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted(signals, number):
    send(number)
    assert (signals.received, signals.name) == (number, number.name)


def test_a_terminal_that_goes_away_is_not_in_a_hurry(signals):
    send(signal.SIGHUP, signal.SIGHUP)
    assert signals.name == 'SIGHUP'
    send(signal.SIGTERM)  # of the session that ends with it
    assert signals.name == 'SIGTERM'
    send(signal.SIGHUP)
    assert signals.name == 'SIGTERM'


def test_a_run_under_nohup_hears_no_sighup(directory):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals(PlainDisplay(sys.stdout), directory) as watched:
            send(signal.SIGHUP)
            assert watched.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_one_ends_the_process_though_its_words_cannot_be_written(signals, monkeypatch):
    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(os, '_exit', end)
    monkeypatch.setattr(PlainDisplay, 'abandon', lambda *_: 1 / 0)
    with pytest.raises(Ended, match='130'):
        send(signal.SIGINT, signal.SIGINT)


@pytest.mark.parametrize(
    ('saved', 'told'),
    [
        (True, '--resume continues from the last checkpoint'),
        (False, 'without a checkpoint; logs: '),
    ],
)
def test_a_second_one_ends_the_process_at_once_and_says_what_that_costs(directory, saved, told):
    if saved:
        with directory.new_checkpoint() as path:
            (path / CHECKPOINT_RUN_FILE).write_text('{}')
    directory.close()
    ended = subprocess.run(
        [sys.executable, '-c', SHOWN, str(directory.path)], stdout=subprocess.PIPE, timeout=100
    )
    assert ended.returncode == 128 + signal.SIGINT
    assert 'SIGINT again: stopped at once' in ended.stdout.decode()
    assert told in ended.stdout.decode()


def launcher_in(directory, signals, *flags):
    launch, preset, values = command_line.parse(flags)
    display = PlainDisplay(sys.stdout)
    return Launcher(command_line.experiment(preset, values), launch, directory, display, signals)


@pytest.mark.parametrize(
    ('flags', 'phase'),
    [
        ((), 'starting servers'),
        (('--parameter_addresses=ps:1',), 'starting servers'),
        (('--parameter_addresses=ps:1', '--replay_addresses=replay:1'), 'connecting to servers'),
    ],
)
def test_servers_that_already_run_are_not_said_to_start(
    directory, signals, capsys, monkeypatch, flags, phase
):
    launcher = launcher_in(directory, signals, *flags)
    training = contextlib.nullcontext(types.SimpleNamespace(run=str))
    monkeypatch.setattr(launcher, '_training', lambda *_: training)
    launcher._train(None, None, None)
    assert f'] {phase}\n' in capsys.readouterr().out


@pytest.mark.parametrize('exported', [True, False])
def test_no_policy_is_spoken_of_but_one_that_is_there(tmp_path, signals, capsys, exported):
    with RunDirectory.open(tmp_path / 'a[1]') as directory:  # from where it cannot be loaded
        launcher_in(directory, signals)._tell_result(Outcome(exported=exported), False)
    text = capsys.readouterr().out
    assert ('copy it to another directory' in text) == exported
    assert ('policy/ and the rest' in text) == exported
    assert f'and the rest are in {directory.path}\n' in text


def test_an_evaluation_that_a_signal_prevents_is_replaced_by_commands(
    directory, signals, capsys, monkeypatch
):
    def train(checkpoints, monitor, resumed):
        monitor.clock(1, 8)
        send(signal.SIGINT)
        return 'max_frames'

    launcher = launcher_in(directory, signals)
    monkeypatch.setattr(launcher, '_train', train)
    monkeypatch.setattr(launcher, '_await', lambda *_: pytest.fail('the evaluation has begun'))
    assert launcher.run() == 128 + signal.SIGINT
    hint, result = capsys.readouterr().out.splitlines()[-2:]
    assert 'evaluate and export: not finished. Fix: run `python pipelines/evaluate.py ' in hint
    assert f'`python pipelines/export.py --run_dir {directory.path}`' in hint
    assert 'no evaluation; summary.json and the rest are in' in result


@pytest.mark.parametrize('saved', [True, False])
def test_a_run_that_failed_names_a_checkpoint_only_where_one_is(
    directory, signals, capsys, monkeypatch, saved
):
    def fail(*_):
        raise LastCheckpointError

    if saved:
        with directory.new_checkpoint() as path:
            (path / CHECKPOINT_RUN_FILE).write_text('{}')
    launcher = launcher_in(directory, signals)
    monkeypatch.setattr(launcher, '_train', fail)
    assert launcher.run() == 1
    lines = capsys.readouterr().out.splitlines()
    assert 'could not be saved' in lines[0]
    assert ('--resume' in lines[1]) == saved
    assert '] ended | frames 0' in lines[1 + saved]


def test_a_picture_that_cannot_be_drawn_hides_no_other_result(directory, signals, capsys):
    directory.learning_curve_file.mkdir()  # where a file should be put
    launcher = launcher_in(directory, signals)
    with Monitor(directory, MonitorConfig('pong', 'laptop', seed=1, max_frames=1000)) as monitor:
        assert not launcher._write_summary(monitor, 'max_frames', Outcome())
    assert directory.summary_file.exists()
    assert 'run.py: some results are not written: ' in capsys.readouterr().out.splitlines()[-1]
