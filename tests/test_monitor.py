"""The monitor: what telemetry and counters add up to, also late, repeated, malformed or resumed."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from pipelines import records, tallies
from pipelines.monitor import Heartbeat, Monitor, MonitorConfig
from pipelines.run_directory import RunDirectory

CONFIG = MonitorConfig(game='pong', preset='laptop', seed=7, max_frames=4000)
EVALUATION = {'protocol': 'no-op starts', 'episodes': 30, 'epsilon': 0.05, 'mean': 15.0, 'std': 2.0}


class FakeClock:
    """Seconds that pass only when told to; starts anywhere but at zero."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def directory(tmp_path):
    with RunDirectory.open(tmp_path / 'run') as directory:
        directory.config_file.write_text('{}')
        yield directory


@pytest.fixture
def make_monitor(directory, clock):
    """Makes monitors on the same directory, closing each before the next as a resume does."""
    opened = []

    def make(resumed_from=None):
        close()
        opened.append(Monitor(directory, CONFIG, resumed_from, clock, clock))
        return opened[-1]

    def close():
        while opened:
            opened.pop().close()

    yield make
    close()


@pytest.fixture
def monitor(make_monitor):
    return make_monitor()


def event(kind, worker=0, session='s', **fields):
    component = 'learner' if kind == 'learner' else 'actor'
    return {'kind': kind, 'component': component, 'worker': worker, 'session': session, **fields}


def episode(raw_return, time, worker=0, agent_steps=100, **fields):
    return event(
        'episode',
        worker,
        time=time,
        raw_return=raw_return,
        clipped_return=max(-1.0, min(1.0, raw_return)),
        agent_steps=agent_steps,
        **fields,
    )


class TestState:
    def test_nothing_is_known_at_the_start(self, monitor):
        state = monitor.state()
        assert (state.frames, state.updates, state.episodes) == (0, 0, 0)
        assert state.mean_return_100 is None
        assert state.eta_seconds is None
        assert state.rejected == {'stale': 0, 'outlier': 0, 'invalid': 0}

    def test_frames_are_agent_steps_times_the_action_repeat(self, monitor):
        monitor.clock(updates=5, agent_steps=30)
        assert monitor.state().frames == 120

    def test_rates_are_over_the_recent_window_and_give_the_eta(self, monitor, clock):
        monitor.clock(0, 0)
        clock.now += 100
        monitor.clock(10, 100)
        clock.now += 60
        monitor.clock(40, 400)
        state = monitor.state()
        # Of the last 60 s: (400 - 100) agent steps * 4 / 60 s = 20 frames/s; 30 updates / 60 s.
        assert state.frames_per_second == pytest.approx(20.0)
        assert state.updates_per_second == pytest.approx(0.5)
        # (4000 - 1600) frames / 20 per second.
        assert state.eta_seconds == pytest.approx(120.0)

    def test_the_eta_of_a_finished_run_is_zero(self, monitor):
        monitor.clock(10, 1000)
        assert monitor.state().eta_seconds == 0.0

    def test_rates_hold_a_bounded_number_of_samples(self, clock):
        rates = tallies.Rates(window_seconds=60.0)
        for step in range(100_000):  # 1000 s, looked at every 10 ms
            rates.see(clock.now + step * 0.01, step, step)
        # One each half second less one look (0.49 s) in the window of 60 s, and the ends.
        assert len(rates._samples) <= 60 / 0.49 + 3
        # 100 steps/s, to within the one sample each half second.
        assert rates.rates()[0] == pytest.approx(100.0)

    def test_a_clock_that_goes_back_gives_no_negative_rate(self, monitor, clock):
        monitor.clock(10, 100)
        clock.now += 10
        monitor.clock(5, 50)  # a shard restarted from an older checkpoint
        assert monitor.state().frames_per_second == 0.0
        assert monitor.state().eta_seconds is None

    def test_mean_return_is_of_the_last_hundred(self, monitor):
        monitor.fold(episode(-21.0, time) for time in range(50))
        monitor.fold(episode(float(time), time) for time in range(100, 200))
        state = monitor.state()
        # Mean of 100 .. 199.
        assert state.mean_return_100 == pytest.approx(149.5)
        assert state.last_return == 199.0
        assert state.episodes == 150

    def test_epsilon_is_the_mean_of_each_actors_latest(self, monitor):
        monitor.fold([event('actor', worker, epsilon=0.9) for worker in (0, 1)])
        monitor.fold([event('actor', 1, epsilon=0.5)])
        assert monitor.state().epsilon == pytest.approx(0.7)

    def test_a_late_event_of_a_predecessor_does_not_hide_its_successor(self, monitor):
        monitor.fold(
            [event('heartbeat', time=20.0, pid=222), event('heartbeat', time=10.0, pid=111)]
        )
        assert monitor.heartbeats() == {('actor', 0): Heartbeat(20.0, 222)}

    @pytest.mark.parametrize('pid', [0, -1, None, 'x', math.nan])
    def test_a_heartbeat_without_a_true_pid_names_no_process_to_kill(self, monitor, pid):
        monitor.fold([event('heartbeat', time=20.0, pid=pid)])
        assert monitor.heartbeats() == {}

    def test_learner_figures_are_means_over_the_period(self, monitor, clock):
        for loss in (1.0, 3.0):
            monitor.fold([event('learner', loss=loss, updates=9, mean_absolute_error=2.0)])
        clock.now += CONFIG.scalars_period_seconds
        monitor.tick()
        assert monitor.state().learner == {'loss': 2.0, 'mean_absolute_error': 2.0}


