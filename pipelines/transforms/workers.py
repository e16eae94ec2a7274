"""One job of workers: their numbers in, work done in the servers out; the same for every kind."""

from typing import Protocol

import apache_beam as beam

from pipelines.workers.spec import Submission, WorkerSpec


class Work(Protocol):
    """A DoFn that runs one worker until the run's budget is reached."""

    @property
    def segments(self) -> int:
        """The most segments that one worker may need."""

    def process(self, spec: WorkerSpec) -> None:
        """Runs the worker; its restriction is its segments."""


class Workers(beam.PTransform):
    """Parallel workers of one kind (paper, section 4.1).

    Input: a pipeline's root. Output: nothing; the DoFn's counters count.
    """

    def __init__(self, work: Work, submission: Submission):
        super().__init__()
        self._work = work
        self._submission = submission

    def expand(self, pipeline):
        return (
            pipeline
            | 'Workers' >> beam.Create(self._submission.specs(self._work.segments))
            | 'Spread' >> beam.Reshuffle()  # prevents fusion: each worker has a process of its own
            | type(self._work).__name__ >> beam.ParDo(self._work)
        )
