"""Warnings from a run's figures."""

import pytest

from pipelines.monitoring.advice import advice
from pipelines.monitoring.run_state import RunState


def _subjects(agent='dqn', **fields):
    state = RunState(game='pong', preset='laptop', max_frames=1, **fields)
    return [subject for subject, _ in advice(state, agent)]


@pytest.mark.parametrize(
    ('updates', 'share', 'expected'),
    [(1_000, 0.0011, ['outliers']), (1_000, 0.001, []), (999, 0.5, []), (1_000, None, [])],
)
def test_more_than_a_thousandth_of_the_gradients_dropped_is_worth_a_warning(
    updates, share, expected
):
    assert _subjects(updates=updates, outlier_share=share) == expected


# As measured: Breakout with dead units, Pong too, and Breakout that has learned for 5,000 updates.
_BREAKOUT = {'mean_q': 0.334, 'max_q': 0.343, 'mean_absolute_error': 0.302}
_PONG = {'mean_q': -3.247, 'max_q': -3.234, 'mean_absolute_error': 0.386}
_LEARNING = {'mean_q': 0.467, 'max_q': 1.427, 'mean_absolute_error': 0.232}


@pytest.mark.parametrize(
    ('updates', 'figures', 'expected'),
    [
        (20_000, _BREAKOUT, ['values']),
        (33_391, _PONG, ['values']),
        (20_000, _LEARNING, []),
        (19_999, _BREAKOUT, []),  # early on every network is like this
        (20_000, {}, []),  # no batch since a launch
        (20_000, {'loss': 0.1, 'mean_absolute_error': 0.3}, []),  # a user's agent has no values
    ],
)
def test_values_that_are_equal_in_all_states_are_worth_a_warning(updates, figures, expected):
    assert _subjects(updates=updates, learner=figures) == expected


def test_divergences_of_c51_are_not_compared_with_values():
    assert _subjects('c51', updates=20_000, learner=_BREAKOUT) == []
