"""Telemetry: events of every worker in, one list of dicts out, through one bounded Reverb queue.

A record is a flat dict: `time` (seconds since the epoch), `component`, `worker`, `session`, the
writer's further stamps, `kind`, and the fields of the event. A flush sends all waiting records as
one JSON item. Telemetry never blocks a worker: if the queue is full or its server unreachable, it
drops the oldest records and counts them.
"""

import collections
import contextlib
import json
import logging
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import reverb

_LOGGER = logging.getLogger(__name__)

TELEMETRY_TABLE = 'telemetry'
QUEUE_ITEMS = 10_000  # flushes; ten minutes of sixteen workers with one flush per second each
MAX_PENDING_RECORDS = 10_000  # of one writer
_FLUSH_SECONDS = 1.0  # between two flushes of a writer
_POLL_SECONDS = 0.25  # between two looks of a reader at the queue
_SEND_SECONDS = 0.5  # longest wait for the queue's confirmation
_DEAF_SECONDS = 3.0  # a reader's look at the queue and the pause before it take at most 1.25
_PROBE_SECONDS = 1  # Reverb's client takes whole seconds only


def build_table() -> 'reverb.Table':
    """Builds the queue; each item is one JSON text and is read once."""
    import reverb
    import tensorflow as tf

    signature = {'json': tf.TensorSpec((1,), tf.string, name='json')}
    return reverb.Table.queue(TELEMETRY_TABLE, QUEUE_ITEMS, signature=signature)


