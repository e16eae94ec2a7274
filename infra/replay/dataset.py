"""Dataset: addresses of replay shards in, batches of n-step transitions out.

    shard 0 -> sampler -> to_transition -> one piece waiting \
    shard 1 -> sampler -> to_transition -> one piece waiting  -> batch, pieces taken in turn
    ...

One thread per shard fetches pieces of a batch. The dataset takes pieces in turn from the shards
that have one, so a dead, slow or starved shard affects only its share of the mixture.

Each shard has one piece at the sampler, one in the thread and one waiting, so at most three batches
are in flight over all shards. More would let a learner train on samples that the limiter counted
long before; fewer could starve it (a piece takes 5 ms, an update tens of ms). Only with shards that
are far away, where each request costs a round trip, should the sampler ask for more at once.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from infra.array_function import ArrayFunction
from infra.replay.config import EXPERIENCE_TABLE
from infra.replay.errors import (
    ReplayError,
    ReplaySpecMismatch,
    ReplayTimeout,
    ReplayUnavailable,
)
from infra.replay.status import require_spec
from infra.replay.trajectory import TrajectorySpec, Transition, compiled_to_transition

if TYPE_CHECKING:
    import tensorflow as tf

_LOGGER = logging.getLogger(__name__)
_SLICE_SECONDS = 0.2  # longest delay until a stop request is noticed
_RETRY_SECONDS = 1.0  # between two attempts to read a shard
_JOIN_SECONDS = 5.0
_PROBE_SECONDS = 1  # Reverb's client takes whole seconds only


class Sample(NamedTuple):
    """A sampled batch; all arrays."""

    transition: Transition
    key: Any  # uint64[B], identifies the item at its shard for changes of its priority
    probability: Any  # float64[B], of drawing the item at its shard
    table_size: Any  # int64[B], items at its shard when it was drawn
    shard: Any  # int32[B], index into the addresses


def piece_size(batch_size: int, num_shards: int) -> int:
    """Samples per fetch from a shard: the batch's largest divisor within the shard's share."""
    share = max(1, batch_size // num_shards)
    return max(size for size in range(1, share + 1) if batch_size % size == 0)


class _ShardReader:
    """Keeps one piece of a batch from one shard ready, in its own thread."""

    def __init__(
        self, address: str, shard: int, size: int, in_flight: int, to_sample: Any, changed: Any
    ):
        """`changed` is the condition to notify when a piece arrives."""
        from tensorflow.python.eager import cancellation

        self.shard = shard
        self.piece: Sample | None = None
        self.mismatch: ReplaySpecMismatch | None = None
        self._address = address
        self._size, self._in_flight = size, in_flight
        self._to_sample = to_sample
        self._changed = changed
        self._closed = threading.Event()
        # The only way to interrupt Reverb's wait for a dead shard. TensorFlow has no public name
        # for it, but requirements.txt pins the version.
        self._cancellation = cancellation.CancellationManager()
        self._thread = threading.Thread(target=self._run, name=f'replay_{shard}', daemon=True)
        self._thread.start()

    def take(self) -> Sample:
        """Returns the waiting piece and fetches the next. Called with `changed` held."""
        assert self.piece is not None
        piece, self.piece = self.piece, None
        self._changed.notify_all()
        return piece

    def close(self) -> None:
        """Asks the thread to end, without waiting for it."""
        self._closed.set()
        self._cancellation.start_cancel()
        with self._changed:
            self._changed.notify_all()

    def join(self) -> None:
        """Waits a bounded time for the thread."""
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._read()
            except ReplaySpecMismatch as error:
                with self._changed:
                    self.mismatch = error
                    self._changed.notify_all()
                return
            except Exception as error:  # Reverb raises many types; none may end the reader
                if not self._closed.is_set():
                    _LOGGER.warning('replay shard %s: %s; trying again', self._address, error)
            self._closed.wait(_RETRY_SECONDS)

    def _read(self) -> None:
        next_piece = self._open()
        while not self._closed.is_set():
            piece = next_piece()
            with self._changed:
                self._changed.wait_for(lambda: self.piece is None or self._closed.is_set())
                self.piece = piece
                self._changed.notify_all()

    def _open(self) -> Callable[[], Sample]:
        """Returns a function that waits for the next piece; `close` interrupts it."""
        import reverb
        import tensorflow as tf

        info = reverb.Client(self._address).server_info(timeout=_PROBE_SECONDS)
        require_spec(info, self._to_sample.spec, self._address)
        dataset = reverb.TrajectoryDataset(
            server_address=self._address,
            table=EXPERIENCE_TABLE,
            dtypes={'rows': tf.uint8},
            shapes={'rows': tf.TensorShape(self._to_sample.rows_shape)},
            # Each worker requests the next samples only after these are taken.
            max_in_flight_samples_per_worker=self._size,
            num_workers_per_iterator=self._in_flight,
        ).batch(self._size, drop_remainder=True)
        iterator = iter(dataset.with_options(_single_threaded()))
        return ArrayFunction(
            lambda: self._to_sample(next(iterator), self.shard), cancellation=self._cancellation
        )


class _ToSample:
    """Converts Reverb's samples to a Sample, in a graph."""

    def __init__(self, spec: TrajectorySpec, gamma: float):
        self.spec = spec
        self.rows_shape = (spec.window, spec.row_bytes)
        self._to_transition = compiled_to_transition(spec, gamma)

    def __call__(self, drawn: Any, shard: int) -> Sample:
        import tensorflow as tf

        rows, info = drawn.data['rows'], drawn.info
        return Sample(
            transition=self._to_transition(rows),
            key=info.key,
            probability=info.probability,
            table_size=info.table_size,
            shard=tf.fill([rows.shape[0]], tf.constant(shard, tf.int32)),
        )


