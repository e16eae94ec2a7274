"""Checks of environments at each step: what leaves its space never reaches the agent.

A single environment is `Checked` itself, before its numbers are put into a batch; the user's vector
environment by `VectorRules`.
"""

import math
from typing import Any

import gymnasium
import numpy as np
import tree
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import iterate

from agents.environments.errors import EnvironmentFailedError, failure_text
from agents.environments.frames import part_at

_SHOWN_ELEMENTS = 8


class Rules:
    """What observations of a space must be: in their space, and finite."""

    def __init__(self, space: gymnasium.Space) -> None:
        self._space = space
        self._parts = tree.flatten_with_path(space)
        self._floats = [
            path
            for path, part in self._parts
            if isinstance(part, spaces.Box) and part.dtype.kind == 'f'
        ]

    def broken_by(self, observation: Any) -> tuple[str, str] | None:
        """What is wrong with an observation, and the remedy; None: nothing."""
        if not self._space.contains(observation):
            return self._outside(observation), 'correct the observation or observation_space'
        for path in self._floats:
            array = part_at(path, observation)
            if not np.isfinite(array).all():
                return f'{_named(path)} {described(array)} is not finite', 'show finite numbers'
        return None

    def _outside(self, observation: Any) -> str:
        """Names the part that is outside its space, or all if parts are missing."""
        path, shown, space = (), observation, self._space
        for place, part in self._parts:
            try:
                array = part_at(place, observation)
            except (LookupError, TypeError):  # it is nested otherwise
                break
            if not part.contains(array):
                path, shown, space = place, array, part
                break
        return f'{_named(path)} {described(shown)} is not in its space {brief_space(space)}'


class VectorRules:
    """What a vector environment must show; faults are (what, remedy, number of the environment)."""

    def __init__(self, environments: VectorEnv) -> None:
        self._space = environments.observation_space
        self._batch, self._single = Rules(self._space), Rules(environments.single_observation_space)
        self._count = environments.num_envs

    def broken_by(self, observation: Any) -> tuple[str, str, int | None] | None:
        """The fault of a batch of observations, of the first environment that has one."""
        if (fault := self._batch.broken_by(observation)) is None:
            return None
        try:
            rows = list(iterate(self._space, observation))
        except Exception:  # not even a batch
            rows = []
        if len(rows) == self._count:
            for number, row in enumerate(rows):
                if own := self._single.broken_by(row):
                    return *own, number
        return *fault, None

    def broken_by_rewards(self, reward: Any) -> tuple[str, str, int | None] | None:
        """The fault of rewards that are not a finite number for each environment."""
        finite = np.shape(reward) == (self._count,) and np.isfinite(reward)
        if np.all(finite):
            return None
        number = None if finite is False else int(np.flatnonzero(~finite)[0])
        shown = described(reward) if number is None else reward[number]
        return f'reward {shown}', 'return a finite number for each', number


class Checked(gymnasium.Wrapper):
    """Raises `EnvironmentFailedError` for what gymnasium's interface does not allow."""

    def __init__(self, env: gymnasium.Env, name: str, number: int) -> None:
        """`name` and `number`, among those stepped together, stand in errors."""
        super().__init__(env)
        self._rules = Rules(env.observation_space)
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
        self._require(observation)
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
        self._require(observation)
        try:
            number = float(reward)
        except (TypeError, ValueError) as error:
            raise self._failed(f'reward {described(reward)}', 'return a number') from error
        if not math.isfinite(number):
            raise self._failed(f'reward {number}', 'return a finite number')
        return observation, number, bool(terminated), bool(truncated), info

    def _require(self, observation: Any) -> None:
        """
        Raises:
          EnvironmentFailedError: the observation is not of the environment's space, or not finite.
        """
        if fault := self._rules.broken_by(observation):
            raise self._failed(*fault)

    def _failed(self, what: str, remedy: str) -> EnvironmentFailedError:
        return EnvironmentFailedError(f'{self._name}, step {self._steps}: {what}. Fix: {remedy}.')


def _named(path: tuple) -> str:
    return '/'.join(['observation', *map(str, path)])


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
