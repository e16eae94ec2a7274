"""A worker's segments as a splittable restriction: a worker in, claimed segment numbers out.

A worker claims each segment before it runs it. The restriction is only an upper bound, since the
run's budget is global (the parameter server's clock): a worker that sees the budget reached claims
the end and returns.
"""

from collections.abc import Callable, Iterator

import apache_beam as beam
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker

from pipelines.workers.spec import WorkerSpec


class UnsplittableSegments(OffsetRestrictionTracker):
    """An offset tracker that refuses every split.

    A split would run two parts of a worker at once, each with its own connections and environments.
    A checkpoint (fraction 0), which streaming engines request every few seconds, would reopen them
    in the middle of games. Only the run's clock ends a worker.
    """

    def try_split(self, fraction_of_remainder: float):
        return None


class Segments(beam.transforms.core.RestrictionProvider):
    """Gives every worker the segments 0 .. segments - 1."""

    def initial_restriction(self, element: WorkerSpec) -> OffsetRange:
        """All segments of one worker."""
        return OffsetRange(0, element.segments)

    def create_tracker(self, restriction: OffsetRange) -> OffsetRestrictionTracker:
        """Creates the tracker of a worker's segments."""
        return UnsplittableSegments(restriction)

    def restriction_size(self, element: WorkerSpec, restriction: OffsetRange) -> int:
        """Number of segments."""
        return restriction.size()


def claimed(tracker, finished: Callable[[], bool]) -> Iterator[int]:
    """Claims and yields segments until all are claimed or `finished()`.

    If finished early, it claims the end of the restriction: a splittable DoFn thereby declares its
    work done.
    """
    segment = tracker.current_restriction().start
    while not finished() and tracker.try_claim(segment):
        yield segment
        segment += 1
    if finished():
        tracker.try_claim(tracker.current_restriction().stop)
