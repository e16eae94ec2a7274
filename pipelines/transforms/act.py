"""Act: an actor's number in, transitions to the replay out (environment -> replay)."""

import apache_beam as beam
from apache_beam.metrics import Metrics

from pipelines.transforms.restriction import Segments, claimed
from pipelines.transforms.workers import Work
from pipelines.workers import boxes
from pipelines.workers.spec import WorkerSpec

SEGMENT_AGENT_STEPS = 2_000
"""Agent steps of one segment, which take seconds; a claim costs almost nothing."""


class Act(Work):
    """Runs one actor until the global budget is reached."""

    learns = False
    _agent_steps = Metrics.counter('actor', 'agent_steps')

    @property
    def segments(self) -> int:
        """Enough for a single actor to reach the budget."""
        return -(-self._config.max_agent_steps // SEGMENT_AGENT_STEPS) + 1

    def process(self, spec: WorkerSpec, tracker=beam.DoFn.RestrictionParam(Segments())) -> None:
        """Acts segment by segment."""
        with boxes.open_actor(self._config, self._addresses, spec) as actor:
            for segment in claimed(tracker, actor.finished):
                self._agent_steps.inc(actor.run(segment, SEGMENT_AGENT_STEPS))
