"""What the launcher makes of signals, real ones, and of results that cannot be written."""

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import types
from typing import Any

import pytest

from infra.disk import write_json
from infra.own_time import OwnTime
from pipelines.experiment import command_line
from pipelines.launch import finishing
from pipelines.launch.finishing import Finishing, Outcome
from pipelines.launch.interrupts import Signals
from pipelines.launch.launcher import Launcher
from pipelines.launch.training import LastCheckpointError
from pipelines.monitoring.display import PlainDisplay
from pipelines.monitoring.monitor import Monitor
from pipelines.monitoring.run_state import MonitorConfig
from pipelines.storage import evaluations
from pipelines.storage.checkpoints import Checkpoints
from pipelines.storage.evaluations import EVALUATION_FILE
from pipelines.storage.run_directory import CHECKPOINT_RUN_FILE, RunDirectory, command
from tests.support.waiting import eventually

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
        (True, '; resume with `'),
        (False, 'without a checkpoint; logs: '),
    ],
)
def test_a_second_one_ends_the_process_at_once_and_says_what_that_costs(directory, saved, told):
    if saved:
        write_checkpoint(directory, {})
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


def child_that(start):
    """Stands in for the process of `pipelines.finish`."""
    return types.SimpleNamespace(
        pid=None, start=start, release=str, terminate=str, describe_failure=str
    )


def finishing_in(directory, signals):
    display = PlainDisplay(sys.stdout)
    return Finishing(command_line.experiment('laptop', {}), directory, display, signals, 120.0)


def write_checkpoint(directory, counters):
    with directory.new_checkpoint() as path:
        (path / CHECKPOINT_RUN_FILE).write_text(json.dumps(counters))


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


RESULT = {
    'protocol': 'noop',
    'deviations': {},
    'epsilon': 0.05,
    'max_frames': 18_000,
    'episodes': 2,
    'failed': 0,
    'mean': 3.0,
    'std': 0.5,
    'standard_error': 0.5,
}


@pytest.mark.parametrize(('missing', 'shown'), [((), True), (('export',), False)])
def test_a_video_that_a_signal_prevents_has_its_command_unless_a_resume_films_it(
    directory, capsys, missing, shown
):
    outcome = Outcome({**RESULT, 'game': 'pong'}, exported=True, missing=missing)
    signalled: Any = types.SimpleNamespace(received=True)
    finishing_in(directory, signalled).tell_result(outcome, True)
    assert ('video.mp4: not made' in capsys.readouterr().out) == shown


@pytest.mark.parametrize('exported', [True, False])
def test_no_policy_is_spoken_of_but_one_that_is_there(tmp_path, signals, capsys, exported):
    with RunDirectory.open(tmp_path / 'a[1]') as directory:  # from where it cannot be loaded
        finishing_in(directory, signals).tell_result(Outcome(exported=exported), False)
    text = capsys.readouterr().out
    assert ('copy it to another directory' in text) == exported
    assert ('policy/ and the rest' in text) == exported
    assert f'and the rest are in {directory.path}\n' in text


def test_an_evaluation_that_a_signal_prevents_is_replaced_by_the_command_that_makes_it(
    directory, signals, capsys, monkeypatch
):
    def train(checkpoints, monitor, resumed):
        monitor.clock(1, 8)
        write_checkpoint(directory, {'updates': 1, 'agent_steps': 8})
        send(signal.SIGINT)
        return 'max_frames'

    launcher = launcher_in(directory, signals)
    monkeypatch.setattr(launcher, '_train', train)
    monkeypatch.setattr(Finishing, '_await', lambda *_: pytest.fail('the evaluation has begun'))
    assert launcher.run() == 128 + signal.SIGINT
    hint, result = capsys.readouterr().out.splitlines()[-2:]
    resume = f'resume with {command("run", directory.path, "--resume")}.'
    assert hint.endswith(f'evaluate and export: not finished. Fix: {resume}')
    assert 'no evaluation; summary.json and the rest are in' in result


@pytest.mark.parametrize('saved', [True, False])
def test_a_run_that_failed_names_a_checkpoint_only_where_one_is(
    directory, signals, capsys, monkeypatch, saved
):
    def fail(*_):
        raise LastCheckpointError('the last 8 frames could not be saved')

    if saved:
        write_checkpoint(directory, {})
    launcher = launcher_in(directory, signals)
    monkeypatch.setattr(launcher, '_train', fail)
    assert launcher.run() == 1
    lines = capsys.readouterr().out.splitlines()
    assert 'could not be saved' in lines[0]
    assert '] ended | frames 0' in lines[1]
    assert lines[-1].endswith(f'resume with {command("run", directory.path, "--resume")}') == saved


