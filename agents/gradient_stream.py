"""Batches in, gradients out, one after the other: in turn, or ahead of time on an accelerator.

`Ahead` keeps three things under way at once, each in its own memory on the device:

    host     ... batch k+2 -> device        gradient k -> host -> outlier test, push
    device              gradient k+1 is computed
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from agents.device import is_host
from infra.array_function import ArrayFunction

Weights = Callable[[Any], np.ndarray | None]
"""A sample to the importance weights float32 [B] of its rows, None when there are none."""


class Computed(NamedTuple):
    """A gradient and what it came from."""

    sample: Any  # of the replay
    versions: tuple[int, ...]  # of the parameters, by shard
    gradient: np.ndarray  # float32 [parameters]
    loss: np.ndarray  # float32 [], mean without weights
    absolute_error: np.ndarray  # float32 [B]


class GradientStream(Protocol):
    """What the learner draws gradients from."""

    def next(self, weights: Weights) -> Computed: ...

    def parameters(self) -> np.ndarray: ...

    def set_parameters(self, parts: Sequence[np.ndarray], versions: tuple[int, ...]) -> None: ...

    def set_target(self, parts: Sequence[np.ndarray]) -> None: ...

    def close(self) -> None: ...


def stream_on(device_name: str) -> Callable[[Any, Iterator[Any]], GradientStream]:
    """The stream that suits a device: `Ahead` where batches and gradients have to travel."""
    if is_host(device_name):
        return InTurn
    return Ahead


class InTurn:
    """Each gradient when it is asked for, from the newest parameters."""

    def __init__(self, network: Any, samples: Iterator[Any]) -> None:
        """
        Args:
          network: computes gradients, see `agents.learner.Network`.
          samples: of the replay.
        """
        self._network = network
        self._samples = samples
        self._versions: tuple[int, ...] = ()

    def next(self, weights: Weights) -> Computed:
        """The next gradient; raises what `samples` raises."""
        sample = next(self._samples)
        result = self._network.gradient(sample.transition, weights(sample))
        return Computed(sample, self._versions, *result)

    def parameters(self) -> np.ndarray:
        """A copy of the newest parameters, float32 [parameters]."""
        return self._network.parameters()

    def set_parameters(self, parts: Sequence[np.ndarray], versions: tuple[int, ...]) -> None:
        """Sets the network's parameters, float32 vectors that make up [parameters]."""
        self._network.set_parameters(*parts)
        self._versions = versions

    def set_target(self, parts: Sequence[np.ndarray]) -> None:
        """Sets the target network's, likewise."""
        self._network.set_target(*parts)

    def close(self) -> None:
        """Nothing is under way."""


