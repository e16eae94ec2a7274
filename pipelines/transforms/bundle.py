"""Act and learn: a bundle's number in, gradients to the parameter server.

A bundle is the paper's: one actor, its own replay and one learner in one worker (section 4); only
parameters travel.
"""

import apache_beam as beam
from apache_beam.metrics import Metrics

from pipelines.transforms.restriction import Segments, claimed
from pipelines.transforms.workers import Work
from pipelines.workers.bundle import open_bundle
from pipelines.workers.spec import WorkerSpec

SEGMENT_AGENT_STEPS = 64
"""Decisions of a bundle's actor before its learner has its turn: 16 updates at 4 steps each."""


class ActAndLearn(Work):
    """Runs one bundle until the global budget is reached.

    Actor and learner are one DoFn, not two in a row: an engine may keep all that the first puts
    out until it has ended (Dask does), and the second would learn nothing until then.
    """

    _agent_steps = Metrics.counter('bundle', 'agent_steps')
    _gradients = Metrics.counter('bundle', 'gradients')

    @property
    def segments(self) -> int:
        """Enough for one bundle alone to reach the budget."""
        return -(-self._config.max_agent_steps // SEGMENT_AGENT_STEPS) + 1

    def process(self, spec: WorkerSpec, tracker=beam.DoFn.RestrictionParam(Segments())) -> None:
        """Acts and learns in turn; everything opened is closed when it ends or fails."""
        with open_bundle(self._config, self._addresses, spec) as bundle:
            for segment in claimed(tracker, bundle.actor.finished):
                agent_steps = bundle.actor.run(segment, SEGMENT_AGENT_STEPS)
                self._agent_steps.inc(agent_steps)
                self._gradients.inc(bundle.learn(agent_steps))
