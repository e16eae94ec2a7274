"""A bundle in its worker: experiment and addresses in; actor and learner in turn out."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.launch import Addresses
from pipelines.workers import boxes
from pipelines.workers.boxes import ActorWorker, Enlisted, LearnerWorker, OpenWorker
from pipelines.workers.spec import WorkerSpec

TURN_AGENT_STEPS = 64
"""Agent steps of the actor before the learner's turn: 16 updates at 4 steps each."""
_TURNS = 32  # of a segment, which take seconds
SEGMENT_AGENT_STEPS = _TURNS * TURN_AGENT_STEPS


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An actor and a learner that take turns, with one network and one connection.

    Attributes:
      actor: fills the bundle's replay.
      learner: learns from it.
      owed: counts the updates that are due.
    """

    actor: ActorWorker
    learner: LearnerWorker
    owed: 'UpdatesOwed'

    def finished(self) -> bool:
        """Whether the run's budget is reached or the run is being stopped."""
        return self.actor.finished()

    def run_segment(self, segment: int) -> None:
        """Acts and learns in turn for one segment."""
        due = time.monotonic() + boxes.SEGMENT_SECONDS
        for turn in range(_TURNS):
            if self.finished() or time.monotonic() > due:
                break
            self.learn(self.actor.run(segment * _TURNS + turn, TURN_AGENT_STEPS))

    def take(self) -> dict[str, Any]:
        """The figures of `Segment` since the last call."""
        return {**self.actor.take(), **self.learner.take()}

    def learn(self, agent_steps: int) -> int:
        """Makes the updates due after `agent_steps` more steps; returns their number."""
        updates = self.owed.after(agent_steps)
        if not updates:
            return 0
        self.actor.sync()  # else the first gradient would be as old as the actor's turn
        made = self.learner.run(updates)
        self.owed.carry(updates - made)  # a batch may be late on a busy machine
        return made


@contextlib.contextmanager
def open_bundle(
    config: ExperimentConfig, addresses: Addresses, spec: WorkerSpec
) -> Iterator[OpenWorker]:
    """Opens a bundle with its environments, network, connections and, if own, its replay."""
    build = functools.partial(boxes.learners_network, config, spec)
    own = config.run.replay_in_workers
    shards = () if own else boxes.shards_of(config, addresses, spec)
    with (
        boxes.enlisted(config, addresses, spec, 'bundle', build) as worker,
        bundled(config, worker, shards) as bundle,
    ):
        yield OpenWorker('bundle', worker, bundle)


@contextlib.contextmanager
def bundled(
    config: ExperimentConfig, worker: Enlisted, shards: tuple[str, ...] = ()
) -> Iterator[Bundle]:
    """Opens an enlisted worker's environments, actor and learner.

    Their replay is at `shards`, or, without any, in this process.
    """
    from agents.policy import GreedyPolicy

    own = bundle_config(config)
    with contextlib.ExitStack() as stack:
        replay = shards or (stack.enter_context(open_local_replay(own)),)
        samples = Later(lambda: stack.enter_context(boxes.samples_of(own, replay)))
        learner = stack.enter_context(boxes.learning(own, replay, worker, samples))
        policy = GreedyPolicy(worker.network.model)
        actor = stack.enter_context(
            boxes.acting(own, replay, worker, policy, LearnersParameters(learner))
        )
        missing = config.replay.min_replay_size - held(replay)
        share = max(0, -(-missing // config.run.num_actors))
        owed = UpdatesOwed(share, config.replay.agent_steps_per_update)
        yield Bundle(actor, learner, owed)


class Pulled(NamedTuple):
    """Result of a pull by an actor that shares its learner's network."""

    clock: Any
    parts: None = None  # the learner has already applied them


class LearnersParameters:
    """Parameter client of an actor that shares its learner's network."""

    def __init__(self, learner: LearnerWorker):
        self._learner = learner

    def pull(self, agent_steps: int = 0) -> Pulled:
        """Reports agent steps and pulls newer parameters."""
        return Pulled(self._learner.sync(agent_steps))


class Later:
    """An iterator that is opened at the first `next`.

    Samples prefetched before a bundle's replay is filled would only repeat its first transitions.
    """

    def __init__(self, opener: Callable[[], Iterator[Any]]):
        self._opener = opener
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> 'Later':
        return self

    def __next__(self) -> Any:
        self._iterator = self._iterator or self._opener()
        return next(self._iterator)


def held(shards: Sequence[str]) -> int:
    """Transitions at the replay shards, as far as they answer: those of a resumed run have some."""
    from infra.replay.status import StatusReader

    return sum(status.get('size', 0) for status in StatusReader(shards).read())


class UpdatesOwed:
    """Converts agent steps to updates at the configured ratio, after the first `unlearned`."""

    def __init__(self, unlearned: int, agent_steps_per_update: float):
        self._unlearned = unlearned
        self._steps_per_update = agent_steps_per_update
        self._steps = 0.0
        self._carried = 0

    def carry(self, updates: int) -> None:
        """Defers updates that could not be made to the next turn."""
        self._carried += updates

    def after(self, agent_steps: int) -> int:
        """Updates due after `agent_steps` more steps; without a ratio one a segment."""
        waiting = min(self._unlearned, agent_steps)
        self._unlearned -= waiting
        self._steps += agent_steps - waiting
        if self._unlearned:
            return 0
        if not self._steps_per_update:
            return 1
        updates = int(self._steps // self._steps_per_update)
        self._steps -= updates * self._steps_per_update
        carried, self._carried = self._carried, 0
        return updates + carried


def bundle_config(config: ExperimentConfig) -> ExperimentConfig:
    """The experiment of one bundle: its share of the replay, no ratio of the rate limiter.

    The bundle keeps the ratio by taking turns; a limiter would block its only thread for ever.
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
    """Runs a replay server in this process; yields its address.

    Sampling starts with the first transition, since `UpdatesOwed` waits for the minimum size; a
    table would count only confirmed transitions, which lag behind the steps.
    """
    from infra.replay.server import ShardConfig, build_tables, start_server, stop_server
    from pipelines.experiment.frames import trajectory_spec

    shard = ShardConfig(
        dataclasses.replace(config.replay, min_replay_size=1),
        trajectory_spec(config),
        config.learner.batch_size,
        telemetry=False,
    )
    server = start_server(build_tables(shard, 0))
    try:
        yield f'127.0.0.1:{server.port}'
    finally:
        stop_server(server)  # the learner may still be connected
