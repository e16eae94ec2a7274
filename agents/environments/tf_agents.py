"""TF-Agents' environments: actions in, observations, rewards and ends of episodes out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tf_agents.environments import batched_py_environment, py_environment
from tf_agents.specs import array_spec

from agents.environments.errors import EnvironmentFailedError
from agents.environments.frames import Frames, FrameSpec


class TfAgentsEnvironment:
    """A batched `PyEnvironment`, or E single ones stepped in turn; in a `with`.

    By TF-Agents' convention the step after a LAST one ignores the action and returns the FIRST of
    the next episode. Observations that are structures become one vector float32, parts in turn.
    """

    def __init__(self, name: str, environments: Sequence[py_environment.PyEnvironment]) -> None:
        """`name` stands in errors.

        Raises:
          EnvironmentFailedError: actions or observations are of an unknown kind.
        """
        single = not environments[0].batched
        self._envs = (
            batched_py_environment.BatchedPyEnvironment(list(environments), multithreading=False)
            if single
            else environments[0]
        )
        self._name = name
        self.num_environments = self._envs.batch_size or 1
        self._start, self._num_actions = _actions_of(name, self._envs.action_spec())
        spec = self._envs.observation_spec()
        self._structured = not isinstance(spec, array_spec.ArraySpec)
        self.frame_spec = _vector_of(spec) if self._structured else _frames_of(spec)

    @property
    def num_actions(self) -> int:
        """Size of the action set."""
        return self._num_actions

    def reset(self) -> Frames:
        """Starts an episode in every environment."""
        return self._frames(self._envs.reset())

    def step_frames(self, action: np.ndarray) -> Frames:
        """Takes `action` int32 [E].

        Raises:
          EnvironmentFailedError: an observation or a reward is not finite.
        """
        kind = self._envs.action_spec().dtype
        return self._frames(self._envs.step((action + self._start).astype(kind)))

    def render(self) -> np.ndarray:
        """The picture of the first environment, uint8 [height, width, 3]."""
        picture = np.asarray(self._envs.render('rgb_array'))
        return picture[0] if picture.ndim == 4 else picture

    def close(self) -> None:
        """Closes the environments."""
        self._envs.close()

    def __enter__(self) -> 'TfAgentsEnvironment':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _frames(self, step: Any) -> Frames:
        first, last = np.asarray(step.is_first()), np.asarray(step.is_last())
        reward = np.where(first, 0.0, step.reward).astype(np.float32)
        frame = self._frame(step.observation)
        if not np.isfinite(reward).all() or not np.isfinite(frame).all():
            raise EnvironmentFailedError(
                f'{self._name}: an observation or a reward is not finite (rewards'
                f' {reward.tolist()}). Fix: correct its step().'
            )
        over = np.asarray(step.discount) == 0.0
        return Frames(
            frame=frame,
            reward=reward,
            terminated=last & over,
            truncated=last & ~over,
            life_lost=np.zeros_like(first),
            first=first,
            last=last,
        )

    def _frame(self, observation: Any) -> np.ndarray:
        if not self._structured:
            return np.array(observation, self.frame_spec.dtype)
        parts = [np.asarray(part) for part in tf.nest.flatten(observation)]
        rows = [part.reshape(self.num_environments, -1) for part in parts]
        return np.concatenate(rows, axis=1).astype(np.float32)


def _actions_of(name: str, spec: Any) -> tuple[int, int]:
    """First and number of the actions.

    Raises:
      EnvironmentFailedError: they are not numbered.
    """
    numbered = isinstance(spec, array_spec.BoundedArraySpec) and spec.shape == ()
    if not numbered or not np.issubdtype(spec.dtype, np.integer):
        raise EnvironmentFailedError(
            f'{name}: actions {spec} are not discrete. Fix: choose an environment with a bounded'
            ' integer action, or wrap it (tf_agents.environments.wrappers).'
        )
    return int(spec.minimum), int(spec.maximum) - int(spec.minimum) + 1


def _vector_of(spec: Any) -> FrameSpec:
    sizes = [int(np.prod(part.shape)) for part in tf.nest.flatten(spec)]
    return FrameSpec((sum(sizes),), 'float32')


def _frames_of(spec: array_spec.ArraySpec) -> FrameSpec:
    kind = np.dtype(np.uint8) if spec.dtype == bool else np.dtype(spec.dtype)
    bounds: tuple[float | None, float | None] = (None, None)
    if isinstance(spec, array_spec.BoundedArraySpec):
        low, high = np.asarray(spec.minimum), np.asarray(spec.maximum)
        even = (low == low.flat[0]).all() and (high == high.flat[0]).all()
        if even and np.isfinite([low.flat[0], high.flat[0]]).all():
            bounds = float(low.flat[0]), float(high.flat[0])
    return FrameSpec(spec.shape or (1,), kind.name, *bounds)
