"""The watch over a run: real parameter shards and checkpoints, servers that fail as told."""

import contextlib
import errno
import io
import os
import types
from unittest.mock import Mock

import numpy as np
import pytest

from infra.disk import write_json
from infra.guard import UnforeseenError
from infra.own_time import OwnTime
from infra.parameter_server import ledger
from infra.parameter_server.client import ParameterClient
from infra.parameter_server.protocol import ParameterServerError, ParameterServerUnavailable
from infra.replay.errors import ReplayUnavailable
from pipelines.experiment import presets
from pipelines.launch import shard_watch
from pipelines.launch import training as training_lib
from pipelines.launch.evaluator import EvaluatorProcess
from pipelines.launch.jobs import WorkersFailedError
from pipelines.launch.launcher import exit_reason
from pipelines.launch.saver import Saver
from pipelines.launch.shard_watch import Replay, ServerWatch
from pipelines.launch.training import Due, LastCheckpointError, Training
from pipelines.monitoring.display import PlainDisplay
from pipelines.monitoring.monitor import Monitor
from pipelines.monitoring.run_state import MonitorConfig
from pipelines.storage.checkpoints import Checkpoints
from pipelines.storage.run_directory import RunDirectory
from tests.support import parameter_servers
from tests.support.waiting import eventually

MONITOR = MonitorConfig(game='pong', preset='laptop', seed=1, max_frames=1000)


@pytest.fixture
def training(tmp_path, monkeypatch):
    """A training with initialised parameter shards and without workers; gives it and its output."""
    monkeypatch.setattr(training_lib, '_STATUS_SECONDS', 0.0)  # each look asks the servers
    server = parameter_servers.config(num_parameter_shards=2)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(RunDirectory.open(tmp_path / 'run'))
        directory.config_file.write_text('{}')
        shards = stack.enter_context(parameter_servers.serve(server))
        addresses = [shard.address for shard in shards]
        client, for_saving = (
            stack.enter_context(parameter_servers.connect(addresses)) for _ in range(2)
        )
        client.initialise(np.zeros(client.layout.size, np.float32))
        config = presets.experiment('laptop', {'num_actors': 3})
        display = PlainDisplay(told := io.StringIO())
        yield (
            Training(
                config=config,
                display=display,
                owner='run',
                signals=types.SimpleNamespace(name='', effect=''),  # type: ignore[arg-type]
                cluster=types.SimpleNamespace(  # type: ignore[arg-type]
                    restarts={},
                    pids={},
                    abandoned=frozenset(),
                    news=list,
                    telemetry_address='replay:1',
                    config=types.SimpleNamespace(parameter_addresses=(), replay_addresses=()),
                ),
                client=client,
                reader=types.SimpleNamespace(drain=lambda timeout_seconds: [], hears=True),  # type: ignore[arg-type]
                jobs=types.SimpleNamespace(  # type: ignore[arg-type]
                    restarts={}, submissions=2, news=list, hear=lambda *_: None
                ),
                monitor=stack.enter_context(Monitor(directory, MONITOR)),
                saver=Saver(Checkpoints(directory, config), for_saving, display.message),
                replay=Replay(('replay:1',), types.SimpleNamespace(read=list)),  # type: ignore[arg-type]
                evaluator=EvaluatorProcess(config, directory, 0.0, display.message),
                at_budget=lambda: None,
            ),
            told,
            directory,
        )


def without_replay(run, directory):
    """Has the run save nothing of its replay."""
    checkpoints = Checkpoints(directory, run.config, replay_is_ours=False)
    run.saver = Saver(checkpoints, run.client, run.display.message)


def saves(saver, replay=()):
    """Whether a checkpoint can be written."""
    saver.save(replay, {})
    assert eventually(lambda: not saver.busy)
    return saver.ended()


@pytest.fixture
def dead_replay(monkeypatch):
    """No replay shard can write a checkpoint."""

    def fail(addresses, timeout_seconds):
        raise ReplayUnavailable('replay shard replay:1 wrote no checkpoint')

    monkeypatch.setattr('infra.replay.server.save', fail)


def test_the_last_checkpoint_is_written_without_a_replay_that_cannot_be_had(training, dead_replay):
    run, told, directory = training
    run.write_last_checkpoint()
    (path,) = directory.latest_checkpoints()
    assert not (path / 'replay').exists()
    assert 'without the replay' in told.getvalue()


