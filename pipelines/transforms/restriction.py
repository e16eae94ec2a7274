"""A worker's element as a splittable restriction: one position is one segment of work.

In: a worker's number. Out: the numbers of the segments it claims, in order, each claimed before
its work begins. The run's budget is global (the parameter server's clock), so the restriction is
only an upper bound; a worker that sees the budget reached claims the end and returns.
"""

from collections.abc import Callable, Iterator

import apache_beam as beam
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker

from pipelines.workers.spec import WorkerSpec


class UnsplittableSegments(OffsetRestrictionTracker):
    """An offset tracker that gives away nothing while its worker is at work.

    A split would run two parts of one worker at once, each with connections and environments of
    its own. A checkpoint (fraction 0), which streaming engines ask for every few seconds, would
    close and open them all again, in the middle of games. What ends a worker is the run's clock.
    """

    def try_split(self, fraction_of_remainder: float):
        return None


class Segments(beam.transforms.core.RestrictionProvider):
    """Gives every worker the segments 0 .. segments - 1."""

    def initial_restriction(self, element: WorkerSpec) -> OffsetRange:
        """All segments of one worker."""
        return OffsetRange(0, element.segments)

    def create_tracker(self, restriction: OffsetRange) -> OffsetRestrictionTracker:
        """A tracker that hands out the restriction's segments one by one."""
        return UnsplittableSegments(restriction)

    def restriction_size(self, element: WorkerSpec, restriction: OffsetRange) -> int:
        """Segments left."""
        return restriction.size()


def claimed(tracker, finished: Callable[[], bool]) -> Iterator[int]:
    """Claims and yields segment after segment, until none is left or `finished()`.

    When it ends early it claims the end of the restriction, which is how a splittable DoFn says
    that nothing is left to do.
    """
    segment = tracker.current_restriction().start
    while not finished() and tracker.try_claim(segment):
        yield segment
        segment += 1
    if finished():
        tracker.try_claim(tracker.current_restriction().stop)