class TestCounters:
    def test_a_gradient_stale_at_several_shards_counts_once(self, monitor):
        monitor.parameter_server(
            [{'rejected': {'stale': 3, 'invalid': 1}}, {'rejected': {'stale': 2, 'invalid': 1}}]
        )
        assert monitor.state().rejected == {'stale': 3, 'outlier': 0, 'invalid': 1}

    def test_a_restarted_shards_counters_go_on_from_where_they_were(self, monitor):
        for stale in (5, 1, 4):  # 5, then restored at 1, then three more
            monitor.parameter_server([{'rejected': {'stale': stale}}])
        assert monitor.state().rejected['stale'] == 8

    def test_outliers_add_up_over_learners_and_sessions_whatever_the_order(self, monitor):
        for worker, session, number in [
            (0, 'a', 2),
            (1, 'b', 5),
            (0, 'a', 4),
            (0, 'a', 3),  # late
            (0, 'a', 4),  # repeated
            (0, 'c', 1),  # learner 0 restarted
        ]:
            monitor.fold([event('learner', worker, session, rejected_outlier=number)])
        # 4 + 5 + 1.
        assert monitor.state().rejected['outlier'] == 10

    def test_samples_per_insert_is_over_all_shards(self, monitor):
        monitor.replay(
            [
                {'size': 100, 'samples': 800, 'inserts': 100},
                {'size': 50, 'samples': 100, 'inserts': 50},
            ]
        )
        assert monitor.state().replay_size == 150
        assert monitor.state().samples_per_insert == pytest.approx(900 / 150)

    def test_restarts_are_kept_by_component(self, monitor):
        for component in ('actor', 'replay', 'actor'):
            monitor.restarted(component)
        assert monitor.state().restarts == {'actor': 2, 'replay': 1}

    def test_a_replay_shard_that_does_not_answer_keeps_its_last_status(self, monitor):
        monitor.replay([{}, {}])
        assert monitor.state().replay_size is None
        monitor.replay([{'size': 5, 'samples': 8, 'inserts': 4}, {'size': 7}])
        monitor.replay([{}, {'size': 8}])
        assert monitor.state().replay_size == 13
        assert monitor.state().samples_per_insert == 2.0


class TestBadEvents:
    @pytest.mark.parametrize(
        'bad',
        [
            None,
            'text',
            [],
            {},
            {'kind': 'episode'},
            {'kind': ['episode'], 'component': 'actor', 'worker': 0},
            event('unknown'),
            event('episode'),
            event('episode', raw_return=math.nan),
            event('episode', raw_return='21'),
            event('episode', worker='x', raw_return=1.0),
            event('actor', epsilon=math.inf),
            event('learner', rejected_outlier=-1),
        ],
        ids=repr,
    )
    def test_a_malformed_event_is_counted_and_left_out(self, monitor, bad):
        monitor.fold([bad, episode(3.0, 1.0)])
        state = monitor.state()
        assert state.malformed_events == 1
        assert state.episodes == 1
        assert state.epsilon is None

    def test_a_repeated_episode_counts_once(self, monitor):
        first, second = episode(-21.0, 1.5), episode(-21.0, 1.6)
        monitor.fold([first, second, first])
        assert monitor.state().episodes == 2
        assert monitor.state().repeated_events == 1

    def test_numpy_numbers_are_numbers(self, monitor):
        monitor.fold([episode(np.float32(-20.0), np.float64(1.0), agent_steps=np.int64(7))])
        assert monitor.state().mean_return_100 == -20.0

    def test_memory_for_repeats_is_bounded(self, monitor, monkeypatch):
        monkeypatch.setattr(records, 'REMEMBERED_EPISODES', 20)
        monitor.fold(episode(0.0, time) for time in range(50))
        assert len(monitor._seen_episodes) == 20
        monitor.fold([episode(0.0, 49), episode(0.0, 30)])
        assert monitor.state().repeated_events == 2