class Ahead:
    """Each gradient is computed while the one before it is on its way.

    So its parameters are an update older than those of `InTurn`. What arrives is set between two
    gradients, never under one.
    """

    def __init__(self, network: Any, samples: Iterator[Any]) -> None:
        """
        Args:
          network: an `agents.gradient.AgentGradient`.
          samples: of the replay; drawn by one thread at a time, not always the same.
        """
        self._network = network
        self._samples = samples
        self._slots: tuple[_Slot, ...] = ()
        self._stager = ThreadPoolExecutor(1, 'batch-to-device')
        self._computer = ThreadPoolExecutor(1, 'gradient')
        self._staged: Future | None = None  # of the next slot
        self._computing: _UnderWay | None = None
        self._begun = 0  # gradients
        self._versions: tuple[int, ...] = ()
        self._waiting_parameters: np.ndarray | None = None  # for the next gradient
        self._waiting_target: np.ndarray | None = None

    def next(self, weights: Weights) -> Computed:
        """The next gradient, while the one behind it is being computed.

        Raises what `samples` raises, but never in place of a gradient that is done.
        """
        done = self._computing or self._begin(weights)
        self._computing = None
        done.end.result()
        # A gradient that is done does not wait for the batch of another. What else stands in the
        # way now, the next call meets again: it draws anew.
        if self._staged is not None and self._staged.done():
            with contextlib.suppress(Exception):
                self._computing = self._begin(weights)
        return Computed(done.sample, done.versions, *done.slot.fetch())

    def parameters(self) -> np.ndarray:
        """A copy of the newest parameters, float32 [parameters], set already or not."""
        waiting = self._waiting_parameters
        return self._network.parameters() if waiting is None else waiting.copy()

    def set_parameters(self, parts: Sequence[np.ndarray], versions: tuple[int, ...]) -> None:
        """Sets the network's parameters before the next gradient begins; `parts` are copied."""
        self._waiting_parameters = np.concatenate(parts)
        self._versions = versions

    def set_target(self, parts: Sequence[np.ndarray]) -> None:
        """Sets the target network's, likewise."""
        self._waiting_target = np.concatenate(parts)

    def close(self) -> None:
        """Waits for what is under way; gradients that nobody asked for are dropped."""
        for executor in (self._stager, self._computer):
            executor.shutdown(cancel_futures=True)

    def _begin(self, weights: Weights) -> '_UnderWay':
        """Begins a gradient, and behind it the way of the next batch to the device."""
        staged, self._staged = self._staged or self._stage(weights), None
        sample = staged.result()
        slot = self._slots[self._begun % 2]
        self._set_waiting()
        under_way = _UnderWay(sample, self._versions, slot, self._computer.submit(slot.compute))
        self._begun += 1
        self._staged = self._stage(weights)
        return under_way

    def _stage(self, weights: Weights) -> Future:
        """Begins to bring a sample to the device; its end gives the sample."""
        index = self._begun % 2

        def stage() -> Any:
            sample = next(self._samples)
            of_rows = weights(sample)
            columns = (*sample.transition, *(() if of_rows is None else (of_rows,)))
            self._slots = self._slots or tuple(_Slot(self._network, columns) for _ in range(2))
            self._slots[index].stage(*columns)
            return sample

        return self._stager.submit(stage)

    def _set_waiting(self) -> None:
        parameters, self._waiting_parameters = self._waiting_parameters, None
        target, self._waiting_target = self._waiting_target, None
        if target is not None:
            self._network.set_target(target)
        if parameters is not None:
            self._network.set_parameters(parameters)


class _UnderWay(NamedTuple):
    """A gradient that is being computed."""

    sample: Any
    versions: tuple[int, ...]
    slot: '_Slot'
    end: Future


class _Slot:
    """Memory on the network's device for a batch and its gradient, and what moves them.

    Attributes:
      stage: takes the columns of a batch, and weights if there are any, as arrays.
      compute: takes what was staged to a gradient.
      fetch: gives float32 [parameters] gradient, float32 [] loss, float32 [B] absolute error.
    """

    def __init__(self, network: Any, columns: Sequence[Any]) -> None:
        specs = [tf.TensorSpec(column.shape, column.dtype) for column in columns]
        self._network = network
        self._types = [spec.dtype for spec in specs]
        rows = specs[0].shape[0]
        with tf.device(network.device):
            self._batch = [_variable(spec.shape, _kept(spec.dtype)) for spec in specs]
            self._results = [_variable(shape, tf.float32) for shape in ([network.size], [], [rows])]
        self.stage = ArrayFunction(self._stage, specs, device=network.device)
        self.compute = ArrayFunction(self._compute, device=network.device)
        self.fetch = ArrayFunction(self._fetch, device=network.device)

    def _stage(self, *columns: tf.Tensor) -> None:
        for variable, column in zip(self._batch, columns, strict=True):
            variable.assign(tf.cast(column, variable.dtype))

    def _compute(self) -> None:
        columns = [
            tf.cast(variable, kind) for variable, kind in zip(self._batch, self._types, strict=True)
        ]
        for variable, result in zip(self._results, self._network.flat_gradient(*columns)):
            variable.assign(result)

    def _fetch(self) -> tuple[tf.Tensor, ...]:
        return tuple(variable.read_value() for variable in self._results)


def _variable(shape: Any, kind: tf.DType) -> tf.Variable:
    return tf.Variable(tf.zeros(shape, kind), trainable=False)


def _kept(kind: tf.DType) -> tf.DType:
    """The type to keep a column as: TensorFlow has no variables of int32 on a GPU."""
    return tf.int64 if kind == tf.int32 else kind