def test_a_run_that_saves_no_replay_does_not_try_again_without_it(training, monkeypatch):
    run, told, directory = training
    without_replay(run, directory)
    monkeypatch.setattr(ParameterClient, 'save', Mock(side_effect=OSError('full')))
    with pytest.raises(LastCheckpointError):
        run.write_last_checkpoint()
    assert told.getvalue().count('checkpoint: not written (full)') == 1
    assert 'without the replay' not in told.getvalue()


@pytest.mark.parametrize('hung', ['parameters', 'replay'])
def test_the_last_checkpoint_waits_for_a_server_that_is_started_again(training, monkeypatch, hung):
    run, told, directory = training
    answers = iter([False, False, True])
    report = run.client.report

    def ask_parameters(*args):
        if not next(answers, True):
            raise ParameterServerUnavailable('host:1', 'no answer', 'start it again')
        return report(*args)

    saved: list[tuple] = []

    def save(shards, _):
        saved.append(shards)
        return []

    monkeypatch.setattr('infra.replay.server.save', save)
    if hung == 'parameters':
        monkeypatch.setattr(run.client, 'report', ask_parameters)
    else:
        run.replay.status.read = lambda: [{'size': 1} if next(answers, True) else {}]
    run.look()
    run.write_last_checkpoint()
    assert next(answers, 'none') == 'none'
    assert saved == [('replay:1',)]
    assert len(directory.latest_checkpoints()) == 1
    assert 'not written' not in told.getvalue()


def test_a_checkpoint_on_the_way_keeps_parameters_and_replay_together(training, dead_replay):
    run, told, directory = training
    assert not saves(run.saver, run.replay.addresses)
    assert not directory.latest_checkpoints()  # the one before stays in force
    assert 'checkpoint: not written (replay shard replay:1' in told.getvalue()


def test_a_run_whose_learning_cannot_be_saved_says_so(training, dead_replay, monkeypatch):
    run, _, _ = training
    full = OSError(28, 'No space left on device')
    monkeypatch.setattr(ParameterClient, 'save', Mock(side_effect=full))
    run.look = lambda: None
    run.monitor.clock(7, 2_000)
    # 2,000 agent steps of 4 frames each.
    lost = 'the last 8,000 frames and 7 updates could not be saved; no checkpoint exists'
    with pytest.raises(LastCheckpointError, match=lost):
        run.write_last_checkpoint()


def test_what_could_not_be_saved_is_counted_from_the_checkpoint_that_remains(training, monkeypatch):
    run, told, directory = training
    without_replay(run, directory)
    run.look = lambda: None
    run.monitor.clock(7, 2_000)
    run.write_last_checkpoint()
    run.monitor.clock(9, 2_500)
    full = ParameterServerError(f'host:1: {os.strerror(errno.ENOSPC)}')  # in a shard's process
    monkeypatch.setattr(ParameterClient, 'save', Mock(side_effect=full))
    with pytest.raises(LastCheckpointError) as failure:
        run.write_last_checkpoint()
    # 500 agent steps of 4 frames each, after 2,000.
    assert str(failure.value) == (
        'the last 2,000 frames and 2 updates could not be saved; checkpoint-00000001 remains (8,000'
        ' frames and 7 updates)'
    )
    assert 'left on device). Fix: free some disk space\n' in told.getvalue()


def test_a_run_with_servers_of_others_has_a_checkpoint_from_its_first_update_on(training):
    run, _, directory = training
    run.cluster.config.parameter_addresses = ('host:1', 'host:2')
    without_replay(run, directory)
    run.save_if_due()
    assert not directory.latest_checkpoints()  # nothing is learned yet
    run.monitor.clock(1, 1_600)
    for _ in range(2):
        run.save_if_due()
        assert eventually(lambda: not run.saver.busy)
    (path,) = directory.latest_checkpoints()  # the next one is due in minutes
    assert not (path / 'replay').exists()


@pytest.mark.parametrize('complete', [True, False])
def test_what_follows_the_budget_is_prepared_before_the_workers_end(training, complete):
    run, _, directory = training
    without_replay(run, directory)
    calls: list[str] = []
    run.at_budget = lambda: calls.append('at_budget')
    run.jobs = types.SimpleNamespace(stop=lambda: calls.append('stop'))
    run._end(complete)
    assert calls == [*['at_budget'] * complete, 'stop']


