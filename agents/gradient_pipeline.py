"""Batches in, gradients out: one at a time on a CPU, in a pipeline on an accelerator.

`Ahead` runs three stages at once, with two slots of memory on the device:

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
"""Maps a sample to importance weights float32 [B], or to None for a uniform replay."""


class Computed(NamedTuple):
    """A gradient with the sample and parameters it was computed from."""

    sample: Any  # of the replay
    version: int  # of the parameters: global updates
    gradient: np.ndarray  # float32 [parameters]
    loss: np.ndarray  # float32 [], mean without weights
    absolute_error: np.ndarray  # float32 [B]
    clip_factor: np.ndarray  # float32 [], 1 if the gradient was not clipped


class GradientStream(Protocol):
    """The learner's source of gradients."""

    def next(self, weights: Weights) -> Computed: ...

    def parameters(self) -> np.ndarray: ...

    def set_parameters(self, parts: Sequence[np.ndarray], version: int) -> None: ...

    def set_target(self, parts: Sequence[np.ndarray]) -> None: ...

    def close(self) -> None: ...


def stream_on(device_name: str) -> Callable[[Any, Iterator[Any]], GradientStream]:
    """Chooses the stream for a device: `Ahead` if batches must be copied to it, else `InTurn`."""
    if is_host(device_name):
        return InTurn
    return Ahead


class InTurn:
    """Computes each gradient on request, from the newest parameters."""

    def __init__(self, network: Any, samples: Iterator[Any]) -> None:
        """
        Args:
          network: computes gradients (see `agents.learner.Network`).
          samples: yields samples of the replay.
        """
        self._network = network
        self._samples = samples
        self._version = 0

    def next(self, weights: Weights) -> Computed:
        """The next gradient; raises what `samples` raises."""
        sample = next(self._samples)
        result = self._network.gradient(sample.transition, weights(sample))
        return Computed(sample, self._version, *result)

    def parameters(self) -> np.ndarray:
        """A copy of the newest parameters, float32 [parameters]."""
        return self._network.parameters()

    def set_parameters(self, parts: Sequence[np.ndarray], version: int) -> None:
        """Sets the network from float32 vectors that concatenate to [parameters]."""
        self._network.set_parameters(*parts)
        self._version = version

    def set_target(self, parts: Sequence[np.ndarray]) -> None:
        """Sets the target network likewise."""
        self._network.set_target(*parts)

    def close(self) -> None:
        """Does nothing: no computation is pending."""


