"""The actors' job: actor numbers in, experience into the replay."""

import apache_beam as beam
from apache_beam.metrics import Metrics

from pipelines import workers
from pipelines.config import ExperimentConfig
from pipelines.segments import Segments, claimed
from pipelines.workers import Addresses, Submission, WorkerSpec

SEGMENT_AGENT_STEPS = 2_000
"""Decisions of one actor in one segment: some seconds, so that a claim costs next to nothing."""


class Actors(beam.PTransform):
    """Parallel actors (paper, section 4.1).

    Input: a pipeline's root. Output: nothing; the counter `agent_steps` counts.
    """

    def __init__(self, config: ExperimentConfig, addresses: Addresses, submission: Submission):
        super().__init__()
        self._config = config
        self._addresses = addresses
        self._submission = submission

    def expand(self, pipeline):
        segments = -(-self._config.max_agent_steps // SEGMENT_AGENT_STEPS) + 1
        return (
            pipeline
            | 'Actors' >> beam.Create(self._submission.specs(segments))
            | 'Spread' >> beam.Reshuffle()  # prevents fusion: a worker process for each actor
            | 'Act' >> beam.ParDo(Act(self._config, self._addresses))  # environment -> replay
        )


class Act(beam.DoFn):
    """Runs one actor until the global budget is reached."""

    def __init__(self, config: ExperimentConfig, addresses: Addresses):
        self._config = config
        self._addresses = addresses
        self._agent_steps = Metrics.counter('actor', 'agent_steps')

    def setup(self) -> None:
        workers.prepare_process(self._config, learns=False)

    def process(
        self,
        spec: WorkerSpec,
        tracker=beam.DoFn.RestrictionParam(Segments()),
    ) -> None:
        """Acts segment by segment; everything opened is closed when it ends or fails."""
        with workers.open_actor(self._config, self._addresses, spec) as actor:
            for segment in claimed(tracker, actor.finished):
                self._agent_steps.inc(actor.run(segment, SEGMENT_AGENT_STEPS))