@pytest.fixture
def hanging(training, monkeypatch):
    """A training whose parameter shard answers nobody; gives it, its output, what it killed."""
    run, told, _ = training
    killed: list[str] = []

    def report(timeout_seconds, owner):
        raise ParameterServerUnavailable('host:1', 'no answer', 'start it again')

    monkeypatch.setattr(run.client, 'report', report)
    run.cluster.kill_hung = lambda address, seconds: [killed.append(address)]  # type: ignore[func-returns-value]
    return run, told, killed


def test_a_shard_of_ours_that_hangs_is_killed_after_the_bound(hanging, monkeypatch):
    run, told, killed = hanging
    run.look()
    assert 'parameter shard host:1: no answer' in told.getvalue()
    assert not killed  # it may be restarting
    monkeypatch.setattr(shard_watch, 'HUNG_SECONDS', 0.0)
    run.look()
    run.look()
    assert killed == ['host:1', 'host:1']  # once for each bound


@pytest.mark.parametrize('telemetry_alone', [False, True])
def test_a_replay_shard_that_hangs_is_killed_but_not_for_its_checkpoint(
    training, monkeypatch, telemetry_alone
):
    run, _, _ = training
    killed: list[str] = []
    run.cluster.kill_hung = lambda address, seconds: [killed.append(address)]  # type: ignore[func-returns-value]
    monkeypatch.setattr(shard_watch, 'HUNG_SECONDS', 0.0)
    monkeypatch.setattr(shard_watch, 'ASK_SECONDS', 0.2)  # nobody is there
    run.reader.hears = not telemetry_alone
    run.replay.status.read = lambda: [{}]
    if telemetry_alone:  # in the bundled topology a server has no other use
        run.cluster.telemetry_address = 'telemetry:1'
        run.replay.status.read = lambda: [{'size': 1}]
    hung = run.cluster.telemetry_address
    for run.saver.replay in ((hung,), (hung,), ()):
        run.look()
        assert not killed
    run.look()
    assert killed == [hung]


def test_silence_counts_for_no_worker_while_a_server_is_away_and_channels_to_it_pause(
    training, monkeypatch
):
    run, _, _ = training
    world = [0.0]
    monkeypatch.setattr(shard_watch, 'OwnTime', lambda: OwnTime(lambda: world[0]))
    watch = ServerWatch(run.cluster, run.client, run.reader, run.replay, run.display.message)

    def hears(seconds, reader_hears=True):
        """What is said once a second."""
        run.reader.hears = reader_hears
        said = []
        for _ in range(seconds):
            world[0] += 1.0
            said.append(watch.hears_workers())
        return said

    assert hears(3) == [True] * 3
    assert hears(5, reader_hears=False) == [False] * 5
    assert hears(7) == [False] * 5 + [True] * 2  # as long as it was away, to the second
    monkeypatch.setattr(shard_watch, '_LONGEST_PAUSE_SECONDS', 4.0)
    hears(600, reader_hears=False)
    assert hears(6) == [False] * 4 + [True] * 2


def test_a_shard_of_others_that_stays_away_ends_the_run(hanging, monkeypatch):
    run, _, killed = hanging
    run.cluster.config.parameter_addresses = ('host:1',)
    run.look()
    monkeypatch.setattr(shard_watch, 'AWAY_SECONDS', 0.0)
    with pytest.raises(ParameterServerUnavailable, match='host:1'):
        run.look()
    assert not killed


def test_a_replay_shard_of_others_that_stays_away_ends_the_run(training, monkeypatch):
    run, _, _ = training
    run.cluster.config.replay_addresses = ('replay:1',)
    run.replay.status.read = lambda: [{}]
    run.look()
    monkeypatch.setattr(shard_watch, 'REPLAY_AWAY_SECONDS', 0.0)
    with pytest.raises(ReplayUnavailable, match='replay shard replay:1: no answer'):
        run.look()


def test_nothing_is_saved_from_shards_that_are_away(hanging, monkeypatch):
    run, told, _ = hanging
    run.look()
    monkeypatch.setattr(training_lib, '_RETURN_SECONDS', 1.0)
    with pytest.raises(LastCheckpointError):
        run.write_last_checkpoint()
    run.monitor.clock(1, 1_600)
    monkeypatch.setattr(Due, 'take', lambda _: True)
    run.save_if_due()
    assert not run.saver.busy
    assert 'not written' not in told.getvalue()


