"""Priorities: errors of sampled transitions in, updates to the shards that hold them out.

    learner -> update(key, shard, error) -> pending changes per shard -> one message per flush

The learner only writes to memory; one thread per shard sends pending changes. Changes for an
unreachable shard are dropped and counted, and delay no other shard.
"""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from infra.replay.config import EXPERIENCE_TABLE

PRIORITY_FLOOR = 1e-6
"""Added to every error, so that every transition can be sampled (Schaul et al. 2016, 3.3)."""

_LOGGER = logging.getLogger(__name__)
_FLUSH_SECONDS = 0.1  # a few updates; a message costs 0.1 ms, plus 0.1 ms per 400 changes
_RETRY_SECONDS = 1.0
_MAX_PENDING = 100_000  # per shard, some 10 MB
_CLOSE_SECONDS = 2.0


def priority_of(error: np.ndarray) -> np.ndarray:
    """The priority, float64, of an absolute or signed error."""
    return np.abs(error).astype(np.float64) + PRIORITY_FLOOR


def importance_weights(probability: np.ndarray, shard: np.ndarray, exponent: float) -> np.ndarray:
    """Weights float32 [B] that correct the bias of prioritized sampling; `exponent` is beta.

    They are (N P)^-beta, divided by the batch's largest (Schaul et al. 2016, section 3.4). P is the
    fraction of the batch that came from the item's shard times the item's `probability` [B] there.
    N, the number of all items, cancels out.
    """
    share = np.bincount(shard)[shard] / len(shard)
    weights = (share * probability) ** -exponent
    return (weights / weights.max()).astype(np.float32)


class _ShardChanges:
    """Sends changes of priorities to one shard, in its own thread."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._pending: dict[int, float] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name='priorities', daemon=True)
        self._thread.start()

    def add(self, changes: dict[int, float]) -> None:
        """Queues changes; a later change of an item replaces an earlier one."""
        with self._lock:
            self._pending.update(changes)
            excess = len(self._pending) - _MAX_PENDING
            if excess > 0:
                for key in list(self._pending)[:excess]:
                    del self._pending[key]
                self.dropped += excess

    def close(self) -> None:
        """Asks the thread to send the last message and end, without waiting for it."""
        self._closed.set()

    def join(self, timeout_seconds: float) -> None:
        """Waits for the last message, for at most `timeout_seconds`."""
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        import reverb

        client = reverb.Client(self._address)
        while True:
            last = self._closed.wait(_FLUSH_SECONDS)
            self._send(client)
            if last:
                return

    def _send(self, client: Any) -> None:
        with self._lock:
            changes, self._pending = self._pending, {}
        if not changes:
            return
        try:
            client.mutate_priorities(EXPERIENCE_TABLE, updates=changes)
        except Exception as error:  # Reverb raises many types, such as when a shard restarts
            with self._lock:
                self.dropped += len(changes)
            _LOGGER.warning('replay shard %s took no priorities: %s', self._address, error)
            self._closed.wait(_RETRY_SECONDS)


class PriorityWriter:
    """Updates priorities of sampled transitions; use it in a `with`, from one thread."""

    def __init__(self, addresses: Sequence[str]) -> None:
        """`addresses` are those of the dataset that yields the samples, in the same order."""
        self._shards = [_ShardChanges(address) for address in addresses]

    def __enter__(self) -> 'PriorityWriter':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def dropped(self) -> int:
        """Number of changes dropped so far, because their shard did not accept them in time."""
        return sum(shard.dropped for shard in self._shards)

    def update(self, key: np.ndarray, shard: np.ndarray, error: np.ndarray) -> None:
        """Sets the priorities of sampled transitions from their errors; never blocks.

        A shard ignores items that it no longer holds. Errors that are not finite are skipped,
        because Reverb refuses a message that has one.

        Args:
          key: uint64 [B], of the items.
          shard: int32 [B], index of each item's shard.
          error: float [B], absolute or signed.
        """
        priority = priority_of(error)
        finite = np.isfinite(priority)
        for index in np.unique(shard):
            rows = (shard == index) & finite
            self._shards[index].add(dict(zip(key[rows].tolist(), priority[rows].tolist())))

    def close(self) -> None:
        """Sends pending changes for at most two seconds; repeated calls have no effect."""
        for shard in self._shards:
            shard.close()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for shard in self._shards:
            shard.join(max(0.0, deadline - time.monotonic()))
