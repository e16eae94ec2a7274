"""One job of workers: their numbers in, work done in the servers out; the same for every kind."""

import apache_beam as beam

from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.launch import Addresses
from pipelines.workers.process import prepare_process
from pipelines.workers.spec import Submission


class Work(beam.DoFn):
    """Runs one worker until the run's budget is reached; its elements are `WorkerSpec`s.

    Attributes:
      learns: whether the worker computes gradients.
    """

    learns = True

    def __init__(self, config: ExperimentConfig, addresses: Addresses):
        self._config = config
        self._addresses = addresses

    @property
    def segments(self) -> int:
        """The most segments that one worker may need."""
        raise NotImplementedError

    def setup(self) -> None:
        prepare_process(self._config, self.learns)


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