def test_a_full_disk_is_named_first_with_its_remedy_and_each_result_that_is_missing(
    directory, signals, capsys, monkeypatch
):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f'{directory.path}/.summary.json.01')

    def fail(*_):
        raise full

    launcher = launcher_in(directory, signals)
    monkeypatch.setattr(launcher, '_train', fail)
    monkeypatch.setattr('pipelines.monitoring.monitor.write_json', fail)
    monkeypatch.setattr(Monitor, 'draw_learning_curve', fail)
    assert launcher.run() == 1
    first, *_, results, _ = (line.split('] ')[1] for line in capsys.readouterr().out.splitlines())
    reason, remedy = 'No space left on device', 'Fix: free some disk space'
    assert first == f'run.py: {directory.path}: {reason}. {remedy}'
    assert results == (
        f'run.py: {directory.path}: not written: summary.json, learning_curve.png ({reason}).'
        f' {remedy}'
    )


@pytest.mark.parametrize('phase', ['starting servers', 'evaluating'])
def test_a_first_signal_is_acknowledged_at_once_with_what_it_leads_to(
    directory, monkeypatch, phase
):
    """The main thread is busy, and shows nothing itself."""
    said = io.StringIO()

    def busy(*_):
        send(signal.SIGTERM)
        assert eventually(lambda: 'SIGTERM' in said.getvalue())
        return 'max_frames'

    with Signals(PlainDisplay(said), directory) as signals:
        if phase == 'evaluating':
            child = child_that(start=busy)
            monkeypatch.setattr(Finishing, '_child', child)
            monkeypatch.setattr(Finishing, '_await', lambda *_: None)
            finishing_in(directory, signals).evaluate()
        else:
            launcher = launcher_in(directory, signals)
            training = contextlib.nullcontext(types.SimpleNamespace(run=busy))
            monkeypatch.setattr(launcher, '_training', lambda *_: training)
            launcher._train(None, None, None)
    effect = {
        'starting servers': 'stopping once the servers answer; a second signal stops at once',
        'evaluating': 'ending the evaluation; the training is complete and saved',
    }
    assert f'] SIGTERM: {effect[phase]}\n' in said.getvalue()


@pytest.mark.parametrize(('code', 'starts'), [(None, 0), (-9, 1)])
def test_a_process_that_was_prepared_is_released_and_one_that_has_died_is_started_again(
    directory, signals, monkeypatch, code, starts
):
    calls: list[str] = []
    child = child_that(start=lambda: calls.append('start'))
    child.pid, child.poll, child.release = 1, lambda: code, lambda: calls.append('release')
    monkeypatch.setattr(Finishing, '_child', child)
    monkeypatch.setattr(Finishing, '_await', lambda *_: None)
    finishing_in(directory, signals).evaluate()
    assert calls == [*['start'] * starts, 'release']


def test_a_training_that_fails_at_its_end_leaves_no_prepared_process(
    directory, signals, monkeypatch
):
    launcher = launcher_in(directory, signals)

    def fail(*_):
        launcher._finishing.prepare()
        assert launcher._finishing._child.poll() is None
        raise LastCheckpointError('no answer')

    monkeypatch.setattr(launcher, '_train', fail)
    assert launcher.run() == 1
    assert launcher._finishing._child.poll() is not None


def test_a_run_that_trains_further_keeps_the_evaluation_of_before_under_another_name(
    directory, signals, monkeypatch
):
    before = {'protocol': 'noop', 'episodes': 1, 'epsilon': 0.05, 'mean': 1.0, 'std': 0.0}
    evaluations.write(str(directory.path / EVALUATION_FILE), {**before, 'updates': 7})
    launcher = launcher_in(directory, signals)
    training = contextlib.nullcontext(types.SimpleNamespace(run=lambda: 'SIGINT'))
    monkeypatch.setattr(launcher, '_training', lambda *_: training)
    assert launcher._train(None, None, None) == 'SIGINT'
    assert not (directory.path / EVALUATION_FILE).exists()
    assert (directory.path / 'evaluation-7-updates.json').exists()


def test_what_a_child_leaves_that_is_killed_while_it_films_is_removed(
    directory, signals, capsys, monkeypatch
):
    unnamed = ('video.mp4', 'policy', 'best', 'evaluation.partial.json')
    left = ['evaluation.partial.json', *(f'.{name}.0123456789ab' for name in unnamed)]
    others = '.mine.mp4.0123456789ab'  # that another process writes

    def write():
        for name in (*left, others):
            (directory.path / name).touch()

    child = child_that(start=write)
    monkeypatch.setattr(Finishing, '_child', child)
    monkeypatch.setattr(Finishing, '_await', lambda *_: None)
    finishing_in(directory, signals).evaluate()
    here = {path.name for path in directory.path.iterdir()}
    assert not here & set(left)
    assert others in here


