"""A worker's segments as a splittable restriction: a worker in, claimed segment numbers out.

A worker claims each segment before it runs it. The restriction has no real end, since the run's
budget is global (the parameter server's clock): a worker that sees the budget reached claims the
end and returns.
"""

import apache_beam as beam
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker

from pipelines.workers.spec import WorkerSpec

MOST_SEGMENTS = 2**31
"""More than any worker runs."""
PREPARATION = -1
"""Position before the first segment, at which a polled worker's process is prepared."""
_EMPTY_SPLITS = 5  # 0.1 s times 4 to the power of 5 exceeds Prism's longest interval, 30 s


class UnsplittableSegments(OffsetRestrictionTracker):
    """An offset tracker that grants checkpoints and refuses other splits.

    A split would run two parts of a worker at once, each with its own connections and environments.
    A checkpoint (fraction 0) ends this part after the segment; the rest is done later. One before
    the first claim would make no progress.
    """

    def try_split(self, fraction_of_remainder: float):
        if fraction_of_remainder or self._last_claim_attempt is None:
            return None
        return super().try_split(0)


class Segments(beam.transforms.core.RestrictionProvider):
    """Gives every worker the segments 0 .. `MOST_SEGMENTS` - 1."""

    def initial_restriction(self, element: WorkerSpec) -> OffsetRange:
        """All segments of one worker."""
        return OffsetRange(0, MOST_SEGMENTS)

    def create_tracker(self, restriction: OffsetRange) -> OffsetRestrictionTracker:
        """Creates the tracker of a worker's segments."""
        return UnsplittableSegments(restriction)

    def restriction_size(self, element: WorkerSpec, restriction: OffsetRange) -> int:
        """One for every worker: how much is left only the run's clock knows."""
        return 1

    def truncate(self, element: WorkerSpec, restriction: OffsetRange) -> None:
        """Leaves nothing of a worker's rest when its job is drained."""


class PolledSegments(Segments):
    """`Segments` for an engine that asks for progress ten times a second until it may split.

    Prism does (stage.go of its 2.73): it asks a part that has made no progress since the last time
    for a split, and after each that is granted it asks for progress a quarter as often. After one
    refusal it asks that part for no more splits. A process that is still being prepared can only
    refuse, so the preparation has a position before the segments.
    """

    def initial_restriction(self, element: WorkerSpec) -> OffsetRange:
        """The preparation and all segments of one worker."""
        return OffsetRange(PREPARATION, MOST_SEGMENTS)

    def create_tracker(self, restriction: OffsetRange) -> OffsetRestrictionTracker:
        """Creates a tracker that hands out empty rests."""
        return HandsOutNothing(restriction)


class HandsOutNothing(UnsplittableSegments):
    """A tracker whose first splits hand out an empty rest; later ones are refused."""

    def __init__(self, restriction: OffsetRange):
        super().__init__(restriction)
        self._splits_left = 0 if is_empty(restriction) else _EMPTY_SPLITS

    def try_split(self, fraction_of_remainder: float):
        if not fraction_of_remainder:
            return super().try_split(0)
        if self._checkpointed or not self._splits_left:
            return None
        self._splits_left -= 1
        whole = self.current_restriction()
        return whole, OffsetRange(whole.stop, whole.stop)


def is_empty(restriction: OffsetRange) -> bool:
    """Whether it holds no position: what a split has handed out."""
    return restriction.start >= restriction.stop
