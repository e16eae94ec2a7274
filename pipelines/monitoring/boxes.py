"""Figures of each box: counters that restart in; rates and the table of learners out."""

import collections
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from agents.config import PRECISIONS
from pipelines.events import count
from pipelines.monitoring.counters import (
    RATE_SAMPLE_SECONDS,
    SessionTotals,
    StalenessTally,
    Total,
    remember,
)

MOST_BOXES = 4_096
"""Boxes of each kind whose figures are kept; bounds the memory whatever the telemetry holds."""
_COUNTED = ('gradients', 'outliers')


class BoxRates:
    """What each box counts per second."""

    def __init__(self, window_seconds: float):
        self._window = window_seconds
        self._boxes: collections.OrderedDict[str, _Counted] = collections.OrderedDict()

    def record(self, now: float, box: str, number: int) -> None:
        """Records a counter of a box; it falls when the box restarts."""
        counted = self._boxes.get(box) or _Counted(now)
        counted.record(now, number, self._window)
        remember(self._boxes, box, counted, MOST_BOXES)

    def recent(self, now: float) -> dict[str, float]:
        """Rate over the recent window, by box; without boxes that are silent or new."""
        return {
            box: counted.rate(counted.samples[0])
            for box, counted in sorted(self._boxes.items())
            if now - counted.samples[-1][0] <= self._window and counted.seconds > 0
        }

    def means(self) -> dict[str, float]:
        """Rate since the box was first heard of in this launch, by box."""
        return {
            box: round(counted.rate((counted.begun, 0)), 3)
            for box, counted in sorted(self._boxes.items())
            if counted.samples[-1][0] > counted.begun
        }


class _Counted:
    """A counter of one box.

    Attributes:
      begun: when it was first recorded.
      samples: (time, growth since then) over the window, oldest first.
    """

    def __init__(self, now: float):
        self.begun = now
        self.samples: collections.deque[tuple[float, int]] = collections.deque()
        self._growth = Total(resumed=True)

    def record(self, now: float, number: int, window_seconds: float) -> None:
        self._growth.record(number)
        if self.samples and now - self.samples[-1][0] < RATE_SAMPLE_SECONDS:
            now, _ = self.samples.pop()  # one batch of events may hold several of a box
        self.samples.append((now, self._growth.value))
        while now - self.samples[0][0] > window_seconds:
            self.samples.popleft()

    @property
    def seconds(self) -> float:
        """Time from the first sample to the last."""
        return self.samples[-1][0] - self.samples[0][0]

    def rate(self, since: tuple[float, int]) -> float:
        now, growth = self.samples[-1]
        return (growth - since[1]) / (now - since[0])


class LearnerTally:
    """What one learner has done over the whole run.

    Attributes:
      staleness: of the gradients it pushed.
      precision: of the convolutions in its newest session, 'float32' or 'bfloat16'; None: unknown,
        as with a user's agent or network.
      summary: {'gradients', 'outliers', 'precision', 'staleness'} (see `StalenessTally.summary`).
    """

    def __init__(self, before: Mapping[str, Any]):
        """`before`: its `counters` in the checkpoint that the run resumed from, or empty."""
        self.staleness = StalenessTally(before)
        self._totals = SessionTotals([count(before.get(name)) or 0 for name in _COUNTED])
        precision = before.get('precision')
        self.precision = precision if precision in PRECISIONS else None
        self.summary = self._summary()

    def record(
        self,
        session: Hashable,
        numbers: Sequence[int],
        bins: Sequence[int] | None,
        precision: str | None,
    ) -> None:
        """Records a session's `_COUNTED` numbers, histogram of staleness, and known precision."""
        self.precision = precision or self.precision
        self._totals.record(session, numbers)
        if bins is not None:
            self.staleness.record(session, bins)
        # Here, since it is read more often than it changes.
        self.summary = self._summary()

    def counters(self) -> dict[str, Any]:
        """The counters for a checkpoint."""
        rest = {'precision': self.precision, 'staleness': self.staleness.bins}
        return {**self._counts(), **rest}

    def _counts(self) -> dict[str, int]:
        return dict(zip(_COUNTED, self._totals.values))

    def _summary(self) -> dict[str, Any]:
        rest = {'precision': self.precision, 'staleness': self.staleness.summary()}
        return {**self._counts(), **rest}


class Learners:
    """The learners' tallies, by their names in figures, such as `learner_0`."""

    def __init__(self, before: Any):
        """`before`: the `learners` of the checkpoint's counters."""
        kept = before if isinstance(before, Mapping) else {}
        self._tallies: collections.OrderedDict[str, LearnerTally] = collections.OrderedDict(
            (name, LearnerTally(row)) for name, row in kept.items() if isinstance(row, Mapping)
        )

    def record(
        self,
        name: str,
        session: Hashable,
        numbers: Sequence[int],
        bins: Sequence[int] | None,
        precision: str | None,
    ) -> None:
        """Records what `LearnerTally.record` takes of a learner's session."""
        tally = self._tallies.get(name) or LearnerTally({})
        tally.record(session, numbers, bins, precision)
        remember(self._tallies, name, tally, MOST_BOXES)

    def counters(self) -> dict[str, Any]:
        """The counters for a checkpoint."""
        return {name: tally.counters() for name, tally in sorted(self._tallies.items())}

    def summary(self) -> dict[str, Any]:
        """Each learner's row of the table, by its name."""
        return {name: tally.summary for name, tally in sorted(self._tallies.items())}

    def staleness(self) -> dict[str, float | None]:
        """Median and 99th percentile of each learner, by the end of their tags."""
        return {
            f'{name}/{figure}': tally.summary['staleness'][figure]
            for name, tally in sorted(self._tallies.items())
            for figure in ('median', 'percentile_99')
        }
