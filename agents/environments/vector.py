"""Gymnasium's vector environments: actions in, observations, rewards and ends of episodes out."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from gymnasium.vector.utils import iterate

from agents.environments.atari import check_actions
from agents.environments.checked import brief_space, described
from agents.environments.errors import EnvironmentFailedError, failure_text
from agents.environments.frames import Frames, FrameSpec, begun
from agents.environments.processes import close_processes
from infra.named_function import brief

_ARRAYS = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


class VectorEnvironment:
    """E environments of gymnasium, in a `with`.

    Observations that are no arrays, or single numbers, become one vector: one-hot numbers, parts of
    a structure in turn.

    With next-step resets, which gymnasium's own vector environments have by default, the last
    observation of an episode is a frame of its own, from which a truncated episode bootstraps.
    Same-step resets and none show the next episode at once: a transition that would bootstrap from
    a truncated episode's last observation is left out.
    """

    def __init__(self, name: str, environments: VectorEnv, seed: int | list[int]) -> None:
        """
        Args:
          name: stands in errors.
          environments: to step; closed with this object.
          seed: of all, or one for each, which not every vector environment takes.

        Raises:
          EnvironmentFailedError: its actions, observations or resets are of an unknown kind.
        """
        self._name = name
        self._envs = environments
        self._mode = mode_of(name, environments)
        self._start, self._num_actions = actions_of(name, environments.single_action_space)
        space = environments.single_observation_space
        require_arrays(name, space)
        self._structured = not isinstance(space, spaces.Box) or not space.shape
        frame_space = spaces.flatten_space(space) if self._structured else space
        self.num_environments = environments.num_envs
        self.frame_spec = spec_of(frame_space)
        self._seed = seed
        self._last = np.zeros(self.num_environments, bool)
        self._steps = 0

    @property
    def num_actions(self) -> int:
        """Size of the action set."""
        return self._num_actions

    def reset(self) -> Frames:
        """Starts an episode in every environment, with the same seeds at each call.

        Raises:
          EnvironmentFailedError: it raises an error, or shows what its space does not contain.
        """
        self._last, self._steps = np.zeros(self.num_environments, bool), 0
        observation, _ = self._call(self._envs.reset, seed=self._seed)
        return begun(self._frame(observation))

    def step_frames(self, action: np.ndarray) -> Frames:
        """Takes `action` int32 [E].

        Raises:
          ValueError: an action is outside the action set.
          EnvironmentFailedError: it raises an error, or shows what its space does not contain.
        """
        check_actions(action, self._num_actions)
        self._steps += 1
        actions = action.astype(np.int64) + self._start
        observation, reward, terminated, truncated, _ = self._call(self._envs.step, actions)
        self._require_finite(reward)
        ended = terminated | truncated
        next_step = self._mode == AutoresetMode.NEXT_STEP
        frame = self._frame(observation)
        if self._mode == AutoresetMode.DISABLED and ended.any():
            frame = self._reset(ended, frame)
        first = self._last if next_step else ended
        self._last = ended if next_step else np.zeros_like(ended)
        return Frames(
            frame=frame,
            reward=np.array(reward, np.float32),
            terminated=terminated,
            truncated=truncated,
            life_lost=np.zeros_like(ended),
            first=first,
            last=self._last,
        )

    def render(self) -> np.ndarray:
        """The picture of the first environment, uint8 [height, width, 3].

        Raises:
          EnvironmentFailedError: it draws none.
        """
        picture, reason = np.asarray(None), ''
        try:
            if pictures := self._envs.render():
                picture = np.asarray(pictures[0])
        except Exception as error:  # the user's code, or a missing package, may raise anything
            reason = f' ({brief(error)})'
        if picture.dtype.kind == 'f':
            picture = np.round(255 * picture).astype(np.uint8)
        if picture.dtype != np.uint8 or picture.ndim != 3:
            raise EnvironmentFailedError(
                f'{self._name}: draws no picture{reason}. Fix: let it take render_mode rgb_array,'
                ' or install what it draws with, or film nothing (--no-video).'
            )
        return picture

    def close(self) -> None:
        """Closes the environments; processes of their own end within seconds."""
        inner = self._envs.unwrapped
        if isinstance(inner, AsyncVectorEnv):
            close_processes(inner)
        self._envs.close()

    def __enter__(self) -> 'VectorEnvironment':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _reset(self, ended: np.ndarray, frame: np.ndarray) -> np.ndarray:
        """Starts the next episode where one has `ended` bool [E]; returns the frames.

        Raises:
          EnvironmentFailedError: others start, too.
        """
        options = {'reset_mask': ended.copy()}
        observation, _ = self._call(self._envs.reset, options=options)
        started = self._frame(observation)
        if not np.array_equal(started[~ended], frame[~ended]):
            what = 'reset starts episodes outside reset_mask'
            raise self._failed(what, 'reset only those that options["reset_mask"] names')
        return started

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
          EnvironmentFailedError: the method raises an error.
        """
        try:
            return method(*args, **kwargs)
        except EnvironmentFailedError:
            raise
        except Exception as error:  # the user's code may raise anything
            what = f'{method.__name__} {failure_text(error)}'
            raise self._failed(what, f'correct its {method.__name__}()') from error

    def _frame(self, observation: Any) -> np.ndarray:
        """A copy of the observations, of the frames' type.

        Raises:
          EnvironmentFailedError: one is not in its space, or not finite.
        """
        space = self._envs.single_observation_space
        if not self._envs.observation_space.contains(observation):
            number, shown = self._wrong(observation)
            what = f'observation {shown} is not in its space {brief_space(space)}'
            raise self._failed(what, 'correct the observation or observation_space', number)
        frame = observation
        if self._structured:  # gymnasium's vector wrapper for this takes no same-step resets
            rows = iterate(self._envs.observation_space, observation)
            frame = np.stack([spaces.flatten(space, row) for row in rows])
        if self.frame_spec.dtype.startswith('float') and not np.isfinite(frame).all():
            finite = np.isfinite(frame).reshape(self.num_environments, -1).all(1)
            number = int(np.flatnonzero(~finite)[0])
            what = f'observation {described(frame[number])} is not finite'
            raise self._failed(what, 'show finite numbers', number)
        return np.array(frame, self.frame_spec.dtype)

    def _wrong(self, observation: Any) -> tuple[int | None, str]:
        """Number and description of the first observation outside its space."""
        try:
            rows = list(iterate(self._envs.observation_space, observation))
        except Exception:  # not even a batch
            rows = []
        if len(rows) == self.num_environments:
            for number, row in enumerate(rows):
                if not self._envs.single_observation_space.contains(row):
                    return number, described(row)
        return None, described(observation)

    def _require_finite(self, reward: Any) -> None:
        """
        Raises:
          EnvironmentFailedError: not every environment has a finite reward.
        """
        finite = np.shape(reward) == (self.num_environments,) and np.isfinite(reward)
        if not np.all(finite):
            number = None if finite is False else int(np.flatnonzero(~finite)[0])
            shown = described(reward) if number is None else reward[number]
            raise self._failed(f'reward {shown}', 'return a finite number for each', number)

    def _failed(self, what: str, remedy: str, number: int | None = None) -> EnvironmentFailedError:
        which = '' if number is None else f', environment {number}'
        where = f'{self._name}{which}, step {self._steps}'
        return EnvironmentFailedError(f'{where}: {what}. Fix: {remedy}.')


