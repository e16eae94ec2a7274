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


class UnsplittableSegments(OffsetRestrictionTracker):
    """An offset tracker that grants checkpoints and refuses other splits.

    A split would run two parts of a worker at once, each with its own connections and environments.
    A checkpoint (fraction 0) ends this part after the segment; the rest goes on later. One before
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