class TestEpisodeFile:
    def test_a_line_says_when_in_the_run_the_episode_ended(self, monitor, directory):
        monitor.clock(updates=3, agent_steps=10)
        monitor.fold([episode(-20.0, 5.25, worker=2, agent_steps=900, epsilon=0.25)])
        assert json.loads(directory.episodes_file.read_text()) == {
            'episode': 1,
            'time': 5.25,
            'frames': 40,
            'updates': 3,
            'raw_return': -20.0,
            'clipped_return': -1.0,
            'agent_steps': 900,
            'worker': 2,
            'epsilon': 0.25,
        }

    def test_torn_and_foreign_lines_are_skipped_at_resume(self, make_monitor, directory):
        make_monitor().fold([episode(1.0, 1), episode(2.0, 2)])
        with directory.episodes_file.open('a') as file:
            file.write('[1]\n{"episode": null}\n\n{"episode": 3, "fra')
        monitor = make_monitor(resumed_from={'agent_steps': 0})
        monitor.fold([episode(3.0, 3)])
        rows = list(records.read_episodes(directory.episodes_file))
        assert [(row.episode, row.raw_return) for row in rows] == [(1, 1.0), (2, 2.0), (3, 3.0)]
        assert len(directory.episodes_file.read_text().splitlines()) == 3

    def test_episodes_after_the_checkpoint_are_dropped_at_resume(self, make_monitor, directory):
        monitor = make_monitor()
        monitor.clock(1, 10)
        monitor.fold([episode(1.0, 1)])
        checkpoint = monitor.counters()
        monitor.clock(2, 20)
        monitor.fold([episode(2.0, 2)])
        assert make_monitor(resumed_from=checkpoint).state().mean_return_100 == 1.0
        assert [row.raw_return for row in records.read_episodes(directory.episodes_file)] == [1.0]


class TestResume:
    def test_totals_go_on_where_the_checkpoint_was(self, make_monitor, clock):
        monitor = make_monitor()
        monitor.clock(50, 200)
        monitor.fold([episode(-20.0, 1), event('learner', rejected_outlier=2)])
        monitor.parameter_server([{'rejected': {'stale': 3, 'invalid': 0}}])
        monitor.replay([{'size': 10, 'samples': 80, 'inserts': 10}])
        monitor.restarted('actor')
        clock.now += 100
        checkpoint = json.loads(json.dumps(monitor.counters()))

        monitor = make_monitor(resumed_from=checkpoint)
        clock.now += 20
        # The servers restored their own counters (80, 10); new growth is 8 samples, 2 inserts.
        monitor.replay([{'size': 10, 'samples': 80, 'inserts': 10}])
        monitor.replay([{'size': 12, 'samples': 88, 'inserts': 12}])
        monitor.parameter_server([{'rejected': {'stale': 0, 'invalid': 0}}])  # not restored
        monitor.parameter_server([{'rejected': {'stale': 1, 'invalid': 0}}])
        monitor.fold([event('learner', session='new', rejected_outlier=1), episode(-18.0, 2)])
        monitor.restarted('actor')
        monitor.restarted('learner')
        state = monitor.state()
        assert (state.updates, state.frames) == (50, 800)
        assert state.wall_seconds == pytest.approx(120.0)
        assert state.rejected == {'stale': 4, 'outlier': 3, 'invalid': 0}
        assert state.samples_per_insert == pytest.approx(88 / 12)
        assert state.restarts == {'actor': 2, 'learner': 1}
        assert (state.episodes, state.mean_return_100) == (2, -19.0)

    def test_telemetry_restored_with_the_replay_does_not_count_again(self, make_monitor):
        told = episode(-20.0, 1.123456789)
        monitor = make_monitor()
        monitor.fold([told])
        monitor = make_monitor(resumed_from=monitor.counters())
        monitor.fold([told, episode(-19.0, 2.0)])
        assert monitor.state().episodes == 2

    @pytest.mark.parametrize('before', [{}, {'wall_seconds': 'x', 'rejected': 3, 'updates': None}])
    def test_unreadable_counters_start_from_nothing(self, make_monitor, before):
        state = make_monitor(resumed_from=before).state()
        assert (state.updates, state.wall_seconds) == (0, 0.0)


