"""A simulator of one's own, a gymnasium.Env, trained by this project.

    PYTHONPATH=tests/examples .venv/bin/python pipelines/run.py --environment own_environment:make

`make` is all that is needed. It is called in the actors' processes, once for each environment and
with another seed each time. `--env_processes` steps each environment in a process, for slow ones.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from agents.environments.factory import Opening

LENGTH, MOST_STEPS = 6, 30


class Corridor(gymnasium.Env):
    """A walk to the right end of a corridor, which earns 1; each step costs 0.05."""

    observation_space = spaces.Box(0.0, 1.0, (1,), np.float32)
    action_space = spaces.Discrete(2)  # left, right

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode  # 'rgb_array' if a film is made

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self._place, self._steps = int(self.np_random.integers(LENGTH - 1)), 0
        return self._shown(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        self._place = max(0, self._place + (1 if action == 1 else -1))
        self._steps += 1
        there = self._place == LENGTH - 1
        return self._shown(), float(there) - 0.05, there, self._steps >= MOST_STEPS, {}

    def render(self) -> np.ndarray:
        fields = np.full((1, LENGTH, 3), 40, np.uint8)
        fields[0, self._place] = 220, 120, 40
        return fields.repeat(64, axis=0).repeat(64, axis=1)

    def _shown(self) -> np.ndarray:
        return np.array([self._place / (LENGTH - 1)], np.float32)


def make(seed: int, opening: Opening) -> Corridor:
    """The factory. An environment is also seeded at its first reset; others may need `seed`."""
    return Corridor(opening.render_mode)
