"""Warnings from a run's figures."""

import pytest

from pipelines.experiment import presets
from pipelines.monitoring.advice import advice
from pipelines.monitoring.run_state import RunState


def _warnings(*, updates, share=None, learner=None, preset='laptop', **settings):
    config = presets.experiment(preset, settings)
    fields = {'updates': updates, 'outlier_share': share, 'learner': learner or {}}
    return dict(advice(RunState(game='pong', preset=preset, max_frames=1, **fields), config))


@pytest.mark.parametrize(
    ('updates', 'share', 'expected'),
    [(1_000, 0.0011, ['outliers']), (1_000, 0.001, []), (999, 0.5, []), (1_000, None, [])],
)
def test_more_than_a_thousandth_of_the_gradients_dropped_is_worth_a_warning(
    updates, share, expected
):
    assert list(_warnings(updates=updates, share=share)) == expected


def _values(spread, mean=0.334):
    return {'mean_q': mean, 'max_q': mean + spread, 'mean_absolute_error': 0.3}


@pytest.mark.parametrize(
    ('updates', 'figures', 'expected'),
    [
        (20_000, _values(0.009), ['values']),  # as in Breakout with dead units
        (20_000, _values(0.059), ['values']),  # a fifth of 0.3 is 0.06
        (20_000, _values(0.061), []),
        (20_000, _values(0.013, mean=-3.247), ['values']),  # as in Pong with dead units
        (19_999, _values(0.009), []),
        (20_000, {}, []),  # no batch since a launch
    ],
)
def test_values_that_are_equal_in_all_states_are_worth_a_warning(updates, figures, expected):
    assert list(_warnings(updates=updates, learner=figures)) == expected


@pytest.mark.parametrize(
    ('settings', 'first'),
    [
        ({'target_update_period': 10_000}, 30_000),
        ({'epsilon_updates': 40_000}, 40_000),
        ({'preset': 'paper'}, 1_000_000),  # epsilon falls for so long
        ({'preset': 'apex'}, 20_000),  # its epsilons do not change
    ],
)
def test_runs_that_differ_in_value_later_are_given_more_updates(settings, first):
    assert not _warnings(updates=first - 1, learner=_values(0.0), **settings)
    assert _warnings(updates=first, learner=_values(0.0), **settings)


def test_the_warning_names_the_values_and_the_remedy():
    text = _warnings(updates=20_000, learner=_values(0.009))['values']
    assert 'mean 0.334, largest 0.343, mean error 0.300' in text
    assert 'start again with a lower --learning_rate and --learning_rate_end.' in text


@pytest.mark.parametrize(
    ('settings', 'first'),
    [
        ({}, 'a lower --learning_rate'),  # has both flags
        ({'negative_slope': 0.0}, '--negative_slope 0.01, or with a lower'),
        ({'preset': 'paper'}, '--centralize_gradient --negative_slope 0.01, or with a lower'),
        ({'preset': 'classic', 'game': 'CartPole-v1'}, '--negative_slope 0.01, or with a lower'),
        ({'preset': 'paper', 'q_network': 'mine:make'}, 'a lower --learning_rate'),
    ],
)
def test_the_warning_names_the_flags_that_the_run_lacks(settings, first):
    text = _warnings(updates=2_000_000, learner=_values(0.0), **settings)['values']
    assert f'start again with {first}' in text


@pytest.mark.parametrize('agent', ['c51', 'iqn'])
def test_errors_of_distributions_are_not_compared_with_values(agent):
    assert not _warnings(updates=20_000, learner=_values(0.0), agent=agent)
