"""Gymnasium's vector environments: actions in, observations, rewards and ends of episodes out."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers.vector import FlattenObservation

from agents.environments.atari import check_actions, emulator_seeds
from agents.environments.checked import brief_space, described
from agents.environments.errors import EnvironmentFailedError
from agents.environments.frames import Frames, FrameSpec
from infra.named_function import brief

FLATTENED = (
    spaces.Dict,
    spaces.Tuple,
    spaces.Discrete,
    spaces.MultiDiscrete,
    spaces.MultiBinary,
)
"""Spaces whose observations become one vector: one-hot numbers, parts of a structure in turn."""


class VectorEnvironment:
    """E environments of gymnasium, in a `with`.

    With next-step resets, which gymnasium's own vector environments have by default, the last
    observation of an episode is a frame of its own, from which a truncated episode bootstraps.
    Same-step resets and none show the next episode at once: a transition that would bootstrap from
    a truncated episode's last observation is left out.
    """

    def __init__(self, name: str, environments: VectorEnv, seed: int) -> None:
        """`name` stands in errors.

        Raises:
          EnvironmentFailedError: its actions or observations are of an unknown kind.
        """
        self._name = name
        self._start, self._num_actions = actions_of(name, environments.single_action_space)
        if isinstance(environments.single_observation_space, FLATTENED):
            environments = FlattenObservation(environments)
        self._envs = environments
        self._space = require_box(name, environments.single_observation_space)
        self.num_environments = environments.num_envs
        self.frame_spec = spec_of(self._space)
        self._mode = environments.metadata.get('autoreset_mode', AutoresetMode.NEXT_STEP)
        self._seeds = [int(each) for each in emulator_seeds(seed, self.num_environments)]
        self._last = np.zeros(self.num_environments, bool)
        self._steps = 0

    @property
    def num_actions(self) -> int:
        """Size of the action set."""
        return self._num_actions

    def reset(self) -> Frames:
        """Starts an episode in every environment, with the same seeds at each call."""
        observation, _ = self._envs.reset(seed=self._seeds)
        nothing = np.zeros(self.num_environments, bool)
        self._last, self._steps = nothing, 0
        return Frames(
            frame=self._frame(observation),
            reward=np.zeros(self.num_environments, np.float32),
            terminated=nothing,
            truncated=nothing,
            life_lost=nothing,
            first=~nothing,
            last=nothing,
        )

    def step_frames(self, action: np.ndarray) -> Frames:
        """Takes `action` int32 [E].

        Raises:
          ValueError: an action is outside the action set.
          EnvironmentFailedError: an environment shows what its space does not contain.
        """
        check_actions(action, self._num_actions)
        self._steps += 1
        observation, reward, terminated, truncated, _ = self._envs.step(action + self._start)
        ended = terminated | truncated
        next_step = self._mode == AutoresetMode.NEXT_STEP
        if self._mode == AutoresetMode.DISABLED and ended.any():
            observation, _ = self._envs.reset(options={'reset_mask': ended})
        first = self._last if next_step else ended
        self._last = ended if next_step else np.zeros_like(ended)
        return Frames(
            frame=self._frame(observation),
            reward=np.asarray(reward, np.float32),
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
        """Ends processes; one that hangs is killed."""
        if isinstance(self._envs.unwrapped, gymnasium.vector.AsyncVectorEnv):
            self._envs.close(terminate=True)
        else:
            self._envs.close()

    def __enter__(self) -> 'VectorEnvironment':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _frame(self, observation: np.ndarray) -> np.ndarray:
        """A copy of the observations, of the frames' type.

        Raises:
          EnvironmentFailedError: one is not in the space.
        """
        if not self._envs.observation_space.contains(observation):
            wrong = [each for each in observation if not self._space.contains(each)]
            shown = described(wrong[0] if wrong else observation)
            raise EnvironmentFailedError(
                f'{self._name}, step {self._steps}: observation {shown} is not in its space'
                f' {brief_space(self._space)}. Fix: correct the observation or observation_space.'
            )
        return np.array(observation, self.frame_spec.dtype)


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


def require_box(name: str, space: gymnasium.Space) -> spaces.Box:
    """
    Raises:
      EnvironmentFailedError: observations are not arrays of one shape.
    """
    if isinstance(space, spaces.Box) and space.shape:
        return space
    raise EnvironmentFailedError(
        f'{name}: observations {brief_space(space)} have no fixed shape. Fix: choose or wrap an'
        ' environment with Box, Discrete, MultiDiscrete or MultiBinary observations, or Dict or'
        ' Tuple of these.'
    )


def spec_of(space: spaces.Box) -> FrameSpec:
    """The frames of a space; truth values become the numbers 0 and 1."""
    kind = np.dtype(np.uint8) if space.dtype == bool else np.dtype(space.dtype)
    low, high = (float(bound.min()) for bound in (space.low, space.high))
    even = np.all(space.low == space.low.flat[0]) and np.all(space.high == space.high.flat[0])
    bounded = even and np.isfinite(low) and np.isfinite(high)
    return FrameSpec(space.shape, kind.name, *((low, high) if bounded else (None, None)))
