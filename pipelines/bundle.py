"""The bundled job: bundle numbers in, gradients to the parameter server.

A bundle is the paper's: one actor, its own replay and one learner in one worker (section 4); only
parameters travel.
"""

import contextlib
from collections.abc import Iterator

import apache_beam as beam
from apache_beam.metrics import Metrics

from pipelines import workers
from pipelines.config import ExperimentConfig
from pipelines.segments import Segments, claimed
from pipelines.workers import Addresses, Submission, WorkerSpec

SEGMENT_AGENT_STEPS = 64
"""Decisions of a bundle's actor before its learner has its turn: 16 updates at 4 steps each."""


class Bundles(beam.PTransform):
    """Bundles of actor, replay and learner.

    Input: a pipeline's root. Output: nothing; the counters `agent_steps` and `gradients` count.
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
            | 'Bundles' >> beam.Create(self._submission.specs(segments))
            | 'Spread' >> beam.Reshuffle()  # prevents fusion: a worker process for each bundle
            | 'Act' >> beam.ParDo(BundleAct(self._config, self._addresses))  # -> local replay
            | 'Learn' >> beam.ParDo(BundleLearn(self._config, self._addresses))  # -> gradients
        )


class BundleAct(beam.DoFn):
    """A bundle's actor and replay; each segment goes on to the bundle's learner at once."""

    def __init__(self, config: ExperimentConfig, addresses: Addresses):
        self._config = config
        self._addresses = addresses
        self._agent_steps = Metrics.counter('bundle', 'agent_steps')

    def setup(self) -> None:
        workers.prepare_process(self._config)

    def process(
        self,
        spec: WorkerSpec,
        tracker=beam.DoFn.RestrictionParam(Segments()),
    ) -> Iterator[workers.BundleSegment]:
        """Acts segment by segment; everything opened is closed when it ends or fails."""
        config = workers.bundle_config(self._config)
        replay = self._config.replay
        with workers.open_local_replay(config) as address:
            addresses = self._addresses.with_replay(address)
            with workers.open_actor(config, addresses, spec, 'bundle') as actor:
                owed = workers.UpdatesOwed(
                    config.replay.min_replay_size, replay.agent_steps_per_update
                )
                for segment in claimed(tracker, actor.finished):
                    acted = actor.run(segment, SEGMENT_AGENT_STEPS)
                    self._agent_steps.inc(acted)
                    yield workers.BundleSegment(spec, addresses, owed.after(acted))


class BundleLearn(beam.DoFn):
    """A bundle's learner: makes the updates that the actor's steps call for."""

    def __init__(self, config: ExperimentConfig, addresses: Addresses):
        self._config = config
        self._addresses = addresses
        self._gradients = Metrics.counter('bundle', 'gradients')

    def setup(self) -> None:
        workers.prepare_process(self._config)
        self._stack = contextlib.ExitStack()

    def start_bundle(self) -> None:
        self._learners: dict[int, workers.LearnerWorker] = {}

    def process(self, acted: workers.BundleSegment) -> None:
        """Learns from the bundle's replay."""
        if acted.updates:
            self._gradients.inc(self._learner(acted).run(acted.updates))

    def finish_bundle(self) -> None:
        self._stack.close()

    def teardown(self) -> None:
        self._stack.close()  # of a bundle that failed

    def _learner(self, acted: workers.BundleSegment) -> workers.LearnerWorker:
        """The bundle's learner, opened when it is first needed."""
        worker = acted.spec.worker
        if worker not in self._learners:
            config = workers.bundle_config(self._config)
            self._learners[worker] = self._stack.enter_context(
                workers.open_learner(config, acted.addresses, acted.spec, 'bundle')
            )
        return self._learners[worker]