class TestSummary:
    def test_summary_has_the_contracts_keys_and_true_numbers(self, monitor, clock):
        monitor.clock(100, 500)
        monitor.fold([episode(-20.0, 1), episode(-10.0, 2)])
        monitor.replay([{'size': 400, 'samples': 3200, 'inserts': 400}])
        monitor.parameter_server([{'rejected': {'stale': 1, 'invalid': 0}}])
        monitor.restarted('actor')
        clock.now += 50
        monitor.end_training()
        clock.now += 1000  # the evaluation
        extra = {**EVALUATION, 'returns': [1.0]}
        assert monitor.summary('max_frames', extra) == {
            'game': 'pong',
            'preset': 'laptop',
            'seed': 7,
            'frames': 2000,
            'agent_steps': 500,
            'updates': 100,
            'episodes': 2,
            'mean_return_100': -15.0,
            'evaluation': EVALUATION,
            'wall_seconds': 50.0,
            'frames_per_second': 40.0,  # 2000 / 50
            'updates_per_second': 2.0,
            'samples_per_insert': 8.0,
            'rejected': {'stale': 1, 'outlier': 0, 'invalid': 0},
            'restarts': {'actor': 1},
            'exit_reason': 'max_frames',
        }

    @pytest.mark.parametrize('evaluation', [None, EVALUATION, {**EVALUATION, 'mean': None}])
    def test_summary_and_learning_curve_are_written_even_of_an_empty_run(
        self, monitor, directory, evaluation
    ):
        summary = monitor.write_summary('SIGINT', evaluation)
        assert json.loads(directory.summary_file.read_text()) == summary
        assert directory.learning_curve_file.read_bytes().startswith(b'\x89PNG')

    def test_the_running_mean_equals_a_plain_one(self):
        values = np.random.default_rng(0).normal(size=250)
        plain = [np.mean(values[max(0, end - 100) : end]) for end in range(1, 251)]
        np.testing.assert_allclose(records.running_mean(values.tolist()), plain, atol=1e-12)


def read_events(directory):
    """Every event of the directory's files, by TensorBoard's own reader (checks the CRCs)."""
    from tensorboard.compat.proto import event_pb2
    from tensorboard.compat.tensorflow_stub import errors, pywrap_tensorflow

    events = []
    for path in sorted(directory.iterdir()):
        reader = pywrap_tensorflow.PyRecordReader_New(str(path))
        while True:
            try:
                reader.GetNext()
            except errors.OutOfRangeError:
                break
            events.append(event_pb2.Event.FromString(reader.record()))
    return events


class TestScalars:
    def test_scalars_are_written_each_period_over_frames(self, monitor, directory, clock):
        monitor.clock(10, 100)
        monitor.fold([episode(-20.0, 1), event('actor', epsilon=0.5)])
        monitor.tick()  # not due yet
        clock.now += CONFIG.scalars_period_seconds
        monitor.tick()
        events = read_events(directory.events)
        assert events[0].file_version == 'brain.Event:2'
        values = {
            value.tag: (event.step, value.simple_value)
            for event in events
            for value in event.summary.value
        }
        assert values['return/episode'] == (400, -20.0)
        assert values['return/mean_100'] == (400, -20.0)
        assert values['actor/epsilon'] == (400, 0.5)
        assert values['progress/updates'] == (400, 10.0)
        assert 'replay/size' not in values  # not known yet

    def test_a_resumed_run_tells_tensorboard_where_it_starts_again(self, make_monitor, directory):
        make_monitor()
        make_monitor(resumed_from={'agent_steps': 25})
        starts = [e.step for e in read_events(directory.events) if e.HasField('session_log')]
        assert starts == [0, 100]

    def test_tensorflow_is_not_imported(self, tmp_path):
        program = (
            'import sys\n'
            'from pipelines import display, monitor, run_directory\n'
            'heavy = ("tensorflow", "matplotlib", "rich", "apache_beam", "tensorboard")\n'
            'assert not set(heavy) & set(sys.modules), "at import"\n'
            'config = monitor.MonitorConfig("pong", "laptop", 1, 100)\n'
            'with run_directory.RunDirectory.open(sys.argv[1]) as directory:\n'
            '    with monitor.Monitor(directory, config) as it:\n'
            '        it.write_summary("max_frames")\n'
            'assert "tensorflow" not in sys.modules, "while writing"\n'
        )
        subprocess.run(
            [sys.executable, '-c', program, str(tmp_path / 'run')], check=True, timeout=120
        )
