"""Atari as a TF-Agents `PyEnvironment`: actions in, TimeSteps of stacked frames out.

`AtariPyEnvironment` plays a batch of games. `SingleAtariPyEnvironment` plays one game without a
batch dimension, as `ParallelPyEnvironment`, `BatchedPyEnvironment`, the wrappers (`TimeLimit`, ...)
and the Reverb observers require. Prefer the batch where both work: its games share one call of the
policy and one process.
"""

from typing import Any

import numpy as np
import tree
from gymnasium.vector import AutoresetMode
from tf_agents.environments import py_environment
from tf_agents.specs import array_spec, tensor_spec
from tf_agents.trajectories import time_step as ts
from tf_agents.typing import types
from tf_agents.utils import nest_utils

from agents.config import EnvironmentConfig
from agents.environments import atari, frames
from agents.environments.frames import FrameSpec

_NOOP = 0  # first in every minimal action set


def observation_spec(config: EnvironmentConfig) -> array_spec.BoundedArraySpec:
    """uint8 [screen_size, screen_size, frame_stack] without the batch dimension."""
    part = frames.atari_frame(config.screen_size).stacked(config.frame_stack)
    return array_spec.BoundedArraySpec(part.shape, np.uint8, part.low, part.high, 'observation')


def time_step_spec(config: EnvironmentConfig) -> ts.TimeStep:
    """Array spec of a TimeStep of one environment."""
    return ts.time_step_spec(observation_spec(config))


def action_spec(num_actions: int) -> array_spec.BoundedArraySpec:
    """int32 scalar in 0 .. num_actions - 1."""
    return array_spec.BoundedArraySpec((), np.int32, 0, num_actions - 1, 'action')


def specs(
    frame: Any, frame_stack: int, num_actions: int
) -> tuple[ts.TimeStep, array_spec.BoundedArraySpec]:
    """Array specs of a TimeStep and an action of one environment that shows such frames.

    `frame` is a `FrameSpec`, or a nest of them; observations are nested likewise.
    """

    def observed(path: tuple, part: FrameSpec) -> array_spec.ArraySpec:
        shape, kind = part.stacked(frame_stack).shape, np.dtype(part.dtype)
        name = '/'.join(['observation', *map(str, path)])
        if part.low is None or part.high is None:
            return array_spec.ArraySpec(shape, kind, name)
        return array_spec.BoundedArraySpec(shape, kind, part.low, part.high, name)

    observation = tree.map_structure_with_path(observed, frame)
    return ts.time_step_spec(observation), action_spec(num_actions)


def same_arrays(one: Any, other: Any) -> bool:
    """Whether nests of specs have equal structures, shapes and types."""

    def arrays(nest: Any) -> list[tuple]:
        parts = tree.flatten_with_path(tensor_spec.from_spec(nest))
        return [(path, part.shape, part.dtype) for path, part in parts]

    return arrays(one) == arrays(other)


