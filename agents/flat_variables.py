"""A network's variables as one flat float32 vector: parts from the parameter server in, values out.

The vector concatenates the variables in the given order, each in row-major order, like the
parameter server's `Layout`.
"""

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from infra.array_function import ArrayFunction


class FlatVariables:
    """A network's trainable variables as one float32 vector [parameters].

    Attributes:
      variables: in the order of the vector.
      size: number of parameters.
      device: TensorFlow's name of the variables' device.
    """

    def __init__(self, variables: Sequence[tf.Variable]) -> None:
        self.variables = tuple(variables)
        self.size = sum(variable.shape.num_elements() for variable in self.variables)
        # TensorFlow takes page-aligned memory without a copy, so a variable may share this buffer.
        # It must never share the memory of a part, which belongs to the caller.
        memory = mmap.mmap(-1, self.size * np.dtype(np.float32).itemsize)
        self._flat = np.frombuffer(memory, np.float32)
        self.device = self.variables[0].device
        flat = tf.TensorSpec([self.size], tf.float32)
        self._assign = ArrayFunction(self._assign_all, [flat], device=self.device)
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
        arrays = [np.asarray(part) for part in parts]
        sizes, types = [array.shape for array in arrays], {array.dtype for array in arrays}
        if any(len(size) != 1 for size in sizes) or sum(size[0] for size in sizes) != self.size:
            raise ValueError(self._misfit(f'of shapes {sizes}'))
        if types != {np.dtype(np.float32)}:
            raise ValueError(self._misfit(f'of types {sorted(map(str, types))}'))
        np.concatenate(arrays, out=self._flat)
        self._assign(self._flat)

    def _concatenated(self) -> tf.Tensor:
        return tf.concat([tf.reshape(variable, [-1]) for variable in self.variables], axis=0)

    def _misfit(self, what: str) -> str:
        return (
            f'parameters {what} given, the network takes float32[{self.size}]: they belong to'
            ' another game or network.'
        )

    def _assign_all(self, flat: tf.Tensor) -> None:
        begin = 0
        for variable in self.variables:
            end = begin + variable.shape.num_elements()
            variable.assign(tf.reshape(flat[begin:end], variable.shape))
            begin = end