def mode_of(name: str, environments: VectorEnv) -> AutoresetMode:
    """When the environments start the next episode.

    Raises:
      EnvironmentFailedError: they do not say.
    """
    # gymnasium's own write it to metadata that all environments of a class share.
    own = getattr(environments.unwrapped, 'autoreset_mode', None)
    declared = own or environments.metadata.get('autoreset_mode')
    if isinstance(declared, AutoresetMode):
        return declared
    modes = ' or '.join(str(mode) for mode in AutoresetMode)
    raise EnvironmentFailedError(
        f"{name}: metadata['autoreset_mode'] is {declared!r}. Fix: set it to {modes}."
    )


def actions_of(name: str, space: gymnasium.Space) -> tuple[int, int]:
    """First and number of a space's actions.

    Raises:
      EnvironmentFailedError: they are not numbered.
    """
    if not isinstance(space, spaces.Discrete):
        raise EnvironmentFailedError(
            f'{name}: actions {brief_space(space)} are not discrete. Fix: choose an environment'
            ' with a Discrete action space, or wrap it to have one.'
        )
    return int(space.start), int(space.n)


def require_arrays(name: str, space: gymnasium.Space) -> None:
    """
    Raises:
      EnvironmentFailedError: observations, or parts of them, are not arrays of one shape.
    """
    if (unfit := _unfit(space)) is not None:
        raise EnvironmentFailedError(
            f'{name}: observations {brief_space(unfit)} have no fixed shape. Fix: choose or wrap an'
            ' environment with Box, Discrete, MultiDiscrete or MultiBinary observations, or Dict or'
            ' Tuple of these.'
        )


def _unfit(space: gymnasium.Space) -> gymnasium.Space | None:
    """The first part of a space that holds no arrays of one shape, or is empty."""
    if not isinstance(space, (spaces.Dict, spaces.Tuple)):
        fits = isinstance(space, _ARRAYS) and 0 not in space.shape
        return None if fits else space
    parts = tuple(space.values()) if isinstance(space, spaces.Dict) else space.spaces
    found = [unfit for part in parts if (unfit := _unfit(part)) is not None]
    return found[0] if found else None if parts else space


def spec_of(space: spaces.Box) -> FrameSpec:
    """The frames of a space; truth values become the numbers 0 and 1."""
    kind = np.dtype(np.uint8) if space.dtype == bool else np.dtype(space.dtype)
    low, high = (float(bound.min()) for bound in (space.low, space.high))
    even = np.all(space.low == space.low.flat[0]) and np.all(space.high == space.high.flat[0])
    bounded = even and np.isfinite(low) and np.isfinite(high)
    return FrameSpec(space.shape, kind.name, *((low, high) if bounded else (None, None)))
