"""Calls a TensorFlow graph with NumPy arrays and takes NumPy arrays from it.

TensorFlow 2.15 on Python 3.11 loses 48 bytes with every tensor that Python sees
(https://github.com/tensorflow/tensorflow/issues/62551); a worker that lives for millions of calls
must not see any. Here the graph itself fetches its inputs and delivers its outputs, as arrays on
the tensors' own memory (an input that is not aligned as TensorFlow wants it is copied).
"""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf


HOST = '/device:CPU:0'
"""Where arrays are, in TensorFlow's words."""


class _Mailbox:
    """Where a graph fetches its inputs and leaves its outputs.

    TensorFlow keeps what a `numpy_function` refers to as long as the thread that traced it: it may
    refer to this, not to the function, whose graph and variables would live as long.
    """

    def __init__(self) -> None:
        self.inputs: tuple[np.ndarray, ...] = ()
        self.outputs: tuple[np.ndarray, ...] = ()

    def fetch(self) -> tuple[np.ndarray, ...]:
        return self.inputs

    def deliver(self, *outputs: np.ndarray) -> None:
        for output in outputs:
            output.setflags(write=False)  # it may be a variable's memory, or a constant's
        self.outputs = outputs


class ArrayFunction:
    """A function of tensors, traced once, called with arrays; for one thread at a time.

    It is traced without AutoGraph, which takes 10 s over TF-Agents' code.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        signature: Sequence['tf.TensorSpec'] = (),
        cancellation: Any = None,
        device: str = HOST,
    ) -> None:
        """Traces `function`.

        Args:
          function: takes tensors of `signature`; returns a structure with a tensor for every
            leaf and at least one, or None.
          signature: of the arguments, in order.
          cancellation: a TensorFlow CancellationManager that may end a call from another thread.
          device: what computes; arrays come from the host and go back there.
        """
        import tensorflow as tf

        self._function = function
        self._device = device
        self._signature = tuple(signature)
        self._types = tuple(np.dtype(spec.dtype.as_numpy_dtype) for spec in self._signature)
        self._mailbox = _Mailbox()
        self._idle = threading.Lock()
        self._structure: Any = None
        # A concrete function is called in a third of the time that `tf.function` takes to find it.
        self._run = tf.function(self._graph, autograph=False).get_concrete_function()
        if cancellation is not None:
            self._run = cancellation.get_cancelable_function(self._run)

    def __call__(self, *arrays: Any) -> Any:
        """The function's structure, with arrays for its tensors (scalars are NumPy's scalars).

        An input is read in place: a variable that the function assigns, or an output that is the
        input in another shape, may go on sharing its memory. Outputs can not be written to.

        Raises:
          ValueError: the arrays do not fit the signature; nothing was computed.
          RuntimeError: another thread's call is under way; nothing was computed.
        """
        import tensorflow as tf

        inputs = tuple(map(np.asarray, arrays))
        self._check(inputs)
        if not self._idle.acquire(blocking=False):
            raise RuntimeError('called while another thread calls it: make one for each thread')
        mailbox = self._mailbox
        try:
            mailbox.inputs = inputs
            self._run()
            outputs = mailbox.outputs
        finally:
            mailbox.inputs = mailbox.outputs = ()  # what is held here could not be written in place
            self._idle.release()
        return tf.nest.pack_sequence_as(self._structure, outputs) if outputs else None

    def _graph(self) -> None:
        import tensorflow as tf

        inputs = []
        if self._signature:
            types = [spec.dtype for spec in self._signature]
            with tf.device(HOST):
                inputs = tf.numpy_function(self._mailbox.fetch, [], types)
            for tensor, spec in zip(inputs, self._signature, strict=True):
                tensor.set_shape(spec.shape)  # held to by _check
        with tf.device(self._device):
            outputs = self._function(*inputs)
        if outputs is not None:
            self._structure = tf.nest.map_structure(lambda _: None, outputs)
            with tf.device(HOST):
                tf.numpy_function(self._mailbox.deliver, tf.nest.flatten(outputs), [])

    def _check(self, arrays: tuple[np.ndarray, ...]) -> None:
        if len(arrays) != len(self._signature):
            raise ValueError(f'{len(arrays)} arrays given, {len(self._signature)} are needed')
        expected = zip(arrays, self._signature, self._types, strict=True)
        for i, (array, spec, kind) in enumerate(expected):
            if array.dtype != kind or not spec.shape.is_compatible_with(array.shape):
                raise ValueError(
                    f'argument {i}: {array.dtype}{list(array.shape)} given, {kind}{spec.shape} is'
                    ' needed'
                )
