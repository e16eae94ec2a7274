"""Environments of TF-Agents in this project's pipelines: one, a batch, and one of suite_gym.

    PYTHONPATH=tests/examples .venv/bin/python pipelines/run.py \
        --environment own_py_environment:single

The base class begins the next episode in the step after a LAST one, as this project requires.
Discounts within an episode are 1, 0 where it ends, and 1 where it is cut off.
"""

from typing import Any

import numpy as np
from tf_agents.environments import batched_py_environment, py_environment, suite_gym
from tf_agents.specs import array_spec
from tf_agents.trajectories import time_step as ts

from agents.environments.factory import Opening

LENGTH, MOST_STEPS = 6, 30


class Corridor(py_environment.PyEnvironment):
    """A walk to the right end of a corridor, which earns 1; each step costs 0.05."""

    def __init__(self, seed: int) -> None:
        super().__init__(handle_auto_reset=True)
        self._rng = np.random.default_rng(seed)

    def observation_spec(self) -> array_spec.BoundedArraySpec:
        return array_spec.BoundedArraySpec((1,), np.float32, 0.0, 1.0)

    def action_spec(self) -> array_spec.BoundedArraySpec:
        return array_spec.BoundedArraySpec((), np.int32, 0, 1)  # left, right

    def _reset(self) -> ts.TimeStep:
        self._place, self._steps = int(self._rng.integers(LENGTH - 1)), 0
        return ts.restart(self._shown())

    def _step(self, action: Any) -> ts.TimeStep:
        self._place = max(0, self._place + (1 if action == 1 else -1))
        self._steps += 1
        if self._place == LENGTH - 1:
            return ts.termination(self._shown(), reward=0.95)
        if self._steps >= MOST_STEPS:
            return ts.truncation(self._shown(), reward=-0.05)
        return ts.transition(self._shown(), reward=-0.05)

    def _shown(self) -> np.ndarray:
        return np.array([self._place / (LENGTH - 1)], np.float32)


def single(seed: int, opening: Opening) -> Corridor:
    """One environment; it is called once for each."""
    return Corridor(seed)


def batch(seed: int, opening: Opening) -> py_environment.PyEnvironment:
    """A batched environment; it is called once an actor."""
    corridors = [Corridor(seed + i) for i in range(opening.num_environments)]
    return batched_py_environment.BatchedPyEnvironment(corridors, multithreading=False)


def of_suite_gym(seed: int, opening: Opening) -> py_environment.PyEnvironment:
    """An environment of the old gym, which suite_gym wraps; gymnasium's need no wrapper here."""
    environment = suite_gym.load('CartPole-v1')
    environment.seed(seed)
    return environment
