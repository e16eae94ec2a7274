"""Environments of the tests' own: small, deterministic, some of them broken on purpose."""

import functools
import multiprocessing
import os
import pathlib
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from agents.config import EnvironmentConfig
from agents.environments.atari import emulator_seeds
from agents.environments.factory import Opening, open_environment

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
    """A `Counter` that shows a dictionary of its vector, a picture, a number and a tuple."""

    observation_space = spaces.Dict(
        {
            'picture': spaces.Box(0, 255, (10, 10, 1), np.uint8),
            'phase': spaces.Discrete(LENGTH + 1),
            'pair': spaces.Tuple((spaces.Box(-1, 1, (2,), np.float32), spaces.MultiBinary(2))),
            'counter': Counter.observation_space,
        }
    )

    def _shown(self) -> Any:
        return {
            'picture': np.full((10, 10, 1), self._step, np.uint8),
            'phase': self._step,
            'pair': (np.array([0.5, -0.5], np.float32), np.array([1, 0], np.int8)),
            'counter': super()._shown(),
        }


class BrokenPart(Structured):
    """A `Structured` of which one part is outside its space at the second step, or missing."""

    def __init__(self, how: str) -> None:
        super().__init__(0)
        self._how = how

    def _shown(self) -> Any:
        shown = super()._shown()
        if self._step == 2 and self._how == 'outside':
            shown['pair'][0][1] = -3
        if self._step == 2 and self._how == 'missing':
            del shown['pair']
        return shown


class Broken(Counter):
    """A `Counter` that is wrong in one way at its second step, or at once."""

    def __init__(self, how: str, seed: int = 0) -> None:
        super().__init__(0)
        self._how = how
        spaces_of = {
            'dtype': spaces.Box(0, 2**31, (3,), np.float32),
            'infinite': spaces.Box(-np.inf, np.inf, (3,), np.float64),
            'text': spaces.Text(4),
            'sequence': spaces.Sequence(spaces.Discrete(2)),
            'graph': spaces.Graph(spaces.Discrete(2), None),
            'inside': spaces.Dict(number=spaces.Discrete(2), word=spaces.Tuple([spaces.Text(4)])),
            'empty': spaces.Dict(),
            'large': spaces.Discrete(10**9),
            'differs': spaces.Box(0, 2**31, (1 + seed % 97,), np.float64),
        }
        self.observation_space = spaces_of.get(how, self.observation_space)
        if how == 'continuous':
            self.action_space = spaces.Box(-1, 1, (1,))
        if how == 'actions':
            self.action_space = spaces.Discrete(10**6)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        if self._how == 'reset':
            raise RuntimeError('no\nlevel')
        return super().reset(seed=seed)

    def step(self, action: int) -> tuple[Any, ...]:
        shown, number, *rest = super().step(action)
        reward: float | None = number
        if self._step == 2:
            if self._how == 'step':
                raise RuntimeError('lost')
            if self._how == 'old':
                return shown, reward, False, {}  # the interface of gym before 0.26
            if self._how == 'exit':
                os._exit(1)
            wrong = {'nan': np.nan, 'outside': -1, 'infinite': np.inf}
            shown[1] = wrong.get(self._how, shown[1])
            shown = shown[:2] if self._how == 'shape' else shown
            reward = {'reward': float('inf'), 'none': None}.get(self._how, reward)
        return shown, reward, *rest


class Hanging(Counter):
    """A `Counter` whose second step never ends; then it writes the ID of its process to a file."""

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        if self._step == 1:
            _note()
            time.sleep(600)
        return super().step(action)


class HangingReset(Counter):
    """A `Counter` whose reset takes ten minutes."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        time.sleep(600)
        return super().reset(seed=seed)


class Closing(Counter):
    """A `Counter` that writes the ID of its process to a file when it is closed."""

    def close(self) -> None:
        _note()


def _note() -> None:
    """Writes this process's ID to the file that a test reads."""
    with pathlib.Path(os.environ['NOTES_OF_ENVIRONMENTS']).open('a') as file:
        print(os.getpid(), file=file)


