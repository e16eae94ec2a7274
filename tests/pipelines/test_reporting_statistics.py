"""Published scores and aggregates: the paper's own figures and rliable's, recomputed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.reporting import reference, statistics
from pipelines.reporting.page import TEMPLATE_FILE
from tests.support.paper_games import PAPER_GAMES

ROOT = Path(__file__).resolve().parents[2]


class TestReference:
    def test_the_table_has_the_49_games_of_the_paper(self):
        assert sorted(reference.table()) == sorted(PAPER_GAMES)

    # Nair et al. 2015: "surpassed DQN in 41 of the 49 games" (human starts), 31 with no-op starts.
    @pytest.mark.parametrize(('starts', 'games'), [('human', 41), ('noop', 31)])
    def test_gorila_beats_dqn_on_as_many_games_as_in_the_paper(self, starts, games):
        gorila = {game: rows[starts]['gorila'] for game, rows in reference.table().items()}
        won, lost = reference.wins(gorila, 'dqn', starts)
        assert (len(won), len(lost)) == (games, 49 - games)

    @pytest.mark.parametrize(
        ('agent', 'starts', 'percent'),
        [('gorila', 'human', 71.3), ('dqn', 'human', 47.5)]
        + [('gorila', 'noop', 96.4), ('dqn', 'noop', 93.5)],
    )
    def test_median_normalised_scores_are_those_of_the_paper(self, agent, starts, percent):
        assert reference.median(agent, starts) == pytest.approx(percent, abs=0.05)

    def test_random_play_is_0_percent_and_the_human_100(self):
        published = reference.table()['pong']['noop']
        assert reference.normalised(published['random'], 'pong', 'noop') == 0
        assert reference.normalised(published['human'], 'pong', 'noop') == 100

    def test_games_outside_the_49_have_no_published_score(self):
        assert reference.scores('solaris', 'noop') is None
        assert reference.normalised(1.0, 'solaris', 'noop') is None
        assert reference.wins({'solaris': 1e9}, 'dqn', 'noop') == ([], [])

    def test_an_installed_package_has_the_table_and_the_template(self, tmp_path):
        command = ['-c', 'import setuptools; setuptools.setup()', '-q']
        built = subprocess.run(
            [sys.executable, *command, 'egg_info', '--egg-base', tmp_path]
            + ['build_py', '--build-lib', tmp_path / 'lib'],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert built.returncode == 0, built.stderr
        room = tmp_path / 'lib' / 'pipelines' / 'reporting'
        assert (room / 'atari49_scores.json').read_bytes() == reference.DATA_FILE.read_bytes()
        assert (room / 'template.html').read_bytes() == TEMPLATE_FILE.read_bytes()


# Two agents, four runs (rows) of five games (columns).
A = [
    [12.5, 80.0, 150.0, 31.0, 410.0],
    [20.0, 95.5, 148.0, 12.0, 395.0],
    [5.0, 70.0, 190.0, 55.0, 520.0],
    [17.5, 110.0, 90.0, 40.0, 300.0],
]
B = [
    [10.0, 85.0, 100.0, 31.0, 350.0],
    [22.0, 60.0, 120.0, 30.0, 380.0],
    [8.0, 75.5, 150.0, 20.0, 270.0],
    [2.5, 90.0, 110.0, 12.0, 330.0],
]
# Of rliable 1.2.0 (arch 7.2.0, numpy 1.26.4) with 50,000 repetitions, on these matrices: first its
# `get_interval_estimates` with `aggregate_median`, `aggregate_mean`, `aggregate_iqm` of {'A': A},
# then with `probability_of_improvement` of {'AB': (A, B)}, then its `create_performance_profile`.
RLIABLE = {
    'median': (88.875, 75.0, 102.75),
    'mean': (137.575, 120.575, 155.025),
    'interquartile_mean': (86.95, 73.5, 101.65),
}
RLIABLE_IMPROVEMENT = (0.70625, 0.525, 0.875)
THRESHOLDS = [0, 25, 50, 100, 200, 400]
RLIABLE_PROFILE = (
    [1.0, 0.75, 0.65, 0.4, 0.2, 0.1],
    [1.0, 0.65, 0.6, 0.3, 0.2, 0.0],
    [1.0, 0.8, 0.75, 0.5, 0.2, 0.2],
)


def by_game(matrix):
    return list(np.array(matrix).T)


class TestAgainstRliable:
    @pytest.mark.parametrize('name', RLIABLE)
    def test_aggregates_and_their_intervals(self, name):
        value, low, high = RLIABLE[name]
        found = statistics.estimate(getattr(statistics, name), by_game(A))
        assert found.value == pytest.approx(value, rel=1e-12)
        # Bounds of 10,000 and of 50,000 repetitions: within 2 % of the interval's width.
        assert [found.low, found.high] == pytest.approx([low, high], abs=0.02 * (high - low))

    def test_the_probability_of_improvement_and_its_interval(self):
        value, low, high = RLIABLE_IMPROVEMENT
        found = statistics.estimate_improvement(by_game(A), by_game(B))
        assert found.value == pytest.approx(value, rel=1e-12)
        # It takes steps of 1/80 at the bounds: one step.
        assert [found.low, found.high] == pytest.approx([low, high], abs=1 / 80)

    def test_performance_profiles_and_their_bands(self):
        value, low, high = RLIABLE_PROFILE
        found = statistics.estimate(statistics.profile(np.array(THRESHOLDS)), by_game(A))
        assert found.value == pytest.approx(value, rel=1e-12)
        # Shares of 20 runs: one run.
        assert found.low == pytest.approx(low, abs=1 / 20)
        assert found.high == pytest.approx(high, abs=1 / 20)


class TestIntervals:
    def test_a_game_with_a_single_run_gives_no_interval(self):
        found = statistics.estimate(statistics.mean, [np.array([1.0, 3.0]), np.array([5.0])])
        assert (found.value, found.low, found.high) == (3.5, None, None)  # (2 + 5) / 2

    def test_games_may_have_different_numbers_of_runs(self):
        found = statistics.estimate(statistics.median, [np.array([1.0, 3.0]), np.arange(5.0)])
        assert found.value == 2.0  # both games' means
        assert found.low is not None
        assert found.high is not None
        assert found.low < 2 < found.high

    def test_equal_scores_are_neither_better_nor_worse(self):
        assert statistics.improvement([np.ones(3)], [np.ones(2)]) == 0.5

    def test_published_scores_count_as_one_run_a_game(self):
        # Of (1, 5) one beats 3, of (4, 4) both beat 2: the mean of 1/2 and 1.
        found = statistics.improvement(
            [np.array([1.0, 5.0]), np.array([4.0, 4.0])], [np.array([3.0]), np.array([2.0])]
        )
        assert found == 0.75
