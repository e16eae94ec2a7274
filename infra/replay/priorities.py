"""Priorities: errors of sampled transitions in, changes at the shards they were drawn from out.

    learner -> update(key, shard, priority) -> one pending table a shard -> one message a flush

A thread per shard sends what has come together; the learner only writes to memory. A shard that is
away or hangs loses changes, which are counted, and holds nobody up.
"""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from infra.replay.config import EXPERIENCE_TABLE

PRIORITY_FLOOR = 1e-6
"""Added to every error, so that no transition is lost to sampling (Schaul et al. 2016, 3.3)."""

_LOGGER = logging.getLogger(__name__)
_FLUSH_SECONDS = 0.1  # some updates; a message costs 0.1 ms and as much again for 400 changes
_RETRY_SECONDS = 1.0
_MAX_PENDING = 100_000  # of a shard; some 10 MB
_CLOSE_SECONDS = 2.0


def priority_of(error: np.ndarray) -> np.ndarray:
    """The priority float64 of an error, whose absolute value counts."""
    return np.abs(error).astype(np.float64) + PRIORITY_FLOOR


def importance_weights(probability: np.ndarray, shard: np.ndarray, exponent: float) -> np.ndarray:
    """Weights float32 [B] that undo, as far as `exponent` says, the bias of drawing by priorities.

    (N P)^-beta, divided by the largest of the batch (Schaul et al. 2016, section 3.4). P is the
    share of the batch that came from an item's shard times its `probability` [B] there; N, the
    number of all items, cancels out.
    """
    share = np.bincount(shard)[shard] / len(shard)
    weights = (share * probability) ** -exponent
    return (weights / weights.max()).astype(np.float32)


class _ShardChanges:
    """Changes on their way to one shard; runs a thread of its own."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._pending: dict[int, float] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name='priorities', daemon=True)
        self._thread.start()

    def add(self, changes: dict[int, float]) -> None:
        """Takes changes; a later one of the same item replaces an earlier one."""
        with self._lock:
            self._pending.update(changes)
            excess = len(self._pending) - _MAX_PENDING
            if excess > 0:
                for key in list(self._pending)[:excess]:
                    del self._pending[key]
                self.dropped += excess

    def close(self) -> None:
        """Asks for the last message, without waiting for it."""
        self._closed.set()

    def join(self, timeout_seconds: float) -> None:
        """Waits for the last message, as long as the time at most."""
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
        except Exception as error:  # Reverb raises many kinds; a shard that restarts is not an end
            with self._lock:
                self.dropped += len(changes)
            _LOGGER.warning('replay shard %s took no priorities: %s', self._address, error)
            self._closed.wait(_RETRY_SECONDS)


class PriorityWriter:
    """Changes priorities of sampled transitions; use it in a `with`, from one thread."""

    def __init__(self, addresses: Sequence[str]) -> None:
        """`addresses` are those of the dataset whose samples will be told, in its order."""
        self._shards = [_ShardChanges(address) for address in addresses]

    def __enter__(self) -> 'PriorityWriter':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def dropped(self) -> int:
        """Changes given up so far, because their shard did not take them."""
        return sum(shard.dropped for shard in self._shards)

    def update(self, key: np.ndarray, shard: np.ndarray, error: np.ndarray) -> None:
        """Gives sampled transitions the priority of their error; never blocks.

        Items that a shard no longer holds are ignored by it. Errors that are not finite are left
        out: Reverb refuses a message with one.

        Args:
          key: uint64 [B], of the items.
          shard: int32 [B], index of the shard that each came from.
          error: float [B], absolute or signed.
        """
        priority = priority_of(error)
        finite = np.isfinite(priority)
        for index in np.unique(shard):
            rows = (shard == index) & finite
            self._shards[index].add(dict(zip(key[rows].tolist(), priority[rows].tolist())))

    def close(self) -> None:
        """Sends what is left, as far as that takes no longer than two seconds; idempotent."""
        for shard in self._shards:
            shard.close()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for shard in self._shards:
            shard.join(max(0.0, deadline - time.monotonic()))