class Unready(Closing):
    """A `Closing` that begins no episode."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        raise RuntimeError('no level')


class Showing(Counter):
    """A `Counter` that shows one sample of a space, the same always."""

    def __init__(self, space: spaces.Space, sample: Any) -> None:
        super().__init__(0)
        self.observation_space = space
        self._sample = sample

    def _shown(self) -> Any:
        return self._sample


class BrokenVector(SyncVectorEnv):
    """Two of `Counter`, of which the second is wrong in one way at the second step, or at once."""

    def __init__(self, how: str) -> None:
        disabled = how in ('mask', 'reset')
        mode = AutoresetMode.DISABLED if disabled else AutoresetMode.NEXT_STEP
        super().__init__(
            [functools.partial(Counter, seed) for seed in range(2)], autoreset_mode=mode
        )
        self._how, self._steps = how, 0
        if how == 'unbounded':
            self.single_observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
            self.observation_space = spaces.Box(-np.inf, np.inf, (2, 3), np.float64)
        if how == 'spaceless':
            del self.single_observation_space
        if how == 'mode':
            self.autoreset_mode: Any = None
            self.metadata: dict[str, Any] = {}

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        if options and self._how == 'reset':
            raise RuntimeError('no level')
        if options and self._how == 'mask':
            options = None
        return super().reset(seed=seed, options=options)

    def step(self, actions: Any) -> Any:
        self._steps += 1
        shown, reward, terminated, *rest = super().step(actions)
        if self._steps == 2:
            if self._how == 'step':
                raise RuntimeError('lost')
            if self._how == 'rewards':
                reward = reward[:1]
            if self._how == 'reward':
                reward[1] = np.nan
            if self._how == 'dtype':
                shown = shown.astype(np.complex64)
            if self._how == 'shape':
                shown = shown[:, :2]
            shown[1, 1] = {'outside': -1, 'unbounded': np.inf}.get(self._how, shown[1, 1])
            terminated = terminated | [False, self._how in ('mask', 'reset')]
        return shown, reward, terminated, *rest


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


def broken_part(seed: int, opening: Opening) -> gymnasium.Env:
    """One of which one part is outside its space."""
    return BrokenPart('outside')


def broken_missing(seed: int, opening: Opening) -> gymnasium.Env:
    """One that forgets a part."""
    return BrokenPart('missing')


def numbered(seed: int, opening: Opening) -> gymnasium.Env:
    """One whose dictionary has numbers as keys."""
    return Showing(spaces.Dict({1: spaces.Discrete(2)}), {1: 0})


def slow(seed: int, opening: Opening) -> gymnasium.Env:
    """One that takes its time."""
    return Slow(seed)


def py_counter(seed: int, opening: Opening) -> Any:
    """One of TF-Agents."""
    from tests.support.tf_environments import PyCounter  # processes of an environment need none

    return PyCounter(seed)


def _vector(
    seed: int, opening: Opening, mode: AutoresetMode, kind: type[Counter] = Counter
) -> SyncVectorEnv:
    makers = [functools.partial(kind, seed + each) for each in range(opening.num_environments)]
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


def _structured_vector(mode: AutoresetMode, seed: int, opening: Opening) -> SyncVectorEnv:
    """A vector environment of the user's with structures as observations."""
    return _vector(seed, opening, mode, Structured)


structured_next_step = functools.partial(_structured_vector, AutoresetMode.NEXT_STEP)
structured_same_step = functools.partial(_structured_vector, AutoresetMode.SAME_STEP)
structured_disabled = functools.partial(_structured_vector, AutoresetMode.DISABLED)


def cart_poles(seed: int, opening: Opening) -> gymnasium.vector.VectorEnv:
    """gymnasium's own vector environment of CartPole, which takes one seed for all."""
    return gymnasium.make_vec(
        'CartPole-v1', opening.num_environments, vectorization_mode='vector_entry_point'
    )


def _short(game: str, mode: AutoresetMode, seed: int, opening: Opening) -> SyncVectorEnv:
    makers = [functools.partial(gymnasium.make, game, max_episode_steps=12)]
    return SyncVectorEnv(makers * opening.num_environments, autoreset_mode=mode)


_LAKE, _CART = 'FrozenLake-v1', 'CartPole-v1'
lake_next_step = functools.partial(_short, _LAKE, AutoresetMode.NEXT_STEP)
lake_same_step = functools.partial(_short, _LAKE, AutoresetMode.SAME_STEP)
lake_disabled = functools.partial(_short, _LAKE, AutoresetMode.DISABLED)
cart_next_step = functools.partial(_short, _CART, AutoresetMode.NEXT_STEP)
cart_same_step = functools.partial(_short, _CART, AutoresetMode.SAME_STEP)
cart_disabled = functools.partial(_short, _CART, AutoresetMode.DISABLED)


