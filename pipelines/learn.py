"""The learners' job: learner numbers in, gradients to the parameter server."""

import apache_beam as beam
from apache_beam.metrics import Metrics

from pipelines import workers
from pipelines.config import ExperimentConfig
from pipelines.segments import Segments, claimed
from pipelines.workers import Addresses, Submission, WorkerSpec

SEGMENT_UPDATES = 500
"""Updates of one learner in one segment: some seconds, so that a claim costs next to nothing."""


class Learners(beam.PTransform):
    """Parallel learners (paper, section 4.1).

    Input: a pipeline's root. Output: nothing; the counter `gradients` counts.
    """

    def __init__(self, config: ExperimentConfig, addresses: Addresses, submission: Submission):
        super().__init__()
        self._config = config
        self._addresses = addresses
        self._submission = submission

    def expand(self, pipeline):
        # Without a ratio of steps to updates only the budget of agent steps bounds the updates.
        steps_per_update = self._config.replay.agent_steps_per_update or 1e-3
        updates = self._config.max_agent_steps / steps_per_update
        segments = int(updates // SEGMENT_UPDATES) + 2
        return (
            pipeline
            | 'Learners' >> beam.Create(self._submission.specs(segments))
            | 'Spread' >> beam.Reshuffle()  # prevents fusion: a worker process for each learner
            | 'Learn' >> beam.ParDo(Learn(self._config, self._addresses))  # replay -> gradients
        )


class Learn(beam.DoFn):
    """Runs one learner until the global budget is reached."""

    def __init__(self, config: ExperimentConfig, addresses: Addresses):
        self._config = config
        self._addresses = addresses
        self._gradients = Metrics.counter('learner', 'gradients')

    def setup(self) -> None:
        workers.prepare_process(self._config)

    def process(
        self,
        spec: WorkerSpec,
        tracker=beam.DoFn.RestrictionParam(Segments()),
    ) -> None:
        """Learns segment by segment; everything opened is closed when it ends or fails."""
        with workers.open_learner(self._config, self._addresses, spec) as learner:
            for _ in claimed(tracker, learner.finished):
                self._gradients.inc(learner.run(SEGMENT_UPDATES))
