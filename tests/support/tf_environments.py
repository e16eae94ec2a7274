"""Environments of TF-Agents, of the tests' own or the library's; some are broken on purpose."""

import functools
from typing import Any

import numpy as np
import tensorflow as tf
from tf_agents.environments import (
    batched_py_environment,
    py_environment,
    random_py_environment,
)
from tf_agents.specs import array_spec
from tf_agents.trajectories import time_step as ts

from agents.environments.factory import Opening
from tests.support.environments import LENGTH, Counter


class PyCounter(py_environment.PyEnvironment):
    """A `Counter` as one of TF-Agents' environments."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._env = Counter(seed)

    def action_spec(self) -> Any:
        return array_spec.BoundedArraySpec((), np.int64, 3, 4)

    def observation_spec(self) -> Any:
        return array_spec.ArraySpec((3,), np.float64)

    def _reset(self) -> ts.TimeStep:
        return ts.restart(self._env.reset()[0])

    def _step(self, action: Any) -> ts.TimeStep:
        if self.current_time_step().is_last():
            return self.reset()
        shown, reward, terminated, truncated, _ = self._env.step(int(action))
        if terminated:
            return ts.termination(shown, reward)
        if truncated:
            return ts.truncation(shown, reward)
        return ts.transition(shown, reward)


class PyStructured(PyCounter):
    """A `PyCounter` that shows a tuple of its vector and a dictionary of a picture."""

    def observation_spec(self) -> Any:
        picture = array_spec.BoundedArraySpec((10, 10, 1), np.uint8, 0, 255)
        return super().observation_spec(), {'picture': picture}

    def _reset(self) -> ts.TimeStep:
        return self._structured(super()._reset())

    def _step(self, action: Any) -> ts.TimeStep:
        if self.current_time_step().is_last():
            return self.reset()
        return self._structured(super()._step(action))

    def _structured(self, step: ts.TimeStep) -> ts.TimeStep:
        numbers = step.observation
        picture = np.full((10, 10, 1), numbers[-1], np.uint8)
        return step._replace(observation=(numbers, {'picture': picture}))


class PyBroken(PyCounter):
    """A `PyCounter` that is wrong in one way at its second step, or at once."""

    def __init__(self, how: str, seed: int = 0) -> None:
        super().__init__(0)
        self._how, self._seed, self._steps = how, seed, 0

    def action_spec(self) -> Any:
        if self._how == 'continuous':
            return array_spec.BoundedArraySpec((), np.float32, -1, 1)
        if self._how == 'actions':
            return array_spec.BoundedArraySpec((), np.int64, 1, 10**6)
        return super().action_spec()

    def observation_spec(self) -> Any:
        if self._how == 'text':
            return {'word': array_spec.ArraySpec((), np.str_)}
        if self._how == 'bounds':
            return array_spec.BoundedArraySpec((3,), np.float64, 0, 1)
        if self._how == 'differs':
            return array_spec.ArraySpec((1 + self._seed % 97,), np.float64)
        return super().observation_spec()

    def _reset(self) -> ts.TimeStep:
        if self._how == 'reset':
            raise RuntimeError('no level')
        return super()._reset()

    def _step(self, action: Any) -> ts.TimeStep:
        self._steps += 1
        if self._how == 'goes_on' and self.current_time_step().is_last():
            return ts.transition(np.zeros(3), 0.0)
        step = super()._step(action)
        if self._steps == 2:
            if self._how == 'step':
                raise RuntimeError('lost')
            shown = step.observation * (np.nan if self._how == 'nan' else 1)
            if self._how == 'dtype':
                shown = shown.astype(np.float32)
            if self._how == 'discount':
                return ts.transition(shown, 1.0, 0.5)
            return ts.transition(shown, np.inf if self._how == 'reward' else 1.0)
        return step


class Showing(PyCounter):
    """A `PyCounter` that shows zeros of a spec."""

    def __init__(self, spec: Any) -> None:
        super().__init__(0)
        self._spec = spec

    def observation_spec(self) -> Any:
        return self._spec

    def _reset(self) -> ts.TimeStep:
        shown = tf.nest.map_structure(lambda part: np.zeros(part.shape, part.dtype), self._spec)
        return ts.restart(shown)


def structured(seed: int, opening: Opening) -> py_environment.PyEnvironment:
    """One with a structure as observation."""
    return PyStructured(seed)


def batched(seed: int, opening: Opening) -> py_environment.PyEnvironment:
    """A batched environment of the user's."""
    seeds = range(seed, seed + opening.num_environments)
    return batched_py_environment.BatchedPyEnvironment([PyCounter(each) for each in seeds])


def library(seed: int, opening: Opening) -> py_environment.PyEnvironment:
    """One of TF-Agents' own: random structures; each episode has `LENGTH` steps."""
    parts = {
        'picture': array_spec.BoundedArraySpec((2, 2, 1), np.uint8, 0, 255),
        'speed': array_spec.BoundedArraySpec((), np.float32, -1, 1),
    }
    return random_py_environment.RandomPyEnvironment(
        parts,
        array_spec.BoundedArraySpec((), np.int32, 0, 3),
        seed=seed,
        min_duration=LENGTH,
        max_duration=LENGTH,
    )


def _broken(how: str, seed: int, opening: Opening) -> py_environment.PyEnvironment:
    return PyBroken(how, seed)


bounds = functools.partial(_broken, 'bounds')
actions = functools.partial(_broken, 'actions')
continuous = functools.partial(_broken, 'continuous')
differs = functools.partial(_broken, 'differs')
discount = functools.partial(_broken, 'discount')
dtype = functools.partial(_broken, 'dtype')
goes_on = functools.partial(_broken, 'goes_on')
nan = functools.partial(_broken, 'nan')
reset = functools.partial(_broken, 'reset')
reward = functools.partial(_broken, 'reward')
step = functools.partial(_broken, 'step')
text = functools.partial(_broken, 'text')
