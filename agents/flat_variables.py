"""A network's variables as one flat float32 vector: parts from the parameter server in, values out.

The vector concatenates the variables in the given order, each in row-major order, like the
parameter server's `Layout`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from agents.device import is_host
from infra.array_function import ArrayFunction
from infra.array_variables import SharedVariables, aligned_arrays


class FlatVariables:
    """A network's trainable variables as one float32 vector [parameters].

    On the host the variables lie in this object's memory, so that `assign` is a copy between
    arrays. Nothing else may assign to them.

    Attributes:
      variables: in the order of the vector.
      size: number of parameters.
      device: TensorFlow's name of the variables' device.
    """

    def __init__(self, variables: Sequence[tf.Variable]) -> None:
        self.variables = tuple(variables)
        self.size = sum(variable.shape.num_elements() for variable in self.variables)
        self.device = self.variables[0].device
        self._in_place = all(is_host(variable.device) for variable in self.variables)
        self._shared = SharedVariables(self.variables, self.device)
        self._arrays: list[np.ndarray] = []  # once something was assigned
        self._read: ArrayFunction | None = None  # traced when first needed

    def values(self) -> np.ndarray:
        """A copy of all parameters, float32 [parameters]."""
        if self._read is None:
            self._read = ArrayFunction(self._concatenated, device=self.device)
        return np.array(self._read())

    def assign(self, *parts: Any) -> None:
        """Sets all variables from float32 vectors that concatenate to [parameters].

        No other thread may compute with the variables meanwhile: it could read old and new values.

        Raises:
          ValueError: the parts have a wrong total size or type; no variable was changed.
        """
        vectors = self._checked(parts)
        arrays = self._arrays or self._allocate()
        _scatter(vectors, arrays)
        if not (self._arrays and self._in_place):
            self._shared.move_to(arrays)
        self._arrays = arrays

    @contextlib.contextmanager
    def holding(self, *parts: Any) -> Iterator[None]:
        """The variables have other values in the context, in memory that is never written again.

        What copies them there may keep sharing that memory.

        Raises:
          ValueError: as `assign`.
        """
        vectors = self._checked(parts)
        if not self._arrays:
            self.assign(self.values())
        other = self._allocate()
        _scatter(vectors, other)
        self._shared.move_to(other)
        try:
            yield
        finally:
            self._shared.move_to(self._arrays)

    def _allocate(self) -> list[np.ndarray]:
        return aligned_arrays([variable.shape for variable in self.variables])

    def _checked(self, parts: Sequence[Any]) -> list[np.ndarray]:
        arrays = [np.asarray(part) for part in parts]
        sizes, types = [array.shape for array in arrays], {array.dtype for array in arrays}
        if any(len(size) != 1 for size in sizes) or sum(size[0] for size in sizes) != self.size:
            raise ValueError(self._misfit(f'of shapes {sizes}'))
        if types != {np.dtype(np.float32)}:
            raise ValueError(self._misfit(f'of types {sorted(map(str, types))}'))
        return arrays

    def _concatenated(self) -> tf.Tensor:
        return tf.concat([tf.reshape(variable, [-1]) for variable in self.variables], axis=0)

    def _misfit(self, what: str) -> str:
        return (
            f'parameters {what} given, the network takes float32[{self.size}]: they belong to'
            ' another game or network.'
        )


def _scatter(parts: Sequence[np.ndarray], arrays: Sequence[np.ndarray]) -> None:
    """Copies vectors to arrays of the same total size, each filled in row-major order."""
    remaining = iter(parts)
    part = next(remaining)
    for array in arrays:
        target = array.reshape(-1)
        while target.size:
            if not part.size:
                part = next(remaining)
            count = min(part.size, target.size)
            target[:count] = part[:count]
            target, part = target[count:], part[count:]
