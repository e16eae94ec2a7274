"""Gymnasium's observations: a space and batches of what it holds in, frames out.

A frame is nested as its space is: a dictionary for `Dict`, a tuple for `Tuple`, else an array.
Numbers of `Discrete` and `MultiDiscrete` are one-hot in uint8, truth values 0 and 1 in uint8,
single values vectors of one; all other arrays keep shape and type.

This module does not import TensorFlow.
"""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import tree
from gymnasium import spaces
from gymnasium.vector.utils import create_empty_array

from agents.environments.checked import brief_space
from agents.environments.errors import EnvironmentFailedError
from agents.environments.frames import FrameSpec, part_at

MOST_VALUES = 65_536
"""Of a number that is one-hot or an action: each has weights of its own in the network."""
_ARRAYS = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


class Observations:
    """Converts observations of a space to frames.

    Attributes:
      frame_spec: of the frames, a `FrameSpec` or a nest of them.
    """

    def __init__(self, name: str, space: gymnasium.Space) -> None:
        """`name` stands in errors.

        Raises:
          EnvironmentFailedError: a part of the space holds no arrays of one shape, or has too many
            values to be one-hot.
        """
        parts = tree.flatten_with_path(space)
        _require_arrays(name, space, [part for _, part in parts])
        _require_few_values(name, [part for _, part in parts])
        _require_names(name, space, [path for path, _ in parts])
        self._specs = [_spec_of(part) for _, part in parts]
        self._encoders = [_encoder_of(part) for _, part in parts]
        self._paths = [path for path, _ in parts]
        plain = create_empty_array(space)  # of dictionaries and tuples, where a space has its own
        self.frame_spec = tree.unflatten_as(plain, self._specs)

    def frames(self, observation: Any) -> Any:
        """The frames [E, ...] of a batch of observations; copies them."""
        arrays = []
        for path, encode, spec in zip(self._paths, self._encoders, self._specs):
            array = np.array(encode(part_at(path, observation)), spec.dtype)
            arrays.append(array.reshape(-1, *spec.shape))
        return tree.unflatten_as(self.frame_spec, arrays)


def _require_arrays(name: str, space: gymnasium.Space, parts: list[gymnasium.Space]) -> None:
    """
    Raises:
      EnvironmentFailedError: observations, or parts of them, are not arrays of one shape.
    """
    unfit = [part for part in parts if not isinstance(part, _ARRAYS) or 0 in part.shape]
    if unfit or not parts:
        raise EnvironmentFailedError(
            f'{name}: observations {brief_space(unfit[0] if unfit else space)} have no fixed shape.'
            ' Fix: choose or wrap an environment with Box, Discrete, MultiDiscrete or MultiBinary'
            ' observations, or Dict or Tuple of these.'
        )


def _require_few_values(name: str, parts: list[gymnasium.Space]) -> None:
    """
    Raises:
      EnvironmentFailedError: a part is one-hot and too large.
    """
    for part in parts:
        if isinstance(part, (spaces.Discrete, spaces.MultiDiscrete)):
            count = sum(map(int, _choices_of(part)[0]))
            if count > MOST_VALUES:
                raise EnvironmentFailedError(
                    f'{name}: observations {brief_space(part)} are one-hot arrays of {count:,}'
                    f' numbers, more than {MOST_VALUES:,}. Fix: wrap the environment to show a Box'
                    ' or a MultiDiscrete of few values (digits, coordinates).'
                )


def _require_names(name: str, space: gymnasium.Space, paths: list[tuple]) -> None:
    """
    Raises:
      EnvironmentFailedError: a key of a dictionary is no string, as files of policies need it.
    """
    for path in paths:
        for depth, key in enumerate(path):
            if isinstance(part_at(path[:depth], space), spaces.Dict) and not isinstance(key, str):
                raise EnvironmentFailedError(
                    f'{name}: observations have a part named {key!r}, not a string. Fix: choose'
                    ' strings as keys of the Dict.'
                )


def _spec_of(space: gymnasium.Space) -> FrameSpec:
    """The frames of a space that holds arrays."""
    if isinstance(space, spaces.MultiBinary):
        return FrameSpec(space.shape, space.dtype.name, 0, 1)
    if not isinstance(space, spaces.Box):
        return FrameSpec((int(_choices_of(space)[0].sum()),), 'uint8', 0, 1)
    kind = 'uint8' if space.dtype == bool else space.dtype.name
    low, high = (float(bound.min()) for bound in (space.low, space.high))
    even = np.all(space.low == low) and np.all(space.high == high)
    bounded = even and np.isfinite([low, high]).all()
    return FrameSpec(space.shape or (1,), kind, *((low, high) if bounded else (None, None)))


def _choices_of(space: spaces.Discrete | spaces.MultiDiscrete) -> tuple[np.ndarray, np.ndarray]:
    """Number of values and first value of each of the space's numbers, int [numbers]."""
    sizes = space.n if isinstance(space, spaces.Discrete) else space.nvec
    return np.ravel(sizes), np.ravel(space.start)


def _encoder_of(space: gymnasium.Space) -> Callable[[np.ndarray], np.ndarray]:
    """Maps batches of a space's arrays to those of its frames, but for type and single values."""
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        return lambda array: array
    sizes, first = _choices_of(space)
    number = np.repeat(np.arange(len(sizes)), sizes)
    value = np.concatenate([start + np.arange(size) for size, start in zip(sizes, first)])
    return lambda array: np.reshape(array, (-1, len(sizes)))[:, number] == value