def test_a_run_that_fails_says_so_of_its_last_checkpoint_too(hanging, monkeypatch):
    run, _, _ = hanging
    run.look()
    run.jobs.start = lambda now: None
    run.jobs.supervise = Mock(side_effect=WorkersFailedError('actor 0 failed 5 times in a row'))
    run.cluster.check = lambda: None
    with pytest.raises(WorkersFailedError) as failure:
        run.run()
    (note,) = failure.value.__notes__
    assert note == 'the last 0 frames and 0 updates could not be saved; no checkpoint exists'


@pytest.fixture
def busy(training, monkeypatch):
    """A training whose workers have made steps and have ended; its watch does not pause."""
    run, _, _ = training
    run.jobs = types.SimpleNamespace(
        restarts={},
        submissions=2,
        news=list,
        hear=lambda *_: None,
        start=lambda now: None,
        supervise=lambda *_: None,
        stop=lambda: None,
        running=False,
        unwritten=frozenset(),
    )
    run.cluster.check = lambda: None
    run.replay = Replay((), run.replay.status)
    run.client.push(np.zeros(run.client.layout.size, np.float32), 0)
    run.client.pull(agent_steps=8)
    run.look()
    monkeypatch.setattr(training_lib, '_POLL_SECONDS', 0.0)
    return training


def test_a_look_that_fails_as_nobody_foresaw_is_one_line_and_the_watch_goes_on(busy, monkeypatch):
    run, told, _ = busy
    errors = [KeyError('worker'), TypeError('unhashable'), KeyError('worker')]

    def fold(events):
        if errors:
            raise errors.pop()
        run.signals.name = 'SIGINT'
        return []

    monkeypatch.setattr(run.monitor, 'fold', fold)
    assert run.run() == 'SIGINT'
    assert told.getvalue().count('launcher: KeyError') == 1
    assert told.getvalue().count('launcher: TypeError') == 1


def test_a_look_that_fails_for_ever_ends_the_run_with_its_last_checkpoint(busy, monkeypatch):
    run, told, directory = busy

    def fold(events):
        raise KeyError('worker')

    def ask(timeout_seconds):
        run.jobs.running = False
        raise TypeError('asked in vain')

    run.jobs.running, run.jobs.end_stranded = True, lambda *_: None
    monkeypatch.setattr(run.client, 'request_stop', ask)
    monkeypatch.setattr(run.monitor, 'fold', fold)
    with pytest.raises(UnforeseenError, match='20 times in a row'):
        run.run()
    assert told.getvalue().count('launcher: KeyError') == 1
    assert len(directory.latest_checkpoints()) == 1


def test_a_signal_while_the_workers_end_is_said_to_cost_the_evaluation(busy, monkeypatch):
    run, _, directory = busy
    run.jobs.running, run.jobs.end_stranded = True, lambda *_: None
    effects = []

    def ask_to_stop(timeout_seconds):
        run.signals.name = 'SIGINT'

    def fold(events):
        effects.append(run.signals.effect)
        run.jobs.running = not run.signals.name
        return []

    monkeypatch.setattr(Monitor, 'frames', run.config.run.max_frames)
    monkeypatch.setattr(run.client, 'request_stop', ask_to_stop)
    monkeypatch.setattr(run.monitor, 'fold', fold)
    assert run.run() == 'max_frames'
    assert {effect.partition(';')[0] for effect in effects} == {
        'the run is ending already and will not be evaluated'
    }
    assert len(directory.latest_checkpoints()) == 1


@pytest.mark.parametrize('stopped_by', ['', 'SIGTERM'])
def test_records_in_no_table_are_written_at_the_budgets_end_and_kept_for_a_resumption(
    busy, monkeypatch, stopped_by
):
    run, _, _ = busy
    commits = []

    def submit_unwritten(now):
        run.jobs.unwritten = frozenset()

    run.jobs.unwritten, run.jobs.submit_unwritten = frozenset({('actor', 0)}), submit_unwritten
    monkeypatch.setattr(run.client, 'commit_segments', lambda: commits.append(run.jobs.unwritten))
    if stopped_by:
        run.jobs.supervise = lambda *_: setattr(run.signals, 'name', stopped_by)
    else:
        monkeypatch.setattr(Monitor, 'frames', run.config.run.max_frames)
    assert run.run() == (stopped_by or 'max_frames')
    assert len(run.jobs.unwritten) == bool(stopped_by)
    assert len(commits) == (not stopped_by)


def test_a_last_job_that_cannot_be_submitted_costs_no_checkpoint(busy, monkeypatch):
    run, told, directory = busy
    run.jobs.unwritten = frozenset({('actor', 0)})
    run.jobs.submit_unwritten = Mock(side_effect=OSError(28, 'No space left on device'))
    monkeypatch.setattr(Monitor, 'frames', run.config.run.max_frames)
    assert run.run() == 'max_frames'
    assert 'No space left on device' in told.getvalue()
    assert len(directory.latest_checkpoints()) == 1