class AtariPyEnvironment(py_environment.PyEnvironment):
    """Plays E games by TF-Agents' conventions, for TF-Agents' own drivers and metrics.

    Rewards are raw. A LAST step shows the old episode's last frame. The step after it ignores the
    action and is the FIRST of the next episode. After the loss of a life (see
    `atari.AtariEnvironment`) that step is one no-op in the same game, and its reward is
    dropped. A game cut by the limit of frames ends with discount 1.

    `reset()` starts an episode in every game, as loops over `is_last()` and `TimeLimit` expect.
    Where every game is in mid-episode, it starts new games. Otherwise an episode that has just
    ended is followed by the next one, so after a lost life the same game continues, and games in
    mid-episode restart. Only the first reset is seeded; later ones continue the seed's stream of
    no-ops, so a caller that resets after every episode sees different starts.
    """

    def __init__(
        self, config: EnvironmentConfig, num_environments: int, seed: int, training: bool = True
    ) -> None:
        """
        Raises:
          GameError: `config.game` cannot be played.
        """
        # TF-Agents' own auto-reset restarts the whole batch; ours restarts single games.
        super().__init__(handle_auto_reset=False)
        self._config = config
        self._emulators = atari.make_emulators(config, num_environments, AutoresetMode.NEXT_STEP)
        self._stack = frames.FrameStack(
            num_environments, config.frame_stack, frames.atari_frame(config.screen_size)
        )
        self._seeds: np.ndarray | None = atari.emulator_seeds(seed, num_environments)
        self._lives_matter = training and config.life_loss_ends_episode
        self._lives = np.zeros(num_environments, np.int32)
        self._ended = np.zeros(num_environments, bool)

    @property
    def batched(self) -> bool:
        return True

    @property
    def batch_size(self) -> int:
        return self._emulators.num_envs

    def observation_spec(self) -> array_spec.BoundedArraySpec:
        return observation_spec(self._config)

    def action_spec(self) -> array_spec.BoundedArraySpec:
        return action_spec(int(self._emulators.single_action_space.n))

    def _reset(self) -> ts.TimeStep:
        if self._seeds is not None or not self._ended.any():
            frame, info = self._emulators.reset(seed=self._seeds)
        else:
            # One step continues the game after a lost life, or starts the next after a game's end.
            noops = np.full(self.batch_size, _NOOP, np.int32)
            frame, _, terminated, truncated, info = self._emulators.step(noops)
            given_up = ~self._ended | terminated | truncated
            if given_up.any():
                frame, info = self._emulators.reset(options={'reset_mask': given_up})
        self._seeds = None
        self._lives = info['lives']
        self._ended = np.zeros(self.batch_size, bool)
        first = np.ones(self.batch_size, bool)
        return ts.restart(self._stack.push(frame[:, 0], first).copy(), self.batch_size)

    def _step(self, action: np.ndarray) -> ts.TimeStep:
        """
        Raises:
          ValueError: `action` is not int [E], or is outside the game's minimal set.
        """
        first = self._ended
        # A policy may return a tensor: PyTFEagerPolicy does for batched time steps.
        action = np.asarray(action)
        if action.shape != (self.batch_size,) or not np.issubdtype(action.dtype, np.integer):
            raise ValueError(
                f'actions are {action.dtype} {action.shape}: integers, one per game,'
                f' ({self.batch_size},).'
            )
        atari.check_actions(action, self.action_spec().maximum + 1)
        frame, reward, terminated, truncated, info = self._emulators.step(
            np.where(first, _NOOP, action).astype(np.int32)
        )
        # If the no-op after a lost life ends the game, the episode starts with the next game.
        empty = first & (terminated | truncated)
        if empty.any():
            frame, info = self._emulators.reset(options={'reset_mask': empty})
        lives = info['lives']
        life_lost = (lives < self._lives) & self._lives_matter
        self._lives = lives
        # A `first` game is new or continues after a lost life, so it has lost no life since.
        over = (terminated | life_lost) & ~first
        self._ended = over | (truncated & ~first)
        step_type = np.where(first, ts.StepType.FIRST, ts.StepType.MID)
        return ts.TimeStep(
            step_type=np.where(self._ended, ts.StepType.LAST, step_type).astype(np.int32),
            reward=np.where(first, 0, reward).astype(np.float32),
            discount=np.where(over, 0, 1).astype(np.float32),
            observation=self._stack.push(frame[:, 0], first).copy(),
        )

    def seed(self, seed: types.Seed) -> None:
        """Makes the next `reset` start the same games as a new environment with this seed.

        Raises:
          TypeError, ValueError: `seed` is not an integer >= 0 or a sequence of such integers.
        """
        self._seeds = atari.emulator_seeds(seed, self.batch_size)

    def render(self, mode: str = 'rgb_array') -> np.ndarray:
        """The newest preprocessed frames, grey as RGB: uint8 [E, S, S, 3] of size S.

        Raises:
          NotImplementedError: `mode` is not 'rgb_array'.
          ValueError: `reset` was never called.
        """
        if mode != 'rgb_array':
            raise NotImplementedError(
                f'render: mode {mode!r} needs a window. Fix: use rgb_array and show the pictures.'
            )
        return np.repeat(self.current_time_step().observation[..., -1:], 3, axis=-1)

    def close(self) -> None:
        """Ends the emulators' threads."""
        self._emulators.close()


class SingleAtariPyEnvironment(py_environment.PyEnvironment):
    """Plays one game as `AtariPyEnvironment` does, without the batch dimension.

    Actions and rewards are scalars. `ParallelPyEnvironment` accepts the constructor
    `functools.partial(SingleAtariPyEnvironment, config, seed)`.
    """

    def __init__(self, config: EnvironmentConfig, seed: int, training: bool = True) -> None:
        """
        Raises:
          GameError: `config.game` cannot be played.
        """
        super().__init__(handle_auto_reset=False)
        self._batch = AtariPyEnvironment(config, 1, seed, training)

    def observation_spec(self) -> array_spec.BoundedArraySpec:
        return self._batch.observation_spec()

    def action_spec(self) -> array_spec.BoundedArraySpec:
        return self._batch.action_spec()

    def _reset(self) -> ts.TimeStep:
        return nest_utils.unbatch_nested_array(self._batch.reset())

    def _step(self, action: Any) -> ts.TimeStep:
        return nest_utils.unbatch_nested_array(self._batch.step(np.expand_dims(action, 0)))

    def seed(self, seed: types.Seed) -> None:
        """Makes the next `reset` start the same game as a new environment with this seed."""
        self._batch.seed(seed)

    def render(self, mode: str = 'rgb_array') -> np.ndarray:
        """The newest preprocessed frame, grey as RGB: uint8 [S, S, 3] of size S."""
        return self._batch.render(mode)[0]

    def close(self) -> None:
        """Ends the emulator's thread."""
        self._batch.close()
