"""The monitor: what telemetry and counters add up to, also late, repeated, malformed or resumed."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from tensorboard.util import tensor_util

from agents.config import STALENESS_BOUNDS
from pipelines.monitoring import boxes, counters, episodes, tensorboard
from pipelines.monitoring.monitor import Monitor
from pipelines.monitoring.run_state import MonitorConfig

CONFIG = MonitorConfig(game='pong', preset='laptop', seed=7, max_frames=4000)
BINS = [60, 35, 0, 0, 0, 1, *[0] * 7]
STALENESS = {
    'median': 0,
    'percentile_99': 10,  # 95 of 96 are 0 or 1: less than 99 %
    'histogram': {
        '0': 60,
        '1': 35,
        '2': 0,
        '3': 0,
        '5': 0,
        '10': 1,
        '20': 0,
        '50': 0,
        '100': 0,
        '200': 0,
        '500': 0,
        '1000': 0,
        'above 1000': 0,
    },
}
EVALUATION = {
    'protocol': 'noop',
    'deviations': {'epsilon': 0.1},
    'epsilon': 0.1,
    'max_frames': 18_000,
    'episodes': 30,
    'failed': 0,
    'mean': 15.0,
    'std': 2.0,
    'standard_error': 0.4,
}


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
        rates = counters.Rates(window_seconds=60.0)
        for step in range(100_000):  # 1000 s, looked at every 10 ms
            rates.record(clock.now + step * 0.01, step, step)
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

    def test_epsilon_leaves_out_an_actor_that_has_died(self, monitor, clock):
        monitor.fold([event('actor', 0, epsilon=0.9)])
        clock.now += 31.0
        monitor.fold([event('actor', 1, epsilon=0.1)])
        assert monitor.state().epsilon == 0.1
        clock.now += 3600.0  # all are silent: the last figures
        assert monitor.state().epsilon == 0.1

    def test_learner_figures_are_means_over_the_period(self, monitor, clock):
        for loss in (1.0, 3.0):
            monitor.fold([event('learner', loss=loss, updates=9, mean_absolute_error=2.0)])
        clock.now += CONFIG.scalars_period_seconds
        monitor.tick()
        assert monitor.state().learner == {'loss': 2.0, 'mean_absolute_error': 2.0}

    def test_the_summary_keeps_the_learners_last_figures_and_tensorboard_repeats_none(
        self, monitor, directory, clock
    ):
        monitor.fold([event('learner', mean_q=1.5)])
        for _ in range(2):
            monitor.clock(1, 10)
            clock.now += CONFIG.scalars_period_seconds
            monitor.tick()
        assert monitor.summary('max_frames')['learner'] == {'mean_q': 1.5}
        assert shown_by_tensorboard(directory.events)['learner/mean_q'] == [(40, 1.5)]

    def test_length_is_the_mean_of_the_last_hundred_games_also_after_a_resume(
        self, make_monitor, directory
    ):
        monitor = make_monitor()
        monitor.fold(episode(0.0, time, agent_steps=1000) for time in range(50))
        monitor.fold(episode(0.0, time, agent_steps=time) for time in range(100, 200))
        # Mean of 100 .. 199.
        assert monitor.state().mean_length_100 == pytest.approx(149.5)
        assert make_monitor(monitor.counters()).state().mean_length_100 == pytest.approx(149.5)
        monitor = make_monitor()
        monitor.fold([episode(0.0, 1, agent_steps=7)])
        monitor.tick()
        monitor.close()
        assert shown_by_tensorboard(directory.events)['episode/length'] == [(1, 7.0)]


class TestBoxes:
    def test_rates_are_of_each_box_and_survive_its_restart(self, monitor, clock):
        for steps, gradients, version, inserts in [
            (0, 5, 100, 7),
            (400, 25, 150, 207),
            (8, 3, 0, 0),
        ]:
            monitor.fold([event('actor', 1, agent_steps=steps)])
            monitor.fold([event('learner', 2, gradients=gradients)])
            monitor.parameter_server([{'version': version, 'rejected': {'stale': version}}])
            monitor.replay([{}, {'inserts': inserts}])
            clock.now += 10
        state = monitor.state()
        # From the first reading to the last, 20 s; a fall is a restart and no growth. The shard
        # received the 50 gradients that it applied and the 50 that it rejected.
        rates = {'actor_1': 20.0, 'learner_2': 1.0, 'parameter_server_0': 5.0, 'replay_1': 10.0}
        assert state.rates == state.recent_rates == rates

    def test_two_counts_of_a_box_in_one_batch_of_events_make_no_rate(self):
        rates = boxes.BoxRates(window_seconds=60.0)
        rates.record(100.0, 'learner_0', 1)
        rates.record(100.000003, 'learner_0', 2)  # 340,000 a second between them
        assert (rates.recent(100.000003), rates.means()) == ({}, {})
        rates.record(101.0, 'learner_0', 4)
        assert rates.recent(101.0) == {'learner_0': 2.0}  # from 2 to 4 in a second
        assert rates.means() == {'learner_0': 3.0}  # from 1

    def test_recent_rates_leave_out_a_box_that_is_silent(self, monitor, clock):
        for steps in (0, 100):
            monitor.fold([event('actor', agent_steps=steps)])
            clock.now += 10
        clock.now += CONFIG.rate_window_seconds
        assert monitor.state().recent_rates == {}
        assert monitor.state().rates == {'actor_0': 10.0}

    def test_memory_is_of_every_process_that_runs(self, monitor):
        beat = {'pid': 3, 'time': 1.0, 'memory_bytes': 5_000_000}
        monitor.fold([event('heartbeat', 1, **beat)])
        monitor.memory({'replay_0': 7, 'parameter_server_0': None})
        monitor.write_summary('max_frames')
        memory = monitor.state().memory_bytes
        assert memory.pop('launcher') > 1_000_000  # Python alone
        assert memory == {'actor_1': 5_000_000, 'replay_0': 7}

    def test_the_table_of_learners_is_of_the_whole_run(self, make_monitor):
        monitor = make_monitor()
        for worker, session, first in [(0, 'a', 3), (0, 'b', 2), (1, 'c', 4)]:
            bins = [first, *[0] * 11, 0]
            figures = {'gradients': first + 1, 'rejected_outlier': 1, 'staleness': bins}
            monitor.fold([event('learner', worker, session, **figures)] * 2)
        monitor.fold([event('learner', 0, 'e', precision='bfloat16')])
        monitor = make_monitor(json.loads(json.dumps(monitor.counters())))
        assert monitor.state().learners['learner_0']['precision'] == 'bfloat16'
        monitor.fold([event('learner', 1, 'd', gradients=9, staleness=[0] * 5 + [9] + [0] * 7)])
        table = monitor.state().learners
        assert {name: (row['gradients'], row['outliers']) for name, row in table.items()} == {
            'learner_0': (7, 2),  # 4 + 3
            'learner_1': (14, 1),  # 5 + 9
        }
        # Learner 1: four of staleness 0, nine of at most 10.
        assert table['learner_1']['staleness']['median'] == 10
        assert monitor.state().scalars()['staleness/learner_0/median'] == 0

    def test_the_table_of_learners_keeps_the_last_precision_that_is_one(self, monitor):
        for precision in ('bfloat16', ['float32'], 'float8'):
            monitor.fold([event('learner', 0, precision=precision), event('learner', 1)])
        table = monitor.state().learners
        assert [table[f'learner_{i}']['precision'] for i in (0, 1)] == ['bfloat16', None]

    def test_the_number_of_boxes_is_bounded(self, monitor):
        for worker in range(5000):
            monitor.fold([event('learner', worker, gradients=1), event('heartbeat', worker, pid=1)])
        assert len(monitor.state().learners) == 4096


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

    def test_the_share_of_outliers_counts_the_updates_of_an_earlier_version(self, make_monitor):
        # Its checkpoints hold no staleness: 500 dropped beside 100,000 applied, and ten more.
        monitor = make_monitor(
            {'agent_steps': 400_000, 'updates': 100_000, 'rejected': {'outlier': 500}}
        )
        bins = [10] + [0] * len(STALENESS_BOUNDS)
        monitor.fold([event('learner', time=1.0, session='a', rejected_outlier=0, staleness=bins)])
        assert monitor.state().outlier_share == pytest.approx(500 / 100_510)

    def test_staleness_is_summed_over_sessions_and_resumptions(self, make_monitor):
        monitor = make_monitor()
        for session, first, last in [('a', 3, 1), ('a', 3, 1), ('a', 9, 1), ('b', 2, 0)]:
            bins = [first, *[0] * 11, last]
            monitor.fold([event('learner', session=session, staleness=bins)])
        # 9 + 2 of staleness 0, one above 1000: the median is 0, the last of 12 has no bound.
        assert monitor.state().staleness['histogram'] == {
            **dict.fromkeys(map(str, STALENESS_BOUNDS), 0), '0': 11, 'above 1000': 1,
        }  # fmt: skip
        resumed = make_monitor(resumed_from=monitor.counters())
        resumed.fold([event('learner', session='c', staleness=[8, *[0] * 12])])
        assert resumed.state().staleness['histogram']['0'] == 19
        assert resumed.state().staleness['median'] == 0
        assert resumed.state().staleness['percentile_99'] is None

    def test_samples_per_insert_is_over_all_shards(self, monitor):
        monitor.replay(
            [
                {'size': 100, 'samples': 800, 'inserts': 100},
                {'size': 50, 'samples': 100, 'inserts': 50},
            ]
        )
        assert monitor.state().replay_size == 150
        assert monitor.state().samples_per_insert == pytest.approx(900 / 150)

    def test_transitions_drawn_and_learned_from_are_two_figures(self, monitor):
        # Of 113 batches of 32 drawn, 100 were learned from: 12 were dropped, one lies ready.
        monitor.clock(100, 400)
        monitor.replay([{'size': 400, 'samples': 113 * 32, 'inserts': 400}])
        assert monitor.state().samples_per_insert == pytest.approx(9.04)
        assert monitor.state().learned_per_insert == pytest.approx(8.0)

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
            {'kind': 'actor', 'component': 'bundle', 'replay': {}},
            {'kind': 'actor', 'component': 'bundle', 'worker': 0, 'replay': [3]},
            event('heartbeat', worker=2**70, time=1.0, pid=1),
            event('heartbeat', time=1.0, pid=2**70),
            event('learner', **{'loss\ud800': 1.0}),
            event('learner', session='\ud800'),
            event('learner', **{str(number): 1.0 for number in range(100)}),
            event('actor', session='x' * 1_000),
            event('episode', raw_return=1e300),
            event('episode', raw_return=10**400),
        ],
        ids=repr,
    )
    def test_a_malformed_event_is_counted_and_left_out(self, monitor, bad):
        monitor.fold([bad, episode(3.0, 1.0)])
        state = monitor.state()
        assert state.malformed_events == 1
        assert state.episodes == 1
        assert state.epsilon is None

    def test_figures_of_any_size_can_be_written(self, monitor, clock):
        figures = {'loss': 3.4e38, 'other': math.inf, 'nested': [[[]]], 'text': '\ud800'}
        monitor.fold([event('learner', time=1.0, **figures)] * 3)
        monitor.fold([episode(3.4e38, float(time)) for time in range(3)])
        clock.now += CONFIG.scalars_period_seconds
        monitor.tick()
        assert monitor.write_summary('max_frames')['mean_return_100'] == pytest.approx(3.4e38)

    @pytest.mark.parametrize('number', [2**62, 10**20, 10**400, math.inf])
    def test_no_count_is_too_large_for_the_records(self, monitor, clock, number):
        names = ('run_agent_steps', 'run_updates', 'agent_steps')
        monitor.fold([episode(1.0, time, **{name: number}) for time, name in enumerate(names)])
        monitor.fold([episode(2.0, 9.0, run_agent_steps=7)])
        monitor.fold([event('learner', time=1.0, rejected_outlier=number, staleness=[number] * 13)])
        clock.now += CONFIG.scalars_period_seconds
        monitor.tick()
        assert monitor.write_summary('max_frames')['episodes'] == 4

    def test_sums_over_sessions_stay_within_what_records_take(self, monitor):
        for session in ('a', 'b', 'c'):
            figures = {'rejected_outlier': 2**53, 'staleness': [2**53] * 13}
            monitor.fold([event('learner', session=session, **figures)])
        assert monitor.state().rejected['outlier'] == 2**53
        assert monitor.counters()['staleness'] == [2**53] * 13

    def test_an_event_that_fails_as_nobody_foresaw_costs_no_other(self, monitor, monkeypatch):
        def fail(*_):
            raise ValueError('unforeseen')

        with monkeypatch.context() as patched:
            patched.setattr(tensorboard.EventWriter, 'write', fail)
            taken = monitor.fold([episode(1.0, 1.0), event('actor', epsilon=0.5)])
        assert len(taken) == 2
        assert monitor.state().epsilon == 0.5
        assert monitor.state().malformed_events == 1

    def test_only_events_of_workers_are_handed_on(self, monitor):
        good = event('heartbeat', time=1.0, pid=2)
        assert monitor.fold([None, good, {'kind': 'actor'}]) == [good]

    def test_a_full_disk_does_not_raise_again_at_the_close(self, monitor):
        files = [pathlib.Path('/dev/full').open(mode) for mode in ('a', 'ab')]  # noqa: SIM115
        records_of_run = (monitor._episodes, monitor._events)
        for record, file, text in zip(records_of_run, files, ('x', b'x')):
            record.close()
            record._file = file
            file.write(text)  # in the buffer: the close writes it, and finds no room
        monitor.close()
        assert all(file.closed for file in files)

    def test_a_repeated_episode_counts_once(self, monitor):
        first, second = episode(-21.0, 1.5), episode(-21.0, 1.6)
        monitor.fold([first, second, first])
        assert monitor.state().episodes == 2
        assert monitor.state().repeated_events == 1

    def test_numpy_numbers_are_numbers(self, monitor):
        monitor.fold([episode(np.float32(-20.0), np.float64(1.0), agent_steps=np.int64(7))])
        assert monitor.state().mean_return_100 == -20.0

    def test_memory_for_repeats_is_bounded(self, monitor, monkeypatch):
        monkeypatch.setattr(episodes, 'REMEMBERED_EPISODES', 20)
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

    def test_an_episode_has_the_frames_at_which_it_ended_not_those_of_the_last_reading(
        self, monitor, directory
    ):
        monitor.clock(updates=3, agent_steps=10)
        monitor.fold(
            [
                episode(-20.0, 1, run_agent_steps=1000, run_updates=90),
                episode(-19.0, 2, run_agent_steps=995, run_updates=80, worker=1),
                episode(-18.0, 3, run_agent_steps=-1, run_updates='x'),  # malformed: the reading's
            ]
        )
        rows = list(episodes.read_episodes(directory.episodes_file))
        assert [(row.frames, row.updates) for row in rows] == [(4000, 90), (3980, 80), (40, 3)]

    def test_torn_and_foreign_lines_are_skipped_at_resume(self, make_monitor, directory):
        make_monitor().fold([episode(1.0, 1), episode(2.0, 2)])
        with directory.episodes_file.open('a') as file:
            file.write('[1]\n{"episode": null}\n\n{"episode": 3, "fra')
        monitor = make_monitor(resumed_from={'agent_steps': 0})
        monitor.fold([episode(3.0, 3)])
        rows = list(episodes.read_episodes(directory.episodes_file))
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
        assert [row.raw_return for row in episodes.read_episodes(directory.episodes_file)] == [1.0]


def evaluation(frames, mean, best):
    """A line of `evaluations.jsonl`."""
    row = {'time': 1_000.0 + frames, 'frames': frames, 'updates': frames // 4, 'wall_seconds': 1.0}
    return row | {'episodes': 5, 'mean': mean, 'std': 1.5, 'best': best}


def append(directory, *rows):
    with directory.evaluations_file.open('a') as file:
        file.write(''.join(row if isinstance(row, str) else json.dumps(row) + '\n' for row in rows))


class TestEvaluations:
    def test_are_read_as_they_are_appended(self, monitor, directory, clock):
        monitor.evaluator(0.0)  # there is no file yet
        append(
            directory,
            evaluation(400, 3.0, True),
            '{"cut"\n',
            json.dumps(evaluation(800, 2.0, False)),
        )
        monitor.evaluator(0.0)
        assert monitor.state().evaluations['number'] == 1  # the last line is incomplete
        append(directory, '\n')
        clock.now += 100
        monitor.evaluator(3.0)
        told = monitor.state().evaluations
        assert told['last'] == {
            'updates': 200,
            'frames': 800,
            'episodes': 5,
            'mean': 2.0,
            'std': 1.5,
        }
        assert (told['number'], told['best']['mean'], monitor.evaluations.updates) == (2, 3.0, 200)
        # 3 CPU seconds in 100 s of one core.
        assert (told['cpu_seconds'], told['cpu_share']) == (3.0, 0.03)
        monitor.close()
        shown = shown_by_tensorboard(directory.events)
        assert shown['return/evaluator'] == [(400, 3.0), (800, 2.0)]
        assert shown['return/evaluator_std'] == [(400, 1.5), (800, 1.5)]

    def test_after_the_checkpoint_are_dropped_by_a_resume_but_the_best_stays(
        self, make_monitor, directory
    ):
        monitor = make_monitor()
        append(directory, evaluation(400, 3.0, True), evaluation(800, 4.0, True))
        directory.best.mkdir()
        (directory.best / 'evaluation.json').write_text(json.dumps(evaluation(800, 4.0, True)))
        monitor.evaluator(2.0)
        checkpoint = {**monitor.counters(), 'agent_steps': 150}  # 600 frames
        monitor = make_monitor(resumed_from=checkpoint)
        told = monitor.state().evaluations
        assert (told['number'], told['last']['frames'], told['best']['frames']) == (1, 400, 800)
        assert told['cpu_seconds'] == 2.0
        newer = evaluation(1200, 4.5, True)
        (directory.best / 'evaluation.json').write_text(json.dumps(newer))
        # An evaluator that is killed before it adds the line has kept the best already.
        assert monitor.state().evaluations['best']['mean'] == 4.5
        append(directory, newer)
        monitor.evaluator(1.0)
        told = monitor.state().evaluations
        assert (told['number'], told['best']['mean'], told['cpu_seconds']) == (2, 4.5, 3.0)
        assert len(directory.evaluations_file.read_text().splitlines()) == 2


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
        monitor.fold([event('learner', rejected_outlier=4, staleness=BINS)])
        monitor.fold([event('actor', epsilon=0.25)])
        monitor.restarted('actor')
        clock.now += 50
        monitor.end_training()
        clock.now += 1000  # the evaluation
        extra = {'game': 'pong', **EVALUATION, 'returns': [1.0], 'provenance': {}}
        summary = monitor.summary('max_frames', extra, exported=True)
        assert summary.pop('learners')['learner_0']['staleness'] == summary['staleness']
        assert summary == {
            'game': 'pong',
            'preset': 'laptop',
            'seed': 7,
            'frames': 2000,
            'agent_steps': 500,
            'updates': 100,
            'episodes': 2,
            'mean_return_100': -15.0,
            'mean_length_100': 100.0,
            'epsilon': 0.25,
            'evaluation': EVALUATION,
            'exported': True,
            'wall_seconds': 50.0,
            'frames_per_second': 40.0,  # 2000 / 50
            'updates_per_second': 2.0,
            'samples_per_insert': 8.0,  # 3200 / 400
            'learned_per_insert': 8.0,  # 100 updates of 32
            'rejected': {'stale': 1, 'outlier': 4, 'invalid': 0},
            'outlier_share': 0.04,  # 4 dropped of 100 computed
            'staleness': STALENESS,
            'rates': {},  # one reading each
            'memory_bytes': {},
            'learner': {},
            'evaluations': {
                'number': 0,
                'last': None,
                'best': None,
                'cpu_seconds': 0.0,
                'cpu_share': 0.0,
            },
            'restarts': {'actor': 1},
            'beam': {},
            'exit_reason': 'max_frames',
        }

    def test_outside_atari_agent_steps_count_alone(self, directory, clock):
        config = dataclasses.replace(CONFIG, action_repeat=1, unit='steps')
        with Monitor(directory, config, None, clock, clock) as monitor:
            monitor.clock(100, 500)
            clock.now += 50
            monitor.end_training()
            summary = monitor.summary('max_frames')
        assert not {'frames', 'frames_per_second'} & summary.keys()
        assert (summary['agent_steps'], summary['agent_steps_per_second']) == (500, 10.0)

    @pytest.mark.parametrize('evaluation', [None, EVALUATION, {**EVALUATION, 'mean': None}])
    def test_summary_and_learning_curve_are_written_even_of_an_empty_run(
        self, monitor, directory, evaluation
    ):
        summary = monitor.write_summary('SIGINT', evaluation)
        assert json.loads(directory.summary_file.read_text()) == summary
        assert directory.learning_curve_file.read_bytes().startswith(b'\x89PNG')


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


def shown_by_tensorboard(directory):
    """(step, value) of each scalar, by its tag, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    tags = events.Tags()['scalars']
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


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
        assert starts == [1, 101]  # the first of the steps that are made again

    def test_a_resumed_run_hides_neither_the_evaluation_before_nor_games_of_one_moment(
        self, make_monitor, directory
    ):
        monitor = make_monitor()
        monitor.clock(10, 100)
        monitor.fold([episode(-20.0, time, run_agent_steps=99) for time in range(3)])
        monitor.write_summary('max_frames', EVALUATION)
        monitor = make_monitor(resumed_from=monitor.counters())
        monitor.clock(20, 200)
        monitor.fold([episode(-10.0, 9.0, run_agent_steps=150)])
        monitor.write_summary('SIGINT')
        shown = shown_by_tensorboard(directory.events)
        assert shown['return/evaluation'] == [(400, 15.0)]
        # 99 * 4 = 396 frames, thrice; a step each, since equal ones would replace one another.
        assert shown['return/episode'] == [(396, -20.0), (397, -20.0), (398, -20.0), (600, -10.0)]
        assert [step for step, _ in shown['return/mean_100']] == [400, 800]

    def test_histograms_of_staleness_are_of_the_gradients_in_between(
        self, monitor, directory, clock
    ):
        for agent_steps, first in [(10, 3), (20, 5), (30, 5)]:
            monitor.clock(1, agent_steps)
            monitor.fold([event('learner', staleness=[first, *[0] * 11, 1])])
            clock.now += CONFIG.scalars_period_seconds
            monitor.tick()
        values = [
            (each.step, tensor_util.make_ndarray(value.tensor))
            for each in read_events(directory.events)
            for value in each.summary.value
            if value.tag == 'staleness/histogram'
        ]
        assert [step for step, _ in values] == [40, 80]  # the third period had no gradient
        for (_, bins), numbers in zip(values, ([3, 1], [2, 0])):
            np.testing.assert_array_equal(bins[0], [0, 0, numbers[0]])
            np.testing.assert_array_equal(bins[-1], [1000, 2000, numbers[1]])

    def test_tensorflow_is_not_imported(self, tmp_path):
        program = (
            'import sys\n'
            'from pipelines.monitoring import display, monitor, run_state\n'
            'from pipelines.storage import run_directory\n'
            'heavy = ("tensorflow", "matplotlib", "rich", "apache_beam", "tensorboard")\n'
            'assert not set(heavy) & set(sys.modules), "at import"\n'
            'config = run_state.MonitorConfig("pong", "laptop", 1, 100)\n'
            'with run_directory.RunDirectory.open(sys.argv[1]) as directory:\n'
            '    with monitor.Monitor(directory, config) as it:\n'
            '        it.write_summary("max_frames")\n'
            'assert "tensorflow" not in sys.modules, "while writing"\n'
        )
        subprocess.run(
            [sys.executable, '-c', program, str(tmp_path / 'run')], check=True, timeout=120
        )