@pytest.mark.parametrize('restarts', [{}, {'actor': 1}])
def test_dropped_records_are_named_where_workers_were_started_again(busy, monkeypatch, restarts):
    run, shown, _ = busy
    monkeypatch.setattr(ledger, 'MAX_BYTES', 1)
    for segment in range(3):
        run.client.finish_segment('actor', 0, 0, segment, 'record')
    run.jobs.restarts = restarts
    monkeypatch.setattr(Monitor, 'frames', run.config.run.max_frames)
    assert run.run() == 'max_frames'
    dropped = 'statistics/: the parameter server dropped 3 records of segments (beyond 16 MB)'
    assert (dropped in shown.getvalue()) == bool(restarts)


def test_rows_that_could_not_be_written_are_named_at_the_end(busy, monkeypatch):
    run, shown, directory = busy
    unwritten = {'actor-003': 32, 'reasons': ['No space left on device']}
    write_json(directory.logs / 'actor-0.metrics.json', {'unwritten_rows': unwritten})
    monkeypatch.setattr(Monitor, 'frames', run.config.run.max_frames)
    assert run.run() == 'max_frames'
    missing = 'statistics/: rows are not written: 32 of actor-003 (No space left on device)'
    assert shown.getvalue().count(missing) == 1


def test_a_save_that_fails_as_nobody_foresaw_is_one_line(training, monkeypatch):
    run, told, _ = training
    monkeypatch.setattr(ParameterClient, 'save', Mock(side_effect=KeyError('files')))
    assert not saves(run.saver)
    assert "checkpoint: not written (unexpected KeyError: 'files')" in told.getvalue()


def test_a_users_signal_hides_no_failure():
    lost = f'failed: {LastCheckpointError("the last 8 frames could not be saved")}'
    assert exit_reason('max_frames', '') == 'max_frames'
    assert exit_reason('max_frames', 'SIGINT') == 'SIGINT'  # while it was evaluated
    assert exit_reason(lost, 'SIGINT') == f'SIGINT; {lost}'


def test_a_resumed_run_trains_when_its_clock_moves_and_not_before(training):
    run, told, _ = training
    needed = run.config.replay.min_replay_size

    def look(updates, agent_steps, held):
        shard = {'version': updates, 'agent_steps': agent_steps, 'reruns': {}, 'rollbacks': 0}
        shard |= {'rejected': {}, 'dropped_records': 0}
        run.client.report = lambda *_: {'shards': [shard]}
        run.replay.status.read = lambda: [{'size': held, 'inserts': held, 'samples': 0}]
        run.look()
        return told.getvalue()

    run.display.phase('starting workers')
    assert 'training' not in look(700, 90_000, 0)
    assert 'training' not in look(700, 90_000, needed)
    # Rows arrive before the actors report their steps.
    assert f'filling replay 40/{needed}' in look(700, 90_000, 40)
    assert 'training' not in look(700, 99_000, needed)
    assert '] training' in look(701, 99_000, needed)


def test_a_warning_from_the_figures_is_shown_once(training):
    run, output, _ = training
    shard = {'version': 1_000, 'agent_steps': 4_000, 'reruns': {}, 'rollbacks': 0}
    shard |= {'rejected': {}, 'dropped_records': 0}
    run.client.report = lambda *_: {'shards': [shard]}
    event = {'kind': 'learner', 'component': 'learner', 'worker': 0, 'rejected_outlier': 7}
    run.reader.drain = lambda timeout_seconds: [event]
    run.look()
    run.look()
    assert output.getvalue().count('outliers: 100.00% of the gradients are dropped') == 1


def test_a_bundle_that_starts_late_does_not_shift_the_others_counts(training):
    run, _, _ = training
    run.replay = Replay((), run.replay.status)

    def tell(worker, inserts):
        status = {'size': inserts, 'inserts': inserts, 'samples': 0}
        event = {'kind': 'actor', 'component': 'bundle', 'worker': worker, 'replay': status}
        run.reader.drain = lambda timeout_seconds: [event]
        run.look()

    tell(1, 100)
    tell(0, 40)  # was taken for bundle 1's place before
    tell(1, 120)
    run.look()
    assert run.monitor.counters()['inserts'] == 40 + 120
