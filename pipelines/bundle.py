"""The bundled job: bundle numbers in, gradients to the parameter server.

A bundle is the paper's: one actor, its own replay and one learner in one worker (section 4); only
parameters travel.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import apache_beam as beam
from apache_beam.metrics import Metrics

from pipelines import workers
from pipelines.config import ExperimentConfig
from pipelines.segments import Segments, claimed
from pipelines.workers import ActorWorker, Addresses, LearnerWorker, Submission, WorkerSpec

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
            | 'Act and learn'  # environment -> own replay -> gradients
            >> beam.ParDo(ActAndLearn(self._config, self._addresses))
        )


class ActAndLearn(beam.DoFn):
    """Runs one bundle until the global budget is reached.

    Actor and learner are one DoFn, not two in a row: an engine may keep all that the first puts
    out until it has ended (Dask does), and the second would learn nothing until then.
    """

    def __init__(self, config: ExperimentConfig, addresses: Addresses):
        self._config = config
        self._addresses = addresses
        self._agent_steps = Metrics.counter('bundle', 'agent_steps')
        self._gradients = Metrics.counter('bundle', 'gradients')

    def setup(self) -> None:
        workers.prepare_process(self._config)

    def process(
        self,
        spec: WorkerSpec,
        tracker=beam.DoFn.RestrictionParam(Segments()),
    ) -> None:
        """Acts and learns in turn; everything opened is closed when it ends or fails."""
        with open_bundle(self._config, self._addresses, spec) as bundle:
            for segment in claimed(tracker, bundle.actor.finished):
                agent_steps = bundle.actor.run(segment, SEGMENT_AGENT_STEPS)
                self._agent_steps.inc(agent_steps)
                self._gradients.inc(bundle.learn(agent_steps))


@dataclasses.dataclass
class Bundle:
    """An actor and a learner that take turns.

    Attributes:
      actor: feeds the bundle's replay.
      owed: how many updates are due.
      open_learner: the learner, opened at the first update: what it would draw and keep ready
        before the replay is filled would be the first few transitions again and again.
    """

    actor: ActorWorker
    owed: 'UpdatesOwed'
    open_learner: Callable[[], LearnerWorker]
    _learner: LearnerWorker | None = None

    def learn(self, agent_steps: int) -> int:
        """Makes the updates that `agent_steps` more decisions call for; returns how many."""
        updates = self.owed.after(agent_steps)
        if not updates:
            return 0
        self._learner = self._learner or self.open_learner()
        return self._learner.run(updates)


@contextlib.contextmanager
def open_bundle(
    config: ExperimentConfig, addresses: Addresses, spec: WorkerSpec
) -> Iterator[Bundle]:
    """A bundle with its replay, environments, networks and connections."""
    own = bundle_config(config)
    with contextlib.ExitStack() as stack:
        ours = addresses.with_replay(stack.enter_context(open_local_replay(own)))
        actor = stack.enter_context(workers.open_actor(own, ours, spec, 'bundle'))
        learner = workers.open_learner(own, ours, spec, 'bundle')
        owed = UpdatesOwed(own.replay.min_replay_size, config.replay.agent_steps_per_update)
        yield Bundle(actor, owed, lambda: stack.enter_context(learner))


class UpdatesOwed:
    """Turns agent steps into updates at the configured ratio, from the minimum replay size on."""

    def __init__(self, min_replay_size: int, agent_steps_per_update: float):
        self._unlearned = min_replay_size
        self._steps_per_update = agent_steps_per_update
        self._steps = 0.0

    def after(self, agent_steps: int) -> int:
        """Updates due after `agent_steps` more decisions; with no ratio one each segment."""
        waiting = min(self._unlearned, agent_steps)
        self._unlearned -= waiting
        self._steps += agent_steps - waiting
        if self._unlearned:
            return 0
        if not self._steps_per_update:
            return 1
        updates = int(self._steps // self._steps_per_update)
        self._steps -= updates * self._steps_per_update
        return updates


def bundle_config(config: ExperimentConfig) -> ExperimentConfig:
    """The experiment as one bundle sees it: its share of the replay, and no limiter's ratio.

    The bundle itself keeps the ratio by taking turns; a limiter that blocked its only thread would
    block it for ever.
    """
    bundles = config.run.num_actors
    replay = dataclasses.replace(
        config.replay,
        num_replay_shards=1,
        replay_mode='global',
        replay_capacity=-(-config.replay.replay_capacity // bundles),
        min_replay_size=-(-config.replay.min_replay_size // bundles),
        agent_steps_per_update=0.0,
    )
    return dataclasses.replace(config, replay=replay)


@contextlib.contextmanager
def open_local_replay(config: ExperimentConfig) -> Iterator[str]:
    """A replay server in this process, for this process; yields its address.

    Its table opens with the first transition: `UpdatesOwed` waits for the minimum size. The table's
    own minimum counts confirmed transitions, which lag behind the steps.
    """
    from infra.replay.server import ShardConfig, build_tables, start_server, stop_server
    from pipelines import agent

    shard = ShardConfig(
        dataclasses.replace(config.replay, min_replay_size=1),
        agent.trajectory_spec(config),
        config.learner.batch_size,
        telemetry=False,
    )
    server = start_server(build_tables(shard, 0))
    try:
        yield f'127.0.0.1:{server.port}'
    finally:
        stop_server(server)  # the bundle's learner may still be connected