@pytest.fixture
def awaited(directory, signals, monkeypatch):
    """Waits for a child whose `poll` gets the seconds since the start, 4 more at each call."""

    def wait(poll):
        now = 0.0

        def look():
            nonlocal now
            now += 4.0
            return poll(now)

        monkeypatch.setattr(finishing, 'OwnTime', lambda: OwnTime(lambda: now))
        monkeypatch.setattr(finishing, 'time', types.SimpleNamespace(sleep=lambda _: None))
        child: Any = types.SimpleNamespace(poll=look)
        finishing_in(directory, signals)._await(child, directory.path / EVALUATION_FILE)
        return now

    return wait


def test_the_display_says_for_how_long_a_run_films(directory, monkeypatch, awaited):
    phases: list[str] = []

    def poll(now):
        if now == 12.0:
            (directory.path / EVALUATION_FILE).touch()
        return 0 if now == 24.0 else None

    monkeypatch.setattr(PlainDisplay, 'phase', lambda _, text: phases.append(text))
    awaited(poll)
    # Looked at after 4, 8, 12, 16 and 20 s; the evaluation was written between 8 and 12 s.
    assert phases == [*['evaluating 0/30'] * 2, *(f'filming {seconds} s' for seconds in (0, 4, 8))]


def test_an_evaluation_is_stopped_half_an_hour_after_its_last_sign_of_life(
    directory, capsys, awaited
):
    def poll(now):
        if now <= 3_000.0:  # its first game takes longer than the bound
            file = evaluations.progress_file(directory.path / EVALUATION_FILE)
            write_json(file, {'episodes': 0})

    # 3,000 s, 1,800 s, the 120 s of --hang_seconds, and the next look.
    assert awaited(poll) == 3_000.0 + 1_800.0 + 120.0 + 4.0
    assert 'evaluating 0/30: stopped, no sign of life for 1920 s' in capsys.readouterr().out


def test_a_resumed_run_at_its_budget_is_only_evaluated(directory, signals, capsys, monkeypatch):
    counters = {'updates': 7, 'agent_steps': 100, 'wall_seconds': 60.0}
    monkeypatch.setattr(Checkpoints, 'open', lambda *_: counters)
    monkeypatch.setattr(Launcher, '_train', lambda *_: pytest.fail('the training has begun'))
    outcome = Outcome({**RESULT, 'game': 'pong', 'returns': [2.5, 3.5]}, exported=True)
    monkeypatch.setattr(Finishing, 'evaluate', lambda *_: outcome)
    launcher = launcher_in(directory, signals, '--max_frames=400', '--min_replay_size=1')
    assert launcher.run() == 0
    summary = json.loads(directory.summary_file.read_text())
    assert (summary['exit_reason'], summary['frames']) == ('max_frames', 400)
    assert summary['evaluation'] == RESULT
    assert summary['exported']
    *_, last = capsys.readouterr().out.splitlines()
    assert (
        'pong: mean return 3.0, standard error 0.5, over 2 games (protocol noop, epsilon 0.05, at'
        ' most 18,000 frames); summary.json, policy/ and the rest are in'
    ) in last
    assert summary['wall_seconds'] == pytest.approx(60.0, abs=5.0)
    assert directory.learning_curve_file.exists()


def test_a_resumed_run_begins_its_clock_where_the_last_session_ended(
    directory, signals, capsys, monkeypatch
):
    def open_(checkpoints, resume, notify):
        notify('resuming from checkpoint-00000001')
        return {'updates': 7, 'wall_seconds': 3_661.0}

    monkeypatch.setattr(Checkpoints, 'open', open_)
    launcher = launcher_in(directory, signals)
    monkeypatch.setattr(launcher, '_train', lambda *_: 'SIGINT')
    launcher.run()
    # 3,661 s are an hour, a minute and a second.
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all('[1:01:01] ' <= line[:10] <= '[1:01:59] ' for line in lines)


def test_a_picture_that_cannot_be_drawn_hides_no_other_result(directory, signals, capsys):
    directory.learning_curve_file.mkdir()  # where a file should be put
    launcher = launcher_in(directory, signals)
    with Monitor(directory, MonitorConfig('pong', 'laptop', seed=1, max_frames=1000)) as monitor:
        assert not launcher._write_summary(monitor, 'max_frames', Outcome())
    assert directory.summary_file.exists()
    *_, line = capsys.readouterr().out.splitlines()
    assert f'run.py: {directory.path}: not written: learning_curve.png (' in line