def _single_threaded() -> 'tf.data.Options':
    """Options of a pipeline that does not use the process's shared threads."""
    import tensorflow as tf

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    options.autotune.enabled = False
    return options


class ReplayDataset:
    """An endless iterator over batches from all shards; use it in a `with`, from one thread.

    Iteration ends when `should_stop` returns true, or after `close`.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        to_sample: _ToSample,
        batch_size: int,
        timeout_seconds: float,
        should_stop: Callable[[], bool],
        in_flight: int,
    ):
        """See `sample_dataset`."""
        self._addresses = tuple(addresses)
        self._timeout = timeout_seconds
        self._should_stop = should_stop
        size = piece_size(batch_size, len(addresses))
        self._pieces = batch_size // size
        self._changed = threading.Condition()
        self._next_shard = 0
        self._closed = False
        self._readers = [
            _ShardReader(address, shard, size, in_flight, to_sample, self._changed)
            for shard, address in enumerate(addresses)
        ]
        self._partial: list[Sample] = []  # pieces of a batch whose wait timed out

    def __enter__(self) -> 'ReplayDataset':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> 'ReplayDataset':
        return self

    def __next__(self) -> Sample:
        """Returns the next batch.

        Raises:
          StopIteration: `should_stop` returns true, or the dataset is closed.
          ReplayTimeout: shards are reachable but deliver no sample for `timeout_seconds`, because
            they hold too few transitions or the actors are behind. The next call continues.
          ReplayUnavailable: no shard is reachable for `timeout_seconds`.
          ReplaySpecMismatch: a shard stores windows of another shape.
        """
        while len(self._partial) < self._pieces:
            self._partial.append(self._next_piece())
        pieces, self._partial = self._partial, []
        return _concatenated(pieces)

    def close(self) -> None:
        """Ends the threads; repeated calls have no effect."""
        self._closed = True
        for reader in self._readers:
            reader.close()
        for reader in self._readers:
            reader.join()

    def _next_piece(self) -> Sample:
        deadline = time.monotonic() + self._timeout
        with self._changed:
            while True:
                if self._closed:
                    raise StopIteration
                for each in self._readers:
                    if each.mismatch is not None:
                        raise each.mismatch
                if (reader := self._ready()) is not None:
                    self._next_shard = (reader.shard + 1) % len(self._readers)
                    return reader.take()
                if self._should_stop():
                    raise StopIteration
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, _SLICE_SECONDS))
        raise self._starved()

    def _ready(self) -> _ShardReader | None:
        """The next shard in turn with a waiting piece, None if there is none."""
        for i in range(len(self._readers)):
            reader = self._readers[(self._next_shard + i) % len(self._readers)]
            if reader.piece is not None:
                return reader
        return None

    def _starved(self) -> ReplayError:
        """The error that names the reason for the missing sample."""
        import reverb

        sizes = {}
        for address in self._addresses:
            try:
                info = reverb.Client(address).server_info(timeout=_PROBE_SECONDS)
                sizes[address] = info[EXPERIENCE_TABLE].current_size
            except Exception:  # no reply, or no such table
                continue
        waited = f'for {self._timeout:g} s'
        if not sizes:
            return ReplayUnavailable(
                f'no replay shard answered {waited}: {", ".join(self._addresses)}'
            )
        held = ', '.join(f'{address} holds {size}' for address, size in sizes.items())
        return ReplayTimeout(
            f'no replay shard gave a sample {waited} ({held} transitions): fewer than'
            ' --min_replay_size, or the actors are behind'
        )


def _concatenated(pieces: Sequence[Sample]) -> Sample:
    import tensorflow as tf

    if len(pieces) == 1:
        return pieces[0]
    return tf.nest.map_structure(lambda *parts: np.concatenate(parts), *pieces)


def _never() -> bool:
    return False


def sample_dataset(
    addresses: Sequence[str],
    spec: TrajectorySpec,
    batch_size: int,
    gamma: float,
    timeout_seconds: float = 60.0,
    should_stop: Callable[[], bool] = _never,
    in_flight: int = 1,
) -> ReplayDataset:
    """Opens a dataset of batches of `batch_size` transitions from the given shards.

    Each shard's table samples uniformly or by priority, as it is configured.

    Args:
      addresses: host:port of the shards; one in local mode.
      spec: of the stored trajectories.
      batch_size: B.
      gamma: discount per agent step.
      timeout_seconds: longest wait for a piece of a batch.
      should_stop: checked every 0.2 s during a wait.
      in_flight: pieces that a shard is asked for at once; the replay's limiter counts them then.

    Raises:
      ValueError: `addresses` is empty, or `batch_size` or `in_flight` is below 1.
    """
    if not addresses or batch_size < 1 or in_flight < 1:
        raise ValueError(
            f'{len(addresses)} addresses, batch size {batch_size}, {in_flight} in flight: all must'
            ' be >= 1'
        )
    to_sample = _ToSample(spec, gamma)
    return ReplayDataset(addresses, to_sample, batch_size, timeout_seconds, should_stop, in_flight)
