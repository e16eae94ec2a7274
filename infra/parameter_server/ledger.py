"""The ledger of a run: finished segments of its workers in, what an element need not do again out.

An engine may run an element again, from its begin or from where it last committed its results. The
worker then finds here which segments it has finished, and hands on their records instead of doing
them a second time.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Iterable, Sequence
from typing import Any

MAX_WORKERS = 10_000
"""Workers kept on record."""

MAX_BYTES = 16 << 20
"""Of all records; beyond, the oldest of the worker with most bytes are dropped. Where elements
commit their results every few minutes, records are kept for minutes; elsewhere for the whole run:
ten hours of eight workers."""

BLOCK_SEGMENTS = 32
"""A block begins at each multiple and is dropped at once: a file of statistics holds one, so that a
worker that is run again writes the files anew from the first row on, and none a second time."""

MAX_RECORD_BYTES = 1 << 18
"""Of one record: thousands of episodes."""


@dataclasses.dataclass
class _Entry:
    """Segments of one worker.

    Attributes:
      first: number of the first one on record; those before it are finished and committed.
      records: of that one and its successors.
      size: bytes of the records.
    """

    first: int = 0
    records: collections.deque[str] = dataclasses.field(default_factory=collections.deque)
    size: int = 0

    @property
    def next(self) -> int:
        """Number of the first segment that is not finished."""
        return self.first + len(self.records)

    def add(self, record: str) -> None:
        self.records.append(record)
        self.size += len(record)

    def drop(self, until: int) -> None:
        """Drops the records of the segments before `until`."""
        while self.records and self.first < until:
            self.size -= len(self.records.popleft())
            self.first += 1
        self.first = max(self.first, until)


class Ledger:
    """Finished segments by worker. All methods are thread-safe.

    Attributes:
      dropped: records of segments that may not be committed, dropped because of `MAX_BYTES`.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._lock = threading.Lock()
        self._entries: collections.OrderedDict[tuple[str, int], _Entry] = collections.OrderedDict()

    def begin(self, kind: str, worker: int, committed: int) -> tuple[int, list[str]]:
        """Returns the number of a worker's first segment on record, and the records from there on.

        Drops the records of the segments before `committed`, whose results the engine has committed
        before it began the element or its continuation.
        """
        with self._lock:
            entry = self._entry(kind, worker)
            entry.drop(committed)
            return entry.first, list(entry.records)

    def finish(self, kind: str, worker: int, first: int, segment: int, record: str) -> int:
        """Records a finished segment; a repetition has no effect, nor has one after a gap.

        Args:
          kind: kind of the worker.
          worker: its number.
          first: of its segments, which `begin` returned; those before it are committed.
          segment: number of the segment.
          record: of the segment.

        Returns:
          The number of the segment to record next: after a repetition a later one; an earlier one
          at a shard that has restarted older than its workers.

        Raises:
          ValueError: the record is too long.
        """
        if len(record) > MAX_RECORD_BYTES:
            raise ValueError(
                f'a record of {len(record)} characters; {MAX_RECORD_BYTES} are allowed'
            )
        with self._lock:
            entry = self._entry(kind, worker)
            entry.drop(first)
            if segment == entry.next:
                entry.add(record)
            while sum(each.size for each in self._entries.values()) > MAX_BYTES:
                largest = max(self._entries.values(), key=lambda each: each.size)
                end = (largest.first // BLOCK_SEGMENTS + 1) * BLOCK_SEGMENTS
                before = len(largest.records)
                largest.drop(min(end, largest.next))
                self.dropped += before - len(largest.records)
            return entry.next

    def commit_all(self) -> None:
        """Drops all records: the engine has committed the results of every element."""
        with self._lock:
            for entry in self._entries.values():
                entry.drop(entry.next)

    def counters(self) -> list[list[Any]]:
        """Returns the values to save in a state; see `restore`."""
        with self._lock:
            return [
                [kind, worker, entry.first, list(entry.records)]
                for (kind, worker), entry in self._entries.items()
            ]

    def restore(self, counters: Iterable[Sequence[Any]]) -> None:
        """Restores the values that `counters` returned."""
        with self._lock:
            self._entries.clear()
            for kind, worker, first, records in counters:
                entry = self._entries[kind, worker] = _Entry(first)
                for record in records:
                    entry.add(record)

    def _entry(self, kind: str, worker: int) -> _Entry:
        entry = self._entries.setdefault((kind, worker), _Entry())
        if len(self._entries) > MAX_WORKERS:
            self._entries.popitem(last=False)
        return entry
