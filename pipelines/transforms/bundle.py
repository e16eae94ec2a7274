"""Act and learn: a bundle's number in, gradients to the parameter server out.

A bundle is an actor, its own replay and a learner in one worker (paper, section 4).
"""

import apache_beam as beam
from apache_beam.metrics import Metrics

from pipelines.transforms.restriction import Segments, claimed
from pipelines.transforms.workers import Work
from pipelines.workers.bundle import open_bundle
from pipelines.workers.spec import WorkerSpec

SEGMENT_AGENT_STEPS = 64
"""Agent steps of the actor before the learner's turn: 16 updates at 4 steps each."""


class ActAndLearn(Work):
    """Runs one bundle until the global budget is reached.

    One DoFn, not a chain of two: an engine may hold back the first one's output until it ends (Dask
    does), so that the second would not start before.
    """

    _agent_steps = Metrics.counter('bundle', 'agent_steps')
    _gradients = Metrics.counter('bundle', 'gradients')

    @property
    def segments(self) -> int:
        """Enough for a single bundle to reach the budget."""
        return -(-self._config.max_agent_steps // SEGMENT_AGENT_STEPS) + 1

    def process(self, spec: WorkerSpec, tracker=beam.DoFn.RestrictionParam(Segments())) -> None:
        """Acts and learns in turn."""
        with open_bundle(self._config, self._addresses, spec) as bundle:
            for segment in claimed(tracker, bundle.actor.finished):
                agent_steps = bundle.actor.run(segment, SEGMENT_AGENT_STEPS)
                self._agent_steps.inc(agent_steps)
                self._gradients.inc(bundle.learn(agent_steps))
