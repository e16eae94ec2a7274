"""Telemetry: events of every worker in, one list of dicts out, through one bounded Reverb queue.

A record is a flat dict: `time` (seconds since the epoch), `component`, `worker`, `session`,
`kind`, and the fields the writer gave. A flush sends all records waiting as one JSON item.
Telemetry never stops the work: when the queue is full or its server away, the oldest records are
dropped and counted.
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
QUEUE_ITEMS = 10_000  # flushes; at one a second each, ten minutes of sixteen workers
MAX_PENDING_RECORDS = 10_000  # of one writer, and as many of one reader's backlog per second
_FLUSH_SECONDS = 1.0  # between two flushes of a writer
_POLL_SECONDS = 0.25  # between two looks of a reader at the queue
_SEND_SECONDS = 0.5  # longest wait for the queue's confirmation
_PROBE_SECONDS = 1  # whole seconds are all that Reverb's client takes


def build_table() -> 'reverb.Table':
    """The queue; each item is one JSON text and is read once."""
    import reverb
    import tensorflow as tf

    signature = {'json': tf.TensorSpec((1,), tf.string, name='json')}
    return reverb.Table.queue(TELEMETRY_TABLE, QUEUE_ITEMS, signature=signature)


class Telemetry:
    """One worker's end of the queue; use it in a `with`, or call `close`.

    `record` only appends to memory; a thread sends once a second.
    """

    def __init__(self, address: str, component: str, worker: int):
        """`address` is host:port of the queue's server; `component` such as 'actor'."""
        self._address = address
        self._stamp = {
            'component': component,
            'worker': worker,
            'session': uuid.uuid4().hex,  # tells a restarted worker from the one before
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
        """Records given up so far because nobody took them."""
        return self._dropped

    def record(self, kind: str, **fields: Any) -> None:
        """Notes an event now; never blocks. Fields are what JSON can hold, NumPy scalars too."""
        entry = {'time': time.time(), **self._stamp, 'kind': kind, **fields}
        with self._lock:
            self._pending.append(entry)
            self._limit()

    def flush(self) -> bool:
        """Sends what waits; whether the queue has confirmed it. Blocks for about a second at most.

        What could not be sent stays, and goes with a later flush.
        """
        if not self._sending.acquire(timeout=_SEND_SECONDS):
            return False
        try:
            return self._send()
        finally:
            self._sending.release()

    def close(self) -> None:
        """Flushes once more and ends; idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        # What the thread is sending just now must be confirmed, or given back, to be counted.
        self._thread.join(_SEND_SECONDS + 2 * _PROBE_SECONDS)
        self.flush()
        with self._lock:
            self._dropped += len(self._pending)
            self._pending.clear()
        if self._dropped:
            _LOGGER.warning('%d records given up: nobody took them', self._dropped)
        if self._sending.acquire(timeout=_SEND_SECONDS):
            self._abandon()
            self._sending.release()

    def _run(self) -> None:
        while not self._closed.wait(_FLUSH_SECONDS):
            self.flush()

    def _send(self) -> bool:
        """One item with every record that waits. Called with `_sending` held."""
        with self._lock:
            batch = list(self._pending)
            self._pending.clear()
        try:
            # An item sent earlier and not yet confirmed goes first: at most one is under way.
            self._confirm()
            if batch:
                text = json.dumps(batch, default=_plain)
                self._writer.append({'json': np.array(text.encode(), object)})
                self._writer.create_item(
                    TELEMETRY_TABLE, 1.0, {'json': self._writer.history['json'][-1:]}
                )
                batch = []  # the writer has it now, and sends it when it can
                self._confirm()
        except Exception as error:  # full queue, dead server, broken stream: keep and try later
            with self._lock:
                self._pending.extendleft(reversed(batch))
                self._limit()
            if not _is_deadline(error):
                self._abandon()
            return False
        return True

    def _confirm(self) -> None:
        """Waits until nothing is under way, opening a writer first if there is none."""
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
        """Gives the writer up without a flush, which could wait for ever."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


class TelemetryReader:
    """The reading end of the queue; there should be one. Use it in a `with`, or call `close`.

    A thread empties the queue into memory, so that `drain` is bounded whatever the server does.
    """

    def __init__(self, address: str):
        """`address` is host:port of the queue's server."""
        self._address = address
        self._records: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name='telemetry_reader', daemon=True)
        self._thread.start()

    def __enter__(self) -> 'TelemetryReader':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def drain(self, timeout_seconds: float = 0.0) -> list[dict[str, Any]]:
        """All records read since the last call, in order; waits for the first one if there is none.

        Empty after `timeout_seconds` without any, also while the server is away.
        """
        with self._changed:
            self._changed.wait_for(lambda: bool(self._records), timeout_seconds)
            records, self._records = self._records, []
        return records

    def close(self) -> None:
        """Ends the thread, unless the server it reads from is gone; idempotent."""
        self._closed.set()
        self._thread.join(2 * _PROBE_SECONDS)

    def _run(self) -> None:
        import reverb

        client = reverb.Client(self._address)
        while not self._closed.is_set():
            with contextlib.suppress(Exception):  # server away: look again later
                self._read(client)
            self._closed.wait(_POLL_SECONDS)

    def _read(self, client: 'reverb.Client') -> None:
        """Takes the items the queue holds now: asking for more would wait for their writers."""
        items = client.server_info(timeout=_PROBE_SECONDS)[TELEMETRY_TABLE].current_size
        if not items:
            return
        for item in client.sample(TELEMETRY_TABLE, items, emit_timesteps=False):
            records = json.loads(np.asarray(item.data[0]).reshape(-1)[0])
            with self._changed:
                self._records.extend(records)
                self._changed.notify_all()


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays as JSON's own kinds."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f'telemetry cannot hold a {type(value).__name__}: {value!r}')


def _is_deadline(error: Exception) -> bool:
    import reverb

    return isinstance(error, reverb.errors.DeadlineExceededError)
