"""TensorFlow variables and NumPy arrays in the same memory, without a call between them.

A call of a TensorFlow graph wakes another thread and waits for it. That takes 0.2 ms on idle cores,
and a multiple of it on busy ones.
"""

import ctypes
import math
import mmap
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from infra.array_function import HOST, ArrayFunction

_ALIGNMENT = 64  # bytes; TensorFlow copies memory that is less aligned


def aligned_arrays(shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Arrays float32 of zeros whose memory TensorFlow uses without a copy."""
    item = np.dtype(np.float32).itemsize
    sizes = [math.prod(shape) for shape in shapes]
    starts = np.cumsum([0, *(-(-size * item // _ALIGNMENT) * _ALIGNMENT for size in sizes)])
    memory = mmap.mmap(-1, max(int(starts[-1]), 1))  # begins on a page
    return [
        np.frombuffer(memory, np.float32, size, start).reshape(shape)
        for shape, size, start in zip(shapes, sizes, starts)
    ]


def memory_of(variable: tf.Variable) -> np.ndarray:
    """An array on the memory of a float32 variable, to read what kernels write and to write to it.

    The array is float32, of the variable's shape.

    TensorFlow updates a variable in place as long as nothing else holds its value. `assign`, or an
    update while a tensor of the value exists, gives it other memory: the array is then invalid. So
    only the owner of the variable may use this, and only kernels may update it.

    Raises:
      ValueError: the variable is on an accelerator.
    """
    if not variable.device.endswith(HOST):
        raise ValueError(f'{variable.name} is on {variable.device}: a variable of {HOST} is needed')
    # Gives the variable memory of its own: its first value may be a constant of TensorFlow.
    variable.assign_add(tf.zeros_like(variable))
    address = memory_address(variable)
    size = variable.shape.num_elements()
    memory = (ctypes.c_float * size).from_address(address)
    return np.frombuffer(memory, np.float32).reshape(variable.shape)


def memory_address(variable: tf.Variable) -> int:
    """The address of the variable's value; creates a tensor (see infra/array_function.py)."""
    return np.asarray(memoryview(variable.value())).__array_interface__['data'][0]


class SharedVariables:
    """Variables on the memory of arrays: what is written to an array is the variable's value.

    Holds until something assigns to or updates a variable, which gives it other memory.
    """

    def __init__(self, variables: Sequence[tf.Variable], device: str = HOST) -> None:
        """
        Args:
          variables: float32.
          device: of the variables; those of an accelerator get a copy of an array's values.
        """
        signature = [tf.TensorSpec(variable.shape, tf.float32) for variable in variables]

        def assign(*values: tf.Tensor) -> None:
            for variable, value in zip(variables, values):
                variable.assign(value)

        self._assign = ArrayFunction(assign, signature, device=device)

    def move_to(self, arrays: Sequence[np.ndarray]) -> None:
        """Gives each variable the values and the memory of its array (see `aligned_arrays`)."""
        self._assign(*arrays)
