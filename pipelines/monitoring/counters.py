"""Counters of restarting servers and workers, and rates: numbers in, totals of the run out."""

import collections
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from agents.config import STALENESS_BOUNDS
from infra.sealed import LARGEST_COUNT
from pipelines.events import count, counts, histogram

REJECTIONS = ('stale', 'outlier', 'invalid')
"""Why a gradient was not applied: too old, an outlier (the learner's test), or not finite."""
_REMEMBERED_SESSIONS = 4_096
RATE_SAMPLE_SECONDS = 0.5
"""Between two samples of a rate."""


def mean(values: Iterable[float]) -> float | None:
    """The mean, None if there are no values."""
    values = list(values)
    return sum(values) / len(values) if values else None


def remember(memory: collections.OrderedDict, key: Hashable, value: Any, limit: int) -> None:
    """Stores a value and forgets the oldest beyond `limit`."""
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > limit:
        memory.popitem(last=False)


class Total:
    """Sums the growth of a counter that jumps to any value when its server restarts."""

    def __init__(self, resumed: bool):
        """`resumed`: the first value may have been counted already, so it is not growth."""
        self.value = 0
        self._last: int | None = None if resumed else 0

    def record(self, number: int) -> None:
        if self._last is not None:
            self.value += max(0, number - self._last)
        self._last = number


class SessionTotals:
    """Sums counters that start at 0 in each session of a worker.

    A late or repeated event of a session adds nothing.

    Attributes:
      values: the sums.
    """

    def __init__(self, before: Sequence[int]):
        """`before`: the sums in the checkpoint that the run resumed from."""
        self.values = list(before)
        self._seen: collections.OrderedDict[Hashable, list[int]] = collections.OrderedDict()

    def record(self, session: Hashable, numbers: Sequence[int]) -> None:
        """Records a session's counters, one per sum."""
        known = self._seen.get(session, [0] * len(self.values))
        grown = [v + max(0, n - k) for v, n, k in zip(self.values, numbers, known)]
        self.values = [min(value, LARGEST_COUNT) for value in grown]
        newest = [max(n, k) for n, k in zip(numbers, known)]
        remember(self._seen, session, newest, _REMEMBERED_SESSIONS)


class StalenessTally:
    """Staleness of the gradients that learners pushed, over the whole run."""

    def __init__(self, before: Mapping[str, Any]):
        """`before`: counters of the checkpoint, with `staleness`."""
        bins = len(STALENESS_BOUNDS) + 1
        self._totals = SessionTotals(histogram(before.get('staleness')) or [0] * bins)

    def record(self, session: Hashable, bins: Sequence[int]) -> None:
        """Records a learner's histogram so far, see `STALENESS_BOUNDS`."""
        self._totals.record(session, bins)

    @property
    def bins(self) -> list[int]:
        """Gradients in each bin."""
        return list(self._totals.values)

    def quantile(self, share: float) -> float | None:
        """The bound that this share of all gradients does not exceed; None: no gradients."""
        total, below = sum(self.bins), 0
        for bound, number in zip((*STALENESS_BOUNDS, math.inf), self.bins):
            below += number
            if total and below >= share * total:
                return bound
        return None

    def summary(self) -> dict[str, Any]:
        """{'median', 'percentile_99'} in updates, and the histogram by each bin's bound."""
        names = (*map(str, STALENESS_BOUNDS), f'above {STALENESS_BOUNDS[-1]}')
        bounds = {'median': self.quantile(0.5), 'percentile_99': self.quantile(0.99)}
        known = {name: bound if bound != math.inf else None for name, bound in bounds.items()}
        return {**known, 'histogram': dict(zip(names, self.bins))}


class ReplayTally:
    """Size of the replay, and transitions sampled and inserted over the whole run."""

    def __init__(self, before: Mapping[str, Any], resumed: bool):
        """`before`: counters of the checkpoint, with `samples` and `inserts`."""
        self._sizes: dict[int, int] = {}
        self._resumed = resumed
        self._before = {name: count(before.get(name)) or 0 for name in ('samples', 'inserts')}
        self._totals: dict[tuple[str, int], Total] = {}

    def record(self, shards: Sequence[Mapping[str, Any]]) -> None:
        """Records each shard's `size`, and its `samples` and `inserts` since it started."""
        for index, shard in enumerate(shards):
            size = count(shard.get('size'))
            if size is not None:  # a restarting shard reports none
                self._sizes[index] = size
            for name in self._before:
                number = count(shard.get(name))
                if number is not None:
                    self._totals.setdefault((name, index), Total(self._resumed)).record(number)

    @property
    def size(self) -> int | None:
        """Transitions in all shards; None: not reported yet."""
        return sum(self._sizes.values()) if self._sizes else None

    def total(self, name: str) -> int:
        """`samples` or `inserts` over all shards and sessions."""
        growth = sum(total.value for (kind, _), total in self._totals.items() if kind == name)
        return self._before[name] + growth

    def per_insert(self, transitions: int) -> float | None:
        """`transitions` per transition inserted; None: none inserted yet."""
        inserts = self.total('inserts')
        return transitions / inserts if inserts else None


class RejectionTally:
    """Gradients rejected over the whole run, by reason."""

    def __init__(self, before: Mapping[str, Any], resumed: bool):
        """`before`: counters of the checkpoint, with `rejected`."""
        self._resumed = resumed
        self._before = counts(before.get('rejected'))
        self._totals: dict[tuple[str, int], Total] = {}
        self._outliers = SessionTotals([self._before.get('outlier', 0)])

    def record_servers(self, shards: Sequence[Mapping[str, Any]]) -> None:
        """Records each parameter shard's `rejected: {stale, invalid}` since it started."""
        for index, report in enumerate(shards):
            for reason, number in counts(report.get('rejected')).items():
                self._totals.setdefault((reason, index), Total(self._resumed)).record(number)

    def record_outliers(self, session: Hashable, number: int) -> None:
        """Records how many gradients a learner's session has dropped so far."""
        self._outliers.record(session, [number])

    def counts(self) -> dict[str, int]:
        """Gradients rejected, by reason."""
        totals = {reason: self._before.get(reason, 0) for reason in REJECTIONS}
        totals['outlier'] = self._outliers.values[0]
        for reason in ('stale', 'invalid'):
            # Shards judge slices of the same gradients, so their counts overlap.
            by_shard = [total.value for (name, _), total in self._totals.items() if name == reason]
            totals[reason] += max(by_shard, default=0)
        return totals


class Rates:
    """Frames/s and updates/s over a sliding window."""

    def __init__(self, window_seconds: float):
        self._window = window_seconds
        self._samples: collections.deque[tuple[float, int, int]] = collections.deque()

    def record(self, now: float, frames: int, updates: int) -> None:
        samples = self._samples
        if samples and (frames, updates) == samples[0][1:]:
            samples.clear()  # no progress yet: the window begins with the first
        if len(samples) >= 2 and now - samples[-2][0] < RATE_SAMPLE_SECONDS:
            samples.pop()  # bounds the memory
        samples.append((now, frames, updates))
        # The oldest sample kept is the newest that is at least a window old.
        while len(samples) > 2 and now - samples[1][0] >= self._window:
            samples.popleft()

    def rates(self) -> tuple[float | None, float | None]:
        """Frames and updates per second; None while there are fewer than two samples."""
        if len(self._samples) < 2:
            return None, None
        start, end = self._samples[0], self._samples[-1]
        seconds = end[0] - start[0]
        if seconds <= 0:
            return None, None
        return max(0, end[1] - start[1]) / seconds, max(0, end[2] - start[2]) / seconds
