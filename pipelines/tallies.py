"""Counters of servers and workers that restart, and rates: numbers in, totals of the run out."""

import collections
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

REJECTIONS = ('stale', 'outlier', 'invalid')
"""Why a gradient was not applied: too old, loss out of line (learner's test), or not finite."""

_REMEMBERED_SESSIONS = 4_096
_RATE_SAMPLE_SECONDS = 0.5


def finite(value: Any) -> float | None:
    """`value` as a float when it is a finite number (numpy's included), else None."""
    if isinstance(value, bool | str | bytes) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def count(value: Any) -> int | None:
    """`value` as an int when it is a finite number and not negative, else None."""
    number = finite(value)
    return int(number) if number is not None and number >= 0 else None


def counts(value: Any) -> dict[str, int]:
    """The entries of the mapping `value` that are counts; empty when it is not a mapping."""
    if not isinstance(value, Mapping):
        return {}
    numbers = {str(name): count(number) for name, number in value.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def mean(values: Iterable[float]) -> float | None:
    """The mean, None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


def remember(memory: collections.OrderedDict, key: Hashable, value: Any, limit: int) -> None:
    """Stores `key`, forgetting the oldest beyond `limit`."""
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > limit:
        memory.popitem(last=False)


class Total:
    """Sums the growth of a counter that starts anew, at any value, when its server restarts."""

    def __init__(self, resumed: bool):
        """`resumed`: the first value seen may have been counted before, so it is no growth."""
        self.value = 0
        self._last: int | None = None if resumed else 0

    def see(self, number: int) -> None:
        if self._last is not None:
            self.value += max(0, number - self._last)
        self._last = number


class ReplayTally:
    """Size of the replay, and transitions sampled and inserted over the whole run."""

    def __init__(self, before: Mapping[str, Any], resumed: bool):
        """`before`: `samples` and `inserts` of the run until its checkpoint."""
        self._sizes: dict[int, int] = {}
        self._resumed = resumed
        self._before = {name: count(before.get(name)) or 0 for name in ('samples', 'inserts')}
        self._totals: dict[tuple[str, int], Total] = {}

    def see(self, shards: Sequence[Mapping[str, Any]]) -> None:
        """Takes each shard's `size`, and `samples` and `inserts` since it started."""
        for index, shard in enumerate(shards):
            size = count(shard.get('size'))
            if size is not None:  # a shard that restarts tells nothing for a moment
                self._sizes[index] = size
            for name in self._before:
                number = count(shard.get(name))
                if number is not None:
                    self._totals.setdefault((name, index), Total(self._resumed)).see(number)

    @property
    def size(self) -> int | None:
        """Transitions held by all shards; None: none has told yet."""
        return sum(self._sizes.values()) if self._sizes else None

    def total(self, name: str) -> int:
        """`samples` or `inserts` over all shards and sessions."""
        growth = sum(total.value for (kind, _), total in self._totals.items() if kind == name)
        return self._before[name] + growth

    @property
    def samples_per_insert(self) -> float | None:
        inserts = self.total('inserts')
        return self.total('samples') / inserts if inserts else None


class RejectionTally:
    """Gradients refused over the whole run, by reason."""

    def __init__(self, before: Mapping[str, Any], resumed: bool):
        """`before`: `rejected` of the run until its checkpoint."""
        self._resumed = resumed
        self._before = counts(before.get('rejected'))
        self._totals: dict[tuple[str, int], Total] = {}
        # By session, so that a late or repeated event of a learner does not count twice.
        self._outliers: collections.OrderedDict[Hashable, int] = collections.OrderedDict()
        self._outlier_total = 0

    def see_servers(self, shards: Sequence[Mapping[str, Any]]) -> None:
        """Takes each parameter shard's `rejected: {stale, invalid}` since it started."""
        for index, report in enumerate(shards):
            for reason, number in counts(report.get('rejected')).items():
                self._totals.setdefault((reason, index), Total(self._resumed)).see(number)

    def see_outliers(self, session: Hashable, number: int) -> None:
        """Takes how many gradients a learner's session has dropped so far."""
        known = self._outliers.get(session, 0)
        self._outlier_total += max(0, number - known)
        remember(self._outliers, session, max(number, known), _REMEMBERED_SESSIONS)

    def counts(self) -> dict[str, int]:
        """Gradients refused, by reason."""
        totals = {reason: self._before.get(reason, 0) for reason in REJECTIONS}
        totals['outlier'] += self._outlier_total
        for reason in ('stale', 'invalid'):
            # Each shard judges its slice of the same gradients, so the shards' counts overlap.
            by_shard = [total.value for (name, _), total in self._totals.items() if name == reason]
            totals[reason] += max(by_shard, default=0)
        return totals


class Rates:
    """Frames/s and updates/s over a sliding window."""

    def __init__(self, window_seconds: float):
        self._window = window_seconds
        self._samples: collections.deque[tuple[float, int, int]] = collections.deque()

    def see(self, now: float, frames: int, updates: int) -> None:
        samples = self._samples
        if samples and (frames, updates) == samples[0][1:]:
            samples.clear()  # nothing has moved yet: the window begins when something does
        if len(samples) >= 2 and now - samples[-2][0] < _RATE_SAMPLE_SECONDS:
            samples.pop()  # bounds the memory however often the clock is looked at
        samples.append((now, frames, updates))
        # The oldest sample kept is the last one that is at least a window old.
        while len(samples) > 2 and now - samples[1][0] >= self._window:
            samples.popleft()

    def rates(self) -> tuple[float | None, float | None]:
        """Frames and updates per second; None while less than two moments are known."""
        if len(self._samples) < 2:
            return None, None
        start, end = self._samples[0], self._samples[-1]
        seconds = end[0] - start[0]
        if seconds <= 0:
            return None, None
        return max(0, end[1] - start[1]) / seconds, max(0, end[2] - start[2]) / seconds