class Telemetry:
    """Writes one worker's events to the queue; use it in a `with`, or call `close`.

    `record` only appends to memory; a thread flushes once per second.
    """

    def __init__(self, address: str, component: str, worker: int, **stamp: Any):
        """Starts the thread.

        Args:
          address: host:port of the queue's server.
          component: kind of the worker, such as 'actor'.
          worker: its number.
          **stamp: further fields of every record.
        """
        self._address = address
        self._stamp = {
            'component': component,
            'worker': worker,
            'session': uuid.uuid4().hex,  # distinguishes a restarted worker from the previous one
            **stamp,
        }
        self._pending: collections.deque[dict[str, Any]] = collections.deque()
        self._dropped = 0
        self._lock = threading.Lock()  # guards the records
        self._sending = threading.Lock()  # guards the writer: one flush at a time
        self._writer: Any = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name='telemetry', daemon=True)
        self._thread.start()

    def __enter__(self) -> 'Telemetry':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def dropped(self) -> int:
        """Number of records dropped so far because the queue did not accept them."""
        return self._dropped

    def record(self, kind: str, **fields: Any) -> None:
        """Records an event with the current time; never blocks.

        Fields may be JSON types, NumPy scalars and arrays.
        """
        entry = {'time': time.time(), **self._stamp, 'kind': kind, **fields}
        with self._lock:
            self._pending.append(entry)
            self._limit()

    def flush(self) -> bool:
        """Sends waiting records; returns whether the queue has confirmed them.

        Blocks for a few seconds at most. Records that could not be sent wait for a later flush.
        """
        if not self._sending.acquire(timeout=_SEND_SECONDS):
            return False
        try:
            return self._send()
        finally:
            self._sending.release()

    def close(self) -> None:
        """Flushes once more and ends the thread; repeated calls have no effect."""
        if self._closed.is_set():
            return
        self._closed.set()
        # Waits until records that the thread is sending are confirmed or back in the queue.
        self._thread.join(_SEND_SECONDS + 2 * _PROBE_SECONDS)
        self.flush()
        with self._lock:
            self._dropped += len(self._pending)
            self._pending.clear()
        if self._dropped:
            _LOGGER.warning('%d records dropped: the queue did not accept them', self._dropped)
        if self._sending.acquire(timeout=_SEND_SECONDS):
            self._abandon()
            self._sending.release()

    def _run(self) -> None:
        while not self._closed.wait(_FLUSH_SECONDS):
            self.flush()

    def _send(self) -> bool:
        """Sends one item with all waiting records. Called with `_sending` held."""
        with self._lock:
            batch = list(self._pending)
            self._pending.clear()
        try:
            # Confirms an earlier item first, so that at most one is in flight.
            self._confirm()
            if batch:
                text = json.dumps(batch, default=_plain)
                self._writer.append({'json': np.array(text.encode(), object)})
                self._writer.create_item(
                    TELEMETRY_TABLE, 1.0, {'json': self._writer.history['json'][-1:]}
                )
                batch = []  # the writer owns it now and sends it when it can
                self._confirm()
        except Exception as error:  # full queue, dead server or broken stream; retries later
            with self._lock:
                self._pending.extendleft(reversed(batch))
                self._limit()
            if not _is_deadline(error):
                self._abandon()
            return False
        return True

    def _confirm(self) -> None:
        """Waits until no item is in flight; opens a writer first if there is none."""
        import reverb

        if self._writer is None:
            client = reverb.Client(self._address)
            client.server_info(timeout=_PROBE_SECONDS)  # else the writer waits without bound
            self._writer = client.trajectory_writer(num_keep_alive_refs=1)
            self._writer.configure(('json',), num_keep_alive_refs=1, max_chunk_length=1)
        self._writer.flush(timeout_ms=int(1000 * _SEND_SECONDS / 2))

    def _limit(self) -> None:
        """Drops the oldest records above the bound. Called with `_lock` held."""
        while len(self._pending) > MAX_PENDING_RECORDS:
            self._pending.popleft()
            self._dropped += 1

    def _abandon(self) -> None:
        """Closes the writer without a flush, which could wait for ever."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


class TelemetryReader:
    """Reads the queue; use one per queue, in a `with`, or call `close`.

    A thread empties the queue into memory, so that `drain` is bounded even if the server hangs.
    """

    def __init__(self, address: str):
        """`address` is host:port of the queue's server."""
        self._address = address
        self._records: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name='telemetry_reader', daemon=True)
        self._thread.start()

    def __enter__(self) -> 'TelemetryReader':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def drain(self, timeout_seconds: float = 0.0) -> list[dict[str, Any]]:
        """Returns the records read since the last call, in order; waits if there are none.

        Returns an empty list after `timeout_seconds` without records.
        """
        with self._changed:
            self._changed.wait_for(lambda: bool(self._records), timeout_seconds)
            records, self._records = self._records, []
        return records

    @property
    def hears(self) -> bool:
        """Whether the reader has reached the queue within the last 3 s.

        If it has not, missing records do not prove that a worker is silent.
        """
        return time.monotonic() - self._looked < _DEAF_SECONDS

    def close(self) -> None:
        """Ends the thread; waits a bounded time for it. Repeated calls have no effect."""
        self._closed.set()
        self._thread.join(2 * _PROBE_SECONDS)

    def _run(self) -> None:
        import reverb

        client = reverb.Client(self._address)
        while not self._closed.is_set():
            with contextlib.suppress(Exception):  # server unreachable; retries later
                self._read(client)
                self._looked = time.monotonic()
            self._closed.wait(_POLL_SECONDS)

    def _read(self, client: 'reverb.Client') -> None:
        """Takes the items that the queue holds now; a larger request would wait for writers."""
        items = client.server_info(timeout=_PROBE_SECONDS)[TELEMETRY_TABLE].current_size
        if not items:
            return
        for item in client.sample(TELEMETRY_TABLE, items, emit_timesteps=False):
            try:
                records = list(json.loads(np.asarray(item.data[0]).reshape(-1)[0]))
            except (ValueError, TypeError, RecursionError):
                records = [None]  # counted as a malformed event; later items are still read
            with self._changed:
                self._records.extend(records)
                self._changed.notify_all()


def _plain(value: Any) -> Any:
    """Converts NumPy scalars and arrays to JSON types."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f'telemetry cannot hold a {type(value).__name__}: {value!r}')


def _is_deadline(error: Exception) -> bool:
    import reverb

    return isinstance(error, reverb.errors.DeadlineExceededError)
