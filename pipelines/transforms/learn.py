"""Learn: a learner's number in, gradients to the parameter server out (replay -> gradients)."""

import apache_beam as beam
from apache_beam.metrics import Metrics

from pipelines.transforms.restriction import Segments, claimed
from pipelines.transforms.workers import Work
from pipelines.workers import boxes
from pipelines.workers.spec import WorkerSpec

SEGMENT_UPDATES = 500
"""Updates of one segment, which take seconds; a claim costs almost nothing."""


class Learn(Work):
    """Runs one learner until the global budget is reached."""

    _gradients = Metrics.counter('learner', 'gradients')

    @property
    def segments(self) -> int:
        """Enough for a single learner to make all updates."""
        # Without a ratio only the budget of agent steps bounds the updates.
        steps_per_update = self._config.replay.agent_steps_per_update or 1e-3
        return int(self._config.max_agent_steps / steps_per_update // SEGMENT_UPDATES) + 2

    def process(self, spec: WorkerSpec, tracker=beam.DoFn.RestrictionParam(Segments())) -> None:
        """Learns segment by segment."""
        with boxes.open_learner(self._config, self._addresses, spec) as learner:
            for _ in claimed(tracker, learner.finished):
                self._gradients.inc(learner.run(SEGMENT_UPDATES))
