"""Behaviour: how often it explores, whether annealed or on a ladder, and when the network runs."""

import numpy as np
import pytest

from agents import exploration
from agents.config import ActorConfig
from agents.exploration import Behaviour

OBSERVATION = np.zeros((4, 84, 84, 4), np.uint8)


class Policy:
    """Always the action 1; counts its calls."""

    calls = 0

    def act(self, observation):
        self.calls += 1
        return np.ones(len(observation), np.int32)

    def evaluate(self, observation):
        raise AssertionError('nobody asked for priorities')

    def set_parameters(self, *parts):
        self.parts = parts


def test_epsilon_falls_linearly_with_the_global_updates():
    epsilon = exploration.annealed(
        ActorConfig(envs_per_actor=2, epsilon_start=1.0, epsilon_end=0.1, epsilon_updates=1000)
    )
    # 1 - 0.9 * u / 1000: at 0, at half the way, at the end and behind it.
    for updates, expected in ((0, 1.0), (500, 0.55), (1000, 0.1), (10**9, 0.1)):
        np.testing.assert_allclose(epsilon(updates), [expected] * 2)


def test_the_ladder_is_ape_xs_over_all_actors():
    # Horgan et al. 2018, section 4.1: 0.4^(1 + 7 i / (N - 1)), i from 0 to N - 1.
    config = ActorConfig(envs_per_actor=3, ladder_epsilon=0.4, ladder_exponent=7.0)
    values = np.concatenate([exploration.ladder(config, actor, 2)(0) for actor in (0, 1)])
    np.testing.assert_allclose(values, [0.4 ** (1 + 7 * i / 5) for i in range(6)])
    np.testing.assert_array_equal(exploration.ladder(config, 1, 2)(10**6), values[3:])


def test_a_ladder_of_one_environment_has_one_rung():
    config = ActorConfig(envs_per_actor=1, ladder_epsilon=0.4)
    np.testing.assert_allclose(exploration.ladder(config, 0, 1)(0), [0.4])


def test_without_exploration_the_policy_alone_acts():
    acting = Behaviour(Policy(), lambda updates: np.zeros(4), num_actions=5)
    action, error = acting.act(OBSERVATION, 0, np.random.default_rng(0))
    np.testing.assert_array_equal(action, np.ones(4))
    assert action.dtype == np.int32
    assert error is None


def test_the_network_does_not_run_when_every_environment_explores():
    policy = Policy()
    acting = Behaviour(policy, lambda updates: np.ones(4), num_actions=5)
    rng = np.random.default_rng(0)
    seen = {int(a) for _ in range(100) for a in acting.act(OBSERVATION, 0, rng)[0]}
    assert seen == set(range(5))
    assert policy.calls == 0


@pytest.mark.parametrize('epsilon', [0.25, 0.75])
def test_each_environment_explores_as_often_as_its_epsilon_says(epsilon):
    rungs = np.array([0.0, epsilon, epsilon, 1.0])
    acting = Behaviour(Policy(), lambda updates: rungs, num_actions=2)
    rng = np.random.default_rng(0)
    zeros = sum(acting.act(OBSERVATION, 0, rng)[0] == 0 for _ in range(4000))
    # Half of what is explored is action 0; five standard deviations of 4000 draws.
    expected = 4000 * rungs / 2
    assert (np.abs(zeros - expected) <= 5 * np.sqrt(expected * (1 - rungs / 2)) + 1e-9).all()
