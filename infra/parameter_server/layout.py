"""Layout: named variables in, one flat float32 vector and its equal slices out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """The fixed order in which a network's variables make one flat vector.

    Attributes:
      names: one name per variable, in order.
      shapes: one shape per variable, in the same order.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        """Normalises lists (from JSON) to tuples.

        Raises:
          ValueError: the numbers of names and shapes differ, or the variables have no element.
        """
        object.__setattr__(self, 'names', tuple(str(name) for name in self.names))
        shapes = tuple(tuple(int(length) for length in shape) for shape in self.shapes)
        object.__setattr__(self, 'shapes', shapes)
        if len(self.names) != len(self.shapes):
            raise ValueError(
                f'{len(self.names)} names for {len(self.shapes)} shapes; give one name per shape'
            )
        if self.size == 0:
            raise ValueError(f'the layout {self.names} holds no element; give it a variable')

    @classmethod
    def from_variables(cls, variables: Sequence) -> Layout:
        """Returns the layout of TensorFlow variables, or arrays, in the given order."""
        return cls(
            names=tuple(getattr(v, 'name', str(index)) for index, v in enumerate(variables)),
            shapes=tuple(tuple(v.shape) for v in variables),
        )

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each variable."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @functools.cached_property
    def size(self) -> int:
        """Number of elements of the flat vector."""
        return sum(self.sizes)

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """Index of each variable's first element in the flat vector."""
        ends = np.cumsum(self.sizes).tolist()
        return (0, *ends[:-1])

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of the shapes, in order.

        It ignores names, which serve messages only. Keras numbers layers per process, so equal
        networks may have different names.
        """
        text = json.dumps(self.shapes)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def slices(self, num_shards: int) -> tuple[slice, ...]:
        """Returns each shard's contiguous part, equal in size to within one element.

        Raises:
          ValueError: `num_shards` is below 1 or above the number of elements.
        """
        if not 1 <= num_shards <= self.size:
            raise ValueError(
                f'{self.size} parameters cannot be split over {num_shards} shards; '
                f'use between 1 and {self.size}'
            )
        bounds = [shard * self.size // num_shards for shard in range(num_shards + 1)]
        return tuple(slice(start, stop) for start, stop in zip(bounds[:-1], bounds[1:]))

    def flatten(self, arrays: Sequence) -> np.ndarray:
        """Returns float32 [size] from one array per variable.

        Raises:
          ValueError: the shapes differ from the layout's.
        """
        shapes = tuple(tuple(np.shape(array)) for array in arrays)
        if shapes != self.shapes:
            raise ValueError(f'arrays of shapes {shapes} do not fit the layout {self.describe()}')
        return np.concatenate([np.asarray(array, np.float32).ravel() for array in arrays])

    def unflatten(self, flat: np.ndarray) -> list[np.ndarray]:
        """Returns one view per variable into `flat` [size].

        Raises:
          ValueError: the shape of `flat` is not [size].
        """
        if flat.shape != (self.size,):
            raise ValueError(f'a vector of shape {flat.shape} does not fit {self.describe()}')
        return [
            flat[offset : offset + size].reshape(shape)
            for offset, size, shape in zip(self.offsets, self.sizes, self.shapes)
        ]

    def describe(self) -> str:
        """Returns the fingerprint, size and variables on one line, for messages."""
        variables = ', '.join(f'{n}{list(s)}' for n, s in zip(self.names, self.shapes))
        return f'layout {self.fingerprint} ({self.size} parameters: {variables})'

    def to_json(self) -> dict:
        """Returns the arguments of `Layout` in JSON types."""
        return {'names': list(self.names), 'shapes': [list(shape) for shape in self.shapes]}