def ram(seed: int, opening: Opening) -> gymnasium.Env:
    """The memory of an Atari console, which is no picture."""
    return gymnasium.make('ALE/Pong-v5', obs_type='ram')


def two(seed: int, opening: Opening) -> SyncVectorEnv:
    """A vector environment of two, however many are wanted."""
    return _vector(seed, Opening(2), AutoresetMode.NEXT_STEP)


def nothing(seed: int, opening: Opening) -> object:
    """No environment."""
    return object()


def _broken(how: str, seed: int, opening: Opening) -> gymnasium.Env:
    return Broken(how, seed)


def _broken_vector(how: str, seed: int, opening: Opening) -> SyncVectorEnv:
    return BrokenVector(how)


broken_actions = functools.partial(_broken, 'actions')
broken_continuous = functools.partial(_broken, 'continuous')
broken_differs = functools.partial(_broken, 'differs')
broken_dtype = functools.partial(_broken, 'dtype')
broken_empty = functools.partial(_broken, 'empty')
broken_exit = functools.partial(_broken, 'exit')
broken_graph = functools.partial(_broken, 'graph')
broken_infinite = functools.partial(_broken, 'infinite')
broken_inside = functools.partial(_broken, 'inside')
broken_large = functools.partial(_broken, 'large')
broken_nan = functools.partial(_broken, 'nan')
broken_none = functools.partial(_broken, 'none')
broken_old = functools.partial(_broken, 'old')
broken_outside = functools.partial(_broken, 'outside')
broken_reset = functools.partial(_broken, 'reset')
broken_reward = functools.partial(_broken, 'reward')
broken_sequence = functools.partial(_broken, 'sequence')
broken_shape = functools.partial(_broken, 'shape')
broken_step = functools.partial(_broken, 'step')
broken_text = functools.partial(_broken, 'text')

vector_dtype = functools.partial(_broken_vector, 'dtype')
vector_mask = functools.partial(_broken_vector, 'mask')
vector_mode = functools.partial(_broken_vector, 'mode')
vector_outside = functools.partial(_broken_vector, 'outside')
vector_reset = functools.partial(_broken_vector, 'reset')
vector_reward = functools.partial(_broken_vector, 'reward')
vector_rewards = functools.partial(_broken_vector, 'rewards')
vector_shape = functools.partial(_broken_vector, 'shape')
vector_spaceless = functools.partial(_broken_vector, 'spaceless')
vector_step = functools.partial(_broken_vector, 'step')
vector_unbounded = functools.partial(_broken_vector, 'unbounded')


def broken_spaceless(seed: int, opening: Opening) -> gymnasium.Env:
    """One without spaces."""
    return gymnasium.Env()


def second_exits(seed: int, opening: Opening) -> gymnasium.Env:
    """The second of the two of seed 1 ends its process at its second step."""
    return Broken('exit' if seed == int(emulator_seeds(1, 2)[1]) else 'nothing')


def hanging_reset(seed: int, opening: Opening) -> gymnasium.Env:
    """See `HangingReset`."""
    return HangingReset(seed)


def hanging_opening(seed: int, opening: Opening) -> gymnasium.Env:
    """Takes ten minutes to open."""
    time.sleep(600)
    return Counter(seed)


def hanging(seed: int, opening: Opening) -> gymnasium.Env:
    """See `Hanging`."""
    return Hanging(seed)


def closing(seed: int, opening: Opening) -> gymnasium.Env:
    """See `Closing`."""
    return Closing(seed)


def unready(seed: int, opening: Opening) -> gymnasium.Env:
    """See `Unready`."""
    return Unready(seed)


def pictures(seed: int, opening: Opening) -> gymnasium.Env:
    """One that shows pictures of a size for Atari's torsos."""
    space = spaces.Box(0, 255, (84, 84, 3), np.uint8)
    return Showing(space, np.zeros(space.shape, np.uint8))


def step_in_processes(name: str) -> None:
    """Steps an environment in a process of its own; this one must still be a daemon then."""
    config = EnvironmentConfig(game=name, env_processes=True)
    with open_environment(config, 1, seed=0) as environment:
        environment.reset()
        environment.step_frames(np.zeros(1, np.int32))
    assert multiprocessing.current_process().daemon
