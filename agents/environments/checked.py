"""One environment that is checked at each step: what leaves its space never reaches the agent."""

import math
from typing import Any

import gymnasium
import numpy as np

from agents.environments.errors import EnvironmentFailedError, failure_text

_SHOWN_ELEMENTS = 8


class Checked(gymnasium.Wrapper):
    """Raises `EnvironmentFailedError` for what gymnasium's interface does not allow."""

    def __init__(self, env: gymnasium.Env, name: str, number: int) -> None:
        """`name` and `number`, among those stepped together, stand in errors."""
        super().__init__(env)
        self._name = f'{name}, environment {number}'
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Starts an episode.

        Raises:
          EnvironmentFailedError: it raises an error, or the observation is not of its space.
        """
        self._steps = 0
        try:
            observation, info = self.env.reset(seed=seed, options=options)
        except Exception as error:  # the user's code may raise anything
            raise self._failed(f'reset {failure_text(error)}', 'correct its reset()') from error
        self._require_contained(observation)
        return observation, info

    def step(self, action: Any) -> Any:
        """Takes an action.

        Raises:
          EnvironmentFailedError: it raises an error, the observation is not of its space, or the
            reward is no finite number.
        """
        self._steps += 1
        try:
            observation, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:  # the user's code may raise anything
            raise self._failed(failure_text(error), 'correct its step()') from error
        self._require_contained(observation)
        try:
            number = float(reward)
        except (TypeError, ValueError) as error:
            raise self._failed(f'reward {described(reward)}', 'return a number') from error
        if not math.isfinite(number):
            raise self._failed(f'reward {number}', 'return a finite number')
        return observation, number, bool(terminated), bool(truncated), info

    def _require_contained(self, observation: Any) -> None:
        """
        Raises:
          EnvironmentFailedError: the observation is not of the environment's space.
        """
        space = self.env.observation_space
        if not space.contains(observation):
            shown = f'observation {described(observation)} is not in its space {brief_space(space)}'
            raise self._failed(shown, 'correct the observation or observation_space')

    def _failed(self, what: str, remedy: str) -> EnvironmentFailedError:
        return EnvironmentFailedError(f'{self._name}, step {self._steps}: {what}. Fix: {remedy}.')


def described(observation: Any) -> str:
    """Type and shape of an observation, and its values if they are few; on one line."""
    if not isinstance(observation, np.ndarray):
        return ' '.join(repr(observation).split())[:80]
    values = f' {observation.tolist()}' if observation.size <= _SHOWN_ELEMENTS else ''
    return f'{observation.dtype}{list(observation.shape)}{values}'


def brief_space(space: gymnasium.Space) -> str:
    """A space on one line of at most 120 characters."""
    text = ' '.join(str(space).split())
    return text if len(text) <= 120 else f'{text[:117]}...'