class Ahead:
    """Computes each gradient while the one before it is tested and pushed.

    Its parameters are therefore one update older than with `InTurn`. New parameters are assigned
    between two gradients, never during one.

    Attributes:
      slots: memory for the batch that is copied and for the one that is computed.
      staged: future of the next slot's sample.
      computing: the pending gradient.
    """

    def __init__(self, network: Any, samples: Iterator[Any]) -> None:
        """
        Args:
          network: an `agents.gradient.AgentGradient`.
          samples: yields samples of the replay; one thread at a time calls it.
        """
        self._network = network
        self._samples = samples
        self.slots: tuple[_Slot, ...] = ()
        self._stager = ThreadPoolExecutor(1, 'batch-to-device')
        self._computer = ThreadPoolExecutor(1, 'gradient')
        self.staged: Future | None = None
        self.computing: _UnderWay | None = None
        self._begun = 0  # gradients
        self._version = 0
        self._waiting_parameters: np.ndarray | None = None  # for the next gradient
        self._waiting_target: np.ndarray | None = None

    def next(self, weights: Weights) -> Computed:
        """Returns the next gradient and starts the one after it if its batch is ready.

        Raises what `samples` raises, but never in place of a finished gradient.
        """
        done = self.computing or self._begin(weights)
        self.computing = None
        done.end.result()
        # A finished gradient does not wait for the next batch. An error here is ignored: the next
        # call draws a new batch and raises the error if it persists.
        if self.staged is not None and self.staged.done():
            with contextlib.suppress(Exception):
                self.computing = self._begin(weights)
        return Computed(done.sample, done.version, *done.slot.fetch())

    def parameters(self) -> np.ndarray:
        """A copy of the newest parameters, float32 [parameters], assigned yet or not."""
        waiting = self._waiting_parameters
        return self._network.parameters() if waiting is None else waiting.copy()

    def set_parameters(self, parts: Sequence[np.ndarray], version: int) -> None:
        """Sets the network's parameters before the next gradient starts; copies `parts`."""
        self._waiting_parameters = np.concatenate(parts)
        self._version = version

    def set_target(self, parts: Sequence[np.ndarray]) -> None:
        """Sets the target network likewise."""
        self._waiting_target = np.concatenate(parts)

    def close(self) -> None:
        """Waits for running computations and drops their gradients."""
        for executor in (self._stager, self._computer):
            executor.shutdown(cancel_futures=True)

    def _begin(self, weights: Weights) -> '_UnderWay':
        """Starts the next gradient, then the copy of the following batch to the device."""
        staged, self.staged = self.staged or self._stage(weights), None
        sample = staged.result()
        slot = self.slots[self._begun % 2]
        self._set_waiting()
        under_way = _UnderWay(sample, self._version, slot, self._computer.submit(slot.compute))
        self._begun += 1
        self.staged = self._stage(weights)
        return under_way

    def _stage(self, weights: Weights) -> Future:
        """Starts to copy a sample to the device; the future returns the sample."""
        index = self._begun % 2

        def stage() -> Any:
            sample = next(self._samples)
            of_rows = weights(sample)
            batch = (sample.transition,) if of_rows is None else (sample.transition, of_rows)
            self.slots = self.slots or tuple(_Slot(self._network, batch) for _ in range(2))
            self.slots[index].stage(*batch)
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
    """A gradient whose computation is pending."""

    sample: Any
    version: int
    slot: '_Slot'
    end: Future


class _Slot:
    """Memory on the network's device for one batch and its gradient.

    Attributes:
      stage: copies a batch and its weights, if there are any, to the device.
      compute: computes the gradient of the staged batch.
      batch, results: variables for the batch's arrays and for what `fetch` returns.
      fetch: returns what the network's `gradient` returns.
    """

    def __init__(self, network: Any, batch: Sequence[Any]) -> None:
        self._network = network
        self._signature = tf.nest.map_structure(
            lambda array: tf.TensorSpec(array.shape, array.dtype), batch
        )
        specs = tf.nest.flatten(self._signature)
        rows = specs[0].shape[0]
        with tf.device(network.device):
            self.batch = [_variable(spec.shape, _kept(spec.dtype)) for spec in specs]
            self.results = [
                _variable(shape, tf.float32) for shape in ([network.size], [], [rows], [])
            ]
        self.stage = ArrayFunction(self._stage, self._signature, device=network.device)
        self.compute = ArrayFunction(self._compute, device=network.device)
        self.fetch = ArrayFunction(self._fetch, device=network.device)

    def _stage(self, *batch: Any) -> None:
        for variable, tensor in zip(self.batch, tf.nest.flatten(batch), strict=True):
            variable.assign(tf.cast(tensor, variable.dtype))

    def _compute(self) -> None:
        specs = tf.nest.flatten(self._signature)
        tensors = [tf.cast(*each) for each in zip(self.batch, (spec.dtype for spec in specs))]
        batch = tf.nest.pack_sequence_as(self._signature, tensors)
        for variable, result in zip(self.results, self._network.flat_gradient(*batch)):
            variable.assign(result)

    def _fetch(self) -> tuple[tf.Tensor, ...]:
        return tuple(variable.read_value() for variable in self.results)


def _variable(shape: Any, kind: tf.DType) -> tf.Variable:
    return tf.Variable(tf.zeros(shape, kind), trainable=False)


def _kept(kind: tf.DType) -> tf.DType:
    """The type of an array's variable: TensorFlow has no int32 variables on a GPU."""
    return tf.int64 if kind == tf.int32 else kind
