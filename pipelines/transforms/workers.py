"""A job of workers of one kind: worker numbers in, work on the servers out."""

import apache_beam as beam

from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.launch import Addresses
from pipelines.workers.process import prepare_process
from pipelines.workers.spec import Submission


class Work(beam.DoFn):
    """Runs a worker (`WorkerSpec`) until the run's budget is reached.

    Attributes:
      learns: whether it computes gradients.
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
    """Runs parallel workers of one kind (paper, section 4.1).

    Input: a pipeline. Output: none but the DoFn's counters.
    """

    def __init__(self, work: Work, submission: Submission):
        super().__init__()
        self._work = work
        self._submission = submission

    def expand(self, pipeline):
        return (
            pipeline
            | 'Workers' >> beam.Create(self._submission.specs(self._work.segments))
            | 'Spread' >> beam.Reshuffle()  # prevents fusion: each worker has its own process
            | type(self._work).__name__ >> beam.ParDo(self._work)
        )
