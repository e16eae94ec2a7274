"""Calls a TensorFlow graph: NumPy arrays in, NumPy arrays out, no tensor visible to Python.

TensorFlow 2.15 on Python 3.11 leaks 48 bytes for every tensor that Python handles
(https://github.com/tensorflow/tensorflow/issues/62551), too much for a worker with millions of
calls. Here the graph itself fetches its inputs and delivers its outputs as arrays that share the
tensors' memory. TensorFlow copies an input only if its memory is not aligned.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tree

HOST = '/device:CPU:0'
"""TensorFlow's name of the device that holds NumPy arrays."""


class _Mailbox:
    """Holds the inputs that a graph fetches and the outputs that it delivers.

    TensorFlow keeps the objects that a `numpy_function` references as long as the thread that
    traced it. A reference to the `ArrayFunction` would keep its graph and variables alive.
    """

    def __init__(self) -> None:
        self.inputs: tuple[np.ndarray, ...] = ()
        self.outputs: tuple[np.ndarray, ...] = ()

    def fetch(self) -> tuple[np.ndarray, ...]:
        return self.inputs

    def deliver(self, *outputs: np.ndarray) -> None:
        for output in outputs:
            output.setflags(write=False)  # may be the memory of a variable or a constant
        self.outputs = outputs


class ArrayFunction:
    """A function of tensors, traced once and called with arrays by one thread at a time.

    Traces without AutoGraph, which takes 10 s on TF-Agents' code.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        signature: Sequence[Any] = (),
        cancellation: Any = None,
        device: str = HOST,
    ) -> None:
        """Traces `function`.

        Args:
          function: takes tensors of `signature`; returns a structure whose leaves, at least one,
            are tensors, or None.
          signature: a TensorSpec for each argument, or a nest of them.
          cancellation: a TensorFlow CancellationManager that cancels a call from another thread.
          device: device that computes; arrays are copied from and to the host.
        """
        import tensorflow as tf

        self._function = function
        self._device = device
        self._signature = tuple(signature)
        self._specs = tuple(tf.nest.flatten(self._signature))
        self._types = tuple(np.dtype(spec.dtype.as_numpy_dtype) for spec in self._specs)
        self._mailbox = _Mailbox()
        self._idle = threading.Lock()
        self._structure: Any = None
        self._shapes = tuple(tuple(spec.shape.as_list()) for spec in self._specs)
        # Kept, since TensorFlow forgets a function with the last reference to it.
        self._concrete = tf.function(self._graph, autograph=False).get_concrete_function()
        self._run = _direct(self._concrete)
        if cancellation is not None:
            self._run = cancellation.get_cancelable_function(self._run)

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function with arrays, nested as its signature.

        Returns its structure with arrays in place of tensors.

        The function reads inputs in place. A variable that it assigns, or an output that reshapes
        an input, may share the input's memory after the call. Outputs are read-only.

        Raises:
          ValueError: the arrays do not fit the signature; the function was not called.
          RuntimeError: a call of another thread is running; the function was not called.
        """
        inputs = tuple(map(np.asarray, tree.flatten(arguments)))
        self._check(inputs)
        if not self._idle.acquire(blocking=False):
            raise RuntimeError('called while another thread calls it: make one for each thread')
        mailbox = self._mailbox
        try:
            mailbox.inputs = inputs
            self._run()
            outputs = mailbox.outputs
        finally:
            mailbox.inputs = mailbox.outputs = ()  # arrays held here could not be written in place
            self._idle.release()
        return tree.unflatten_as(self._structure, outputs) if outputs else None

    def _graph(self) -> None:
        import tensorflow as tf

        inputs = []
        if self._specs:
            types = [spec.dtype for spec in self._specs]
            with tf.device(HOST):
                inputs = tf.numpy_function(self._mailbox.fetch, [], types)
            for tensor, spec in zip(inputs, self._specs, strict=True):
                tensor.set_shape(spec.shape)  # _check enforces it
        with tf.device(self._device):
            outputs = self._function(*tf.nest.pack_sequence_as(self._signature, inputs))
        if outputs is not None:
            self._structure = tf.nest.map_structure(lambda _: None, outputs)
            with tf.device(HOST):
                tf.numpy_function(self._mailbox.deliver, tf.nest.flatten(outputs), [])

    def _check(self, arrays: tuple[np.ndarray, ...]) -> None:
        if len(arrays) != len(self._specs):
            raise ValueError(f'{len(arrays)} arrays given, {len(self._specs)} are needed')
        expected = zip(arrays, self._shapes, self._types, strict=True)
        for i, (array, shape, kind) in enumerate(expected):
            if array.dtype != kind or not _fits(array.shape, shape):
                raise ValueError(
                    f'argument {i}: {array.dtype}{list(array.shape)} given,'
                    f' {kind}{self._specs[i].shape} is needed'
                )


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    pairs = zip(shape, expected)
    return len(shape) == len(expected) and all(wanted in (None, size) for size, wanted in pairs)


def _direct(concrete: Any) -> Callable[[], Any]:
    """A call of a function without arguments and results, without the layers of Python around it.

    They take a quarter of the time of a small network's call. TensorFlow has no public names for
    the runtime's call and for errors with the user's lines, but requirements.txt pins the version.
    """
    from tensorflow.python.eager import context
    from tensorflow.python.eager.polymorphic_function import atomic_function

    call, captured = context.context().call_function, list(concrete.captured_inputs)
    with_lines = atomic_function.InterpolateRuntimeError(concrete._inference_function)

    def run() -> None:
        with with_lines:
            call(concrete.name, captured, 0)

    return run
