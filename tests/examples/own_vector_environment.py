"""A simulator that steps many environments at once, a gymnasium.vector.VectorEnv.

    PYTHONPATH=tests/examples .venv/bin/python pipelines/run.py \
        --environment own_vector_environment:make --envs_per_actor 64

For simulators on an accelerator or in C++. It must say in `metadata` when it begins the next
episode; by NEXT_STEP, in the step after the end, which ignores the action.
"""

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from agents.environments.factory import Opening

LENGTH, MOST_STEPS = 6, 30


class Corridors(VectorEnv):
    """Walks to the right ends of corridors, which earn 1; each step costs 0.05."""

    metadata = {'autoreset_mode': AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.single_action_space = spaces.Discrete(2)  # left, right
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._steps = np.zeros(self.num_envs, int)
        self._place = self.np_random.integers(LENGTH - 1, size=self.num_envs)
        self._ended = np.zeros(self.num_envs, bool)
        return self._shown(), {}

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        begins = self._ended
        starts = self.np_random.integers(LENGTH - 1, size=self.num_envs)
        moved = np.maximum(0, self._place + np.where(actions == 1, 1, -1))
        self._place = np.where(begins, starts, moved)
        self._steps = np.where(begins, 0, self._steps + 1)
        there = self._place == LENGTH - 1
        truncated = self._steps >= MOST_STEPS
        self._ended = there | truncated
        reward = np.where(begins, 0.0, there - 0.05)
        return self._shown(), reward, there, truncated, {}

    def _shown(self) -> np.ndarray:
        return (self._place[:, None] / (LENGTH - 1)).astype(np.float32)


def make(seed: int, opening: Opening) -> Corridors:
    """The factory. It is called once an actor; the seed comes again with the first reset."""
    return Corridors(opening.num_environments)
