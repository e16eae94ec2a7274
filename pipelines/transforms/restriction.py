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
"""Position before the first segment, at which a job's process gets ready."""
_EMPTY_SPLITS = 5  # 0.1 s times 4 to the power of 5 is more than 30 s


def is_empty(restriction: OffsetRange) -> bool:
    """Whether it holds no segment."""
    return restriction.start >= restriction.stop


class UnsplittableSegments(OffsetRestrictionTracker):
    """An offset tracker that grants checkpoints, and keeps all work in any other split.

    Two parts of a worker at once would each have connections and environments. A checkpoint
    (fraction 0) ends this part after the segment; the rest is done later. One before the first
    claim would make no progress.

    Of other splits the first `_EMPTY_SPLITS` hand out an empty rest, later ones nothing. Prism asks
    for progress ten times a second, which takes 3 ms of CPU each time, and after each split a
    quarter as often, down to once in 30 s.
    """

    def __init__(self, restriction: OffsetRange):
        super().__init__(restriction)
        self._splits_left = _EMPTY_SPLITS

    def try_split(self, fraction_of_remainder: float):
        if fraction_of_remainder:
            return self._split_off_nothing()
        if self._last_claim_attempt is None:
            return None
        return super().try_split(0)

    def _split_off_nothing(self):
        if not self._splits_left:
            return None
        self._splits_left -= 1
        whole = self.current_restriction()
        return whole, OffsetRange(whole.stop, whole.stop)


class Segments(beam.transforms.core.RestrictionProvider):
    """Gives every worker its preparation and the segments 0 .. `MOST_SEGMENTS` - 1."""

    def initial_restriction(self, element: WorkerSpec) -> OffsetRange:
        """The preparation and all segments of one worker."""
        return OffsetRange(PREPARATION, MOST_SEGMENTS)

    def create_tracker(self, restriction: OffsetRange) -> OffsetRestrictionTracker:
        """Creates the tracker of a worker's segments."""
        return UnsplittableSegments(restriction)

    def restriction_size(self, element: WorkerSpec, restriction: OffsetRange) -> int:
        """One for every worker: how much is left only the run's clock knows. 0 if empty."""
        return int(not is_empty(restriction))

    def truncate(self, element: WorkerSpec, restriction: OffsetRange) -> None:
        """Leaves nothing of a worker's rest when its job is drained."""
