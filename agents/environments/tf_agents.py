"""TF-Agents' environments: actions in, observations, rewards and ends of episodes out."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tf_agents.environments import batched_py_environment, py_environment
from tf_agents.specs import array_spec
from tf_agents.trajectories import time_step as ts

from agents.environments.atari import check_actions
from agents.environments.checked import described
from agents.environments.errors import EnvironmentFailedError, failure_text
from agents.environments.frames import Frames, FrameSpec
from agents.environments.vector import require_few_actions

_NUMBERS = 'biuf'  # NumPy's kinds: truth values, integers with and without sign, floats


class TfAgentsEnvironment:
    """A batched `PyEnvironment`, or E single ones stepped in turn; in a `with`.

    By TF-Agents' convention the step after a LAST one ignores the action and returns the FIRST of
    the next episode. Frames are nested as observations are; single values become vectors of one,
    truth values 0 and 1 in uint8.
    """

    def __init__(self, name: str, environments: Sequence[py_environment.PyEnvironment]) -> None:
        """`name` stands in errors.

        Raises:
          EnvironmentFailedError: actions or observations are of an unknown kind, or differ.
        """
        self._name = name
        self._envs = environments[0] if environments[0].batched else _batched(name, environments)
        self.num_environments = self._envs.batch_size or 1
        self._start, self._num_actions = _actions_of(name, self._envs.action_spec())
        spec = self._envs.observation_spec()
        _require_numbers(name, spec)
        self.frame_spec = tf.nest.map_structure(_frames_of, spec)
        self._batch = array_spec.add_outer_dims_nest(spec, (self.num_environments,))
        self._last = np.zeros(self.num_environments, bool)
        self._steps = 0

    @property
    def num_actions(self) -> int:
        """Size of the action set."""
        return self._num_actions

    def reset(self) -> Frames:
        """Starts an episode in every environment.

        Raises:
          EnvironmentFailedError: it raises an error, or shows what its spec does not allow.
        """
        self._steps = 0
        self._last = np.zeros(self.num_environments, bool)
        return self._frames(self._call(self._envs.reset))

    def step_frames(self, action: np.ndarray) -> Frames:
        """Takes `action` int32 [E].

        Raises:
          ValueError: an action is outside the action set.
          EnvironmentFailedError: it raises an error, or shows what its spec does not allow.
        """
        check_actions(action, self._num_actions)
        self._steps += 1
        actions = (action.astype(np.int64) + self._start).astype(self._envs.action_spec().dtype)
        return self._frames(self._call(self._envs.step, actions))

    def render(self) -> np.ndarray:
        """The picture of the first environment, uint8 [height, width, 3].

        Raises:
          EnvironmentFailedError: it draws none.
        """
        picture = np.asarray(self._call(self._envs.render, 'rgb_array'))
        picture = picture[0] if picture.ndim == 4 else picture
        if picture.dtype != np.uint8 or picture.ndim != 3:
            raise self._failed(f'render shows {described(picture)}', 'draw uint8, or film nothing')
        return picture

    def close(self) -> None:
        """Closes the environments."""
        self._envs.close()

    def __enter__(self) -> 'TfAgentsEnvironment':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _frames(self, step: ts.TimeStep) -> Frames:
        """
        Raises:
          EnvironmentFailedError: the step breaks TF-Agents' rules.
        """
        frame = self._frame(step.observation)
        first, last = np.array(step.is_first()), np.array(step.is_last())
        over = np.asarray(step.discount) == 0.0
        self._require_rules(step, first, last)
        self._last = last
        return Frames(
            frame=frame,
            reward=np.where(first, 0.0, step.reward).astype(np.float32),
            terminated=last & over,
            truncated=last & ~over,
            life_lost=np.zeros_like(first),
            first=first,
            last=last,
        )

    def _require_rules(self, step: ts.TimeStep, first: np.ndarray, last: np.ndarray) -> None:
        """
        Raises:
          EnvironmentFailedError: a reward is not finite, an episode continues after its LAST step,
            or a discount within it is not 1.
        """
        shape = (self.num_environments,)
        if not shape == np.shape(step.reward) == np.shape(step.discount) == first.shape:
            raise self._failed(
                f'reward {described(step.reward)}, discount {described(step.discount)}',
                'return one number for each environment',
            )
        wrong = ~first & ~np.isfinite(step.reward)
        self._forbid(wrong, 'reward {0}', step.reward, 'return a finite number')
        what = 'the step after the LAST of an episode is not the FIRST of the next'
        self._forbid(self._last & ~first, what, first, 'call reset() there (handle_auto_reset)')
        wrong = ~first & ~last & (np.asarray(step.discount) != 1.0)
        remedy = 'return 1 there, 0 at an end; set --discount'
        self._forbid(wrong, 'discount {0} within an episode', step.discount, remedy)

    def _forbid(self, wrong: np.ndarray, what: str, value: Any, remedy: str) -> None:
        if wrong.any():
            number = int(np.flatnonzero(wrong)[0])
            raise self._failed(what.format(value[number]), remedy, number)

    def _frame(self, observation: Any) -> Any:
        """A copy of the observations, as frames.

        Raises:
          EnvironmentFailedError: the observation is not of its spec, or not finite.
        """
        if not array_spec.check_arrays_nest(observation, self._batch):
            raise self._failed(
                f'observation {_described(observation)} is not of its spec'
                f' {_on_one_line(self._envs.observation_spec())}',
                'correct the observation or observation_spec()',
                self._outside(observation),
            )
        return tf.nest.map_structure(self._array, self.frame_spec, observation)

    def _array(self, spec: FrameSpec, column: np.ndarray) -> np.ndarray:
        """One array of the frames.

        Raises:
          EnvironmentFailedError: it is not finite.
        """
        rows = column.reshape(self.num_environments, *spec.shape)
        finite = np.isfinite(rows).reshape(self.num_environments, -1).all(1)
        shown = [f'observation {described(row)} is not finite' for row in rows[~finite][:1]]
        self._forbid(~finite, ''.join(shown), rows, 'show finite numbers')
        return rows.astype(spec.dtype)

    def _outside(self, observation: Any) -> int | None:
        """Number of the first environment whose observation is not of the spec, if one is."""
        spec = self._envs.observation_spec()
        for number in range(self.num_environments):
            try:
                row = tf.nest.map_structure(lambda part, i=number: part[i, ...], observation)
            except Exception:  # not even a batch
                return None
            if not array_spec.check_arrays_nest(row, spec):
                return number
        return None

    def _call(self, method: Callable[..., Any], *args: Any) -> Any:
        """
        Raises:
          EnvironmentFailedError: the method raises an error.
        """
        try:
            return method(*args)
        except Exception as error:  # the user's code may raise anything
            what = f'{method.__name__} {failure_text(error)}'
            raise self._failed(what, f'correct its {method.__name__}()') from error

    def _failed(self, what: str, remedy: str, number: int | None = None) -> EnvironmentFailedError:
        which = '' if number is None else f', environment {number}'
        where = f'{self._name}{which}, step {self._steps}'
        return EnvironmentFailedError(f'{where}: {what}. Fix: {remedy}.')


def _batched(
    name: str, environments: Sequence[py_environment.PyEnvironment]
) -> batched_py_environment.BatchedPyEnvironment:
    try:
        return batched_py_environment.BatchedPyEnvironment(list(environments), multithreading=False)
    except ValueError as error:
        remedy = 'let each seed make an environment of the same specs'
        raise EnvironmentFailedError(f'{name}: {failure_text(error)}. Fix: {remedy}.') from error


def _actions_of(name: str, spec: Any) -> tuple[int, int]:
    """First and number of the actions.

    Raises:
      EnvironmentFailedError: they are not numbered, or too many.
    """
    numbered = isinstance(spec, array_spec.BoundedArraySpec) and spec.shape == ()
    if not numbered or not np.issubdtype(spec.dtype, np.integer):
        raise EnvironmentFailedError(
            f'{name}: actions {_on_one_line(spec)} are not discrete. Fix: choose an environment'
            ' with a bounded integer action, or wrap it (tf_agents.environments.wrappers).'
        )
    count = int(spec.maximum) - int(spec.minimum) + 1
    require_few_actions(name, count)
    return int(spec.minimum), count


def _require_numbers(name: str, spec: Any) -> None:
    """
    Raises:
      EnvironmentFailedError: observations hold nothing, or what is no number.
    """
    parts = tf.nest.flatten(spec)
    fits = [np.dtype(part.dtype).kind in _NUMBERS and 0 not in part.shape for part in parts]
    if not parts or not all(fits):
        shown = _on_one_line(parts[fits.index(False)] if parts else spec)
        raise EnvironmentFailedError(
            f'{name}: observations {shown} are no numbers of a fixed shape. Fix: choose or wrap an'
            ' environment with arrays of numbers (tf_agents.environments.wrappers).'
        )


def _on_one_line(spec: Any) -> str:
    text = ' '.join(str(spec).split())
    return text if len(text) <= 200 else f'{text[:197]}...'


def _described(observation: Any) -> str:
    parts = tf.nest.flatten(observation)
    return ', '.join(described(part) for part in parts)[:200]


def _frames_of(spec: array_spec.ArraySpec) -> FrameSpec:
    shape, kind = spec.shape or (1,), np.dtype(spec.dtype)
    if kind.kind == 'b':
        return FrameSpec(shape, 'uint8', 0, 1)
    bounds: tuple[float | None, float | None] = (None, None)
    if isinstance(spec, array_spec.BoundedArraySpec):
        low, high = np.asarray(spec.minimum), np.asarray(spec.maximum)
        even = (low == low.flat[0]).all() and (high == high.flat[0]).all()
        if even and np.isfinite([low.flat[0], high.flat[0]]).all():
            bounds = float(low.flat[0]), float(high.flat[0])
    return FrameSpec(shape, kind.name, *bounds)
