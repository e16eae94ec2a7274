"""Learn: a learner's number in, gradients to the parameter server (replay -> gradients)."""

import apache_beam as beam
from apache_beam.metrics import Metrics

from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.launch import Addresses
from pipelines.transforms.restriction import Segments, claimed
from pipelines.workers import boxes, process
from pipelines.workers.spec import WorkerSpec

SEGMENT_UPDATES = 500
"""Updates of one learner in one segment: some seconds, so that a claim costs next to nothing."""


class Learn(beam.DoFn):
    """Runs one learner until the global budget is reached."""

    def __init__(self, config: ExperimentConfig, addresses: Addresses):
        self._config = config
        self._addresses = addresses
        self._gradients = Metrics.counter('learner', 'gradients')

    @property
    def segments(self) -> int:
        """Enough for one learner alone to make all updates."""
        # Without a ratio of steps to updates only the budget of agent steps bounds the updates.
        steps_per_update = self._config.replay.agent_steps_per_update or 1e-3
        return int(self._config.max_agent_steps / steps_per_update // SEGMENT_UPDATES) + 2

    def setup(self) -> None:
        process.prepare_process(self._config)

    def process(
        self,
        spec: WorkerSpec,
        tracker=beam.DoFn.RestrictionParam(Segments()),
    ) -> None:
        """Learns segment by segment; everything opened is closed when it ends or fails."""
        with boxes.open_learner(self._config, self._addresses, spec) as learner:
            for _ in claimed(tracker, learner.finished):
                self._gradients.inc(learner.run(SEGMENT_UPDATES))
