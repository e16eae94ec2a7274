"""Environments of the tests' own: small, deterministic, some of them broken on purpose."""

import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tf_agents.environments import py_environment
from tf_agents.specs import array_spec
from tf_agents.trajectories import time_step as ts

from agents.environments.factory import Opening

LENGTH = 5


class Counter(gymnasium.Env):
    """Shows [seed, number of the episode, step of the episode]; the reward is the step's number.

    An episode has `LENGTH` steps; odd ones are cut off, even ones end.
    """

    observation_space: Any = spaces.Box(0, 2**31, (3,), np.float64)
    action_space: Any = spaces.Discrete(2, start=3)

    def __init__(self, seed: int) -> None:
        self._seed, self._episode, self._step = seed, -1, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self._episode, self._step = self._episode + 1, 0
        return self._shown(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        assert action in (3, 4), action
        self._step += 1
        over = self._step == LENGTH
        odd = bool(self._episode % 2)
        return self._shown(), float(self._step), over and not odd, over and odd, {}

    def _shown(self) -> Any:
        return np.array([self._seed % 1000, self._episode, self._step], np.float64)


class Structured(Counter):
    """A `Counter` whose observation is a dictionary of a number, a picture and a vector."""

    observation_space = spaces.Dict(
        {
            'picture': spaces.Box(0, 255, (2, 2, 1), np.uint8),
            'phase': spaces.Discrete(LENGTH + 1),
            'pair': spaces.Tuple((spaces.Box(-1, 1, (2,), np.float32), spaces.MultiBinary(2))),
        }
    )

    def _shown(self) -> Any:
        return {
            'picture': np.full((2, 2, 1), self._step, np.uint8),
            'phase': self._step,
            'pair': (np.array([0.5, -0.5], np.float32), np.array([1, 0], np.int8)),
        }


class Broken(Counter):
    """A `Counter` that is wrong in one way at its second step, or at once."""

    def __init__(self, how: str) -> None:
        super().__init__(0)
        self._how = how
        if how == 'dtype':
            self.observation_space = spaces.Box(0, 2**31, (3,), np.float32)
        if how == 'continuous':
            self.action_space = spaces.Box(-1, 1, (1,))
        if how == 'text':
            self.observation_space = spaces.Text(4)
        if how == 'sequence':
            self.observation_space = spaces.Sequence(spaces.Discrete(2))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        if self._how == 'reset':
            raise RuntimeError('no level')
        return super().reset(seed=seed)

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        shown, reward, *rest = super().step(action)
        if self._step == 2:
            if self._how == 'step':
                raise RuntimeError('lost')
            if self._how == 'nan':
                shown[1] = np.nan
            if self._how == 'outside':
                shown[1] = -1
            if self._how == 'shape':
                shown = shown[:2]
            if self._how == 'reward':
                reward = float('inf')
        return shown, reward, *rest


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


class Slow(Counter):
    """A `Counter` that takes 50 ms a step, as a simulator may."""

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        time.sleep(0.05)
        return super().step(action)


def counter(seed: int, opening: Opening) -> gymnasium.Env:
    """One environment."""
    return Counter(seed)


def structured(seed: int, opening: Opening) -> gymnasium.Env:
    """One with a structure as observation."""
    return Structured(seed)


def slow(seed: int, opening: Opening) -> gymnasium.Env:
    """One that takes its time."""
    return Slow(seed)


def py_counter(seed: int, opening: Opening) -> py_environment.PyEnvironment:
    """One of TF-Agents."""
    return PyCounter(seed)


def _vector(seed: int, opening: Opening, mode: AutoresetMode) -> SyncVectorEnv:
    makers = [lambda each=each: Counter(seed + each) for each in range(opening.num_environments)]
    return SyncVectorEnv(makers, autoreset_mode=mode)


def next_step(seed: int, opening: Opening) -> SyncVectorEnv:
    """A vector environment that shows the last observation of an episode."""
    return _vector(seed, opening, AutoresetMode.NEXT_STEP)


def same_step(seed: int, opening: Opening) -> SyncVectorEnv:
    """One that does not."""
    return _vector(seed, opening, AutoresetMode.SAME_STEP)


def disabled(seed: int, opening: Opening) -> SyncVectorEnv:
    """One that begins no episode by itself."""
    return _vector(seed, opening, AutoresetMode.DISABLED)


def two(seed: int, opening: Opening) -> SyncVectorEnv:
    """A vector environment of two, however many are wanted."""
    return _vector(seed, Opening(2), AutoresetMode.NEXT_STEP)


def nothing(seed: int, opening: Opening) -> object:
    """No environment."""
    return object()


def broken_dtype(seed: int, opening: Opening) -> gymnasium.Env:
    """See `Broken`."""
    return Broken('dtype')


def broken_continuous(seed: int, opening: Opening) -> gymnasium.Env:
    """See `Broken`."""
    return Broken('continuous')


def broken_text(seed: int, opening: Opening) -> gymnasium.Env:
    """See `Broken`."""
    return Broken('text')


def broken_sequence(seed: int, opening: Opening) -> gymnasium.Env:
    """See `Broken`."""
    return Broken('sequence')


def broken_reset(seed: int, opening: Opening) -> gymnasium.Env:
    """See `Broken`."""
    return Broken('reset')


def broken_step(seed: int, opening: Opening) -> gymnasium.Env:
    """See `Broken`."""
    return Broken('step')


def broken_nan(seed: int, opening: Opening) -> gymnasium.Env:
    """See `Broken`."""
    return Broken('nan')


def broken_outside(seed: int, opening: Opening) -> gymnasium.Env:
    """See `Broken`."""
    return Broken('outside')


def broken_shape(seed: int, opening: Opening) -> gymnasium.Env:
    """See `Broken`."""
    return Broken('shape')


def broken_reward(seed: int, opening: Opening) -> gymnasium.Env:
    """See `Broken`."""
    return Broken('reward')
