"""Actors and learners in a worker process: experiment and addresses in, an open worker out.

A worker runs in segments. The `with` that opens a worker closes everything it uses.
"""

import contextlib
import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.addresses import reach_directly
from infra.replay.config import shard_of_worker
from infra.replay.errors import ReplayError
from pipelines.events import beat
from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.launch import Addresses
from pipelines.workers.process import STATUS_SECONDS, Status, budget_reached
from pipelines.workers.segment import Episode, Segment, decode, encode
from pipelines.workers.spec import WorkerSpec

if TYPE_CHECKING:
    from agents.actor import Actor
    from agents.environments.frames import Environment
    from agents.gradient import AgentGradient
    from agents.learner import Learner
    from agents.policy import GreedyPolicy
    from infra.parameter_server.client import ParameterClient
    from infra.replay.adder import Adder
    from infra.replay.dataset import ReplayDataset, Sample
    from infra.replay.status import StatusReader
    from infra.telemetry import Telemetry


SERVER_SECONDS = 90.0
"""How long a worker waits for a parameter shard, whose restart imports TensorFlow."""

REPLAY_SECONDS = 600.0
"""How long an actor waits for the replay: all learners may be down, a shard may be saving."""

ACTOR_SEGMENT = 2_000
"""Agent steps of an actor's segment, which take seconds."""
LEARNER_SEGMENT = 500
"""Updates of a learner's segment, which take seconds."""
SEGMENT_SECONDS = 10.0
"""After which a segment ends at the latest, as with a slow environment or a full replay: it tells
that it works."""

# Each random stream needs its own number.
_ENVIRONMENT_STREAM, _EXPLORATION_STREAM = 1, 2


class ActorWorker:
    """Runs an actor in segments and reports its episodes.

    Attributes:
      made: agent steps so far.
    """

    def __init__(
        self,
        actor: 'Actor',
        seeds: tuple[int, ...],
        config: ExperimentConfig,
        telemetry: 'Telemetry',
        adder: 'Adder',
        replay: 'StatusReader | None' = None,
    ):
        """`seeds` are those of exploration; `replay` is a bundle's own, whose status it reports."""
        self._actor = actor
        self._adder = adder
        adder.should_stop = self.wait
        self._config = config
        self._telemetry = telemetry
        self._status = Status(telemetry, 'actor')
        self._sync_due = 0.0
        self.made = 0
        self._taken = 0  # of these, in earlier figures
        self._episodes: list[Episode] = []
        self._budget_reached = budget_reached(config)
        self._replay = replay
        self._seeds = seeds

    def finished(self) -> bool:
        """Whether the run's budget is reached or the run is being stopped."""
        return self._budget_reached(self._actor.clock)

    def run(self, segment: int, agent_steps: int) -> int:
        """Acts for `agent_steps`, or until the run is finished; returns the steps made."""
        rng = np.random.default_rng([*self._seeds, segment])
        before, due = self.made, time.monotonic() + SEGMENT_SECONDS
        goal = before + agent_steps
        while self.made < goal and not self.finished() and (left := due - time.monotonic()) > 0:
            if not self._adder.wait_for_room(left):
                break  # the next segment continues the wait
            for game in self._actor.step(rng):
                steps, updates = self._actor.run_agent_steps, self._actor.clock.updates
                episode = Episode(
                    time=time.time(),
                    **dataclasses.asdict(game),
                    run_agent_steps=steps,
                    run_updates=updates,
                )
                self._episodes.append(episode)
                self._telemetry.record('episode', **episode._asdict())
            self.made = self._actor.agent_steps
            self._status.report(self._describe)
        return self.made - before

    def run_segment(self, segment: int) -> None:
        """Acts for one segment."""
        self.run(segment, ACTOR_SEGMENT)

    def take(self) -> dict[str, Any]:
        """The figures of `Segment` since the last call; the clock holds these agent steps then."""
        self.sync()
        taken, self._taken = self._taken, self.made
        episodes, self._episodes = self._episodes, []
        return {'agent_steps': self.made - taken, 'episodes': tuple(episodes)}

    def sync(self) -> Any:
        """Reports agent steps, pulls newer parameters and returns the clock."""
        return self._actor.sync()

    def wait(self) -> bool:
        """Keeps reporting while the replay accepts nothing; returns whether to stop waiting."""
        self._status.report(self._describe)
        now = time.monotonic()
        if now >= self._sync_due:
            self._sync_due = now + STATUS_SECONDS
            self.sync()
        return self.finished()

    def _describe(self) -> dict[str, Any]:
        replay = {'replay': self._replay.read()[0]} if self._replay else {}
        return {'epsilon': self._actor.epsilon, 'agent_steps': self.made, **replay}


class LearnerWorker:
    """Runs a learner in segments and reports its losses."""

    def __init__(
        self,
        learner: 'Learner',
        config: ExperimentConfig,
        telemetry: 'Telemetry',
        precision: str | None,
    ):
        """`precision`: numbers of the learner's convolutions (see `agents.model.Model`)."""
        self._learner = learner
        self._precision = precision
        # A bundle's learner shares its thread with its actor, so it must not wait for data.
        self._patient = config.run.topology == 'separate'
        self._status = Status(telemetry, 'learner')
        self._budget_reached = budget_reached(config)
        self._taken = copy.deepcopy(learner.counters)

    def finished(self) -> bool:
        """Whether the run's budget is reached or the run is being stopped."""
        return self._budget_reached(self._learner.clock)

    def sync(self, agent_steps: int = 0) -> Any:
        """Reports agent steps, pulls newer parameters and returns the clock."""
        return self._learner.sync(agent_steps)

    def run(self, updates: int) -> int:
        """Computes up to `updates` gradients, fewer if the run ends; returns their number."""
        made, due = 0, time.monotonic() + SEGMENT_SECONDS
        while made < updates and not self.finished() and time.monotonic() < due:
            try:
                self._learner.update()
                made += 1
            except ReplayError:  # too few transitions, or a shard restarts: check for the run's end
                self._learner.sync()
                if not self._patient:
                    break
            self._status.report(self._describe)
        self._learner.finish_push()
        return made

    def run_segment(self, segment: int) -> None:
        """Learns for one segment."""
        self.run(LEARNER_SEGMENT)

    def take(self) -> dict[str, Any]:
        """The figures of `Segment` since the last call."""
        before, now = self._taken, copy.deepcopy(self._learner.counters)
        self._taken = now
        names = ('gradients', 'outliers', 'stale', 'invalid', 'loss_sum')
        figures = {name: getattr(now, name) - getattr(before, name) for name in names}
        staleness = (new - old for new, old in zip(now.staleness, before.staleness))
        return {**figures, 'staleness': tuple(staleness)}

    def report(self) -> None:
        """Reports the last figures."""
        self._status.report_now(self._describe)

    def _describe(self) -> dict[str, Any]:
        counters = self._learner.counters
        return {
            **self._learner.describe(),
            'precision': self._precision,
            'gradients': counters.gradients,
            'rejected_outlier': counters.outliers,
            'staleness': counters.staleness,
            'priorities_dropped': counters.priorities_dropped,
        }


@dataclasses.dataclass(frozen=True)
class Enlisted:
    """A worker that is registered at the parameter server.

    Attributes:
      spec: its element.
      begun_before: how often it has registered before.
      telemetry: receives its statistics.
      network: a `GreedyPolicy` or, if the worker learns, an `AgentGradient`.
      parameters: a client of the initialised parameter server.
    """

    spec: WorkerSpec
    begun_before: int
    telemetry: 'Telemetry'
    network: Any
    parameters: 'ParameterClient'


@contextlib.contextmanager
def enlisted(
    config: ExperimentConfig,
    addresses: Addresses,
    spec: WorkerSpec,
    kind: str,
    build: Callable[[], 'AgentGradient | GreedyPolicy'],
) -> Iterator[Enlisted]:
    """Opens a worker's telemetry, network and parameter client.

    `kind` is 'actor', 'learner' or 'bundle'; `build` creates the network.
    """
    from infra.parameter_server.client import ParameterClient
    from infra.telemetry import Telemetry
    from pipelines.experiment import builders

    reach_directly(addresses.all)
    server = config.parameter_server
    with contextlib.ExitStack() as stack:
        telemetry = stack.enter_context(
            Telemetry(addresses.telemetry, kind, spec.worker, submission=spec.submission)
        )
        beat(telemetry)  # reports the process ID before the slow part of the start
        network = build()
        parameters = stack.enter_context(
            ParameterClient(
                addresses.parameters,
                builders.layout_of(network),
                wire=server.wire,
                shared_memory=server.shared_memory,
                copy_parts=False,  # the network copies them at once
                timeout_seconds=SERVER_SECONDS,
                tls_roots=addresses.tls_roots,
            )
        )
        parameters.initialise(network.parameters())
        begun_before = parameters.enlist(kind, spec.name)
        yield Enlisted(spec, begun_before, telemetry, network, parameters)
        beat(telemetry, ended=True)


def _environment(config: ExperimentConfig, seeds: tuple[int, ...]) -> 'Environment':
    """The environments of one actor."""
    from agents.environments.factory import open_environment

    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    return open_environment(config.environment, config.actor.envs_per_actor, seed)


class OpenWorker:
    """A worker of any kind, whose segments are on record at the parameter server.

    Attributes:
      box: an `ActorWorker`, a `LearnerWorker` or a `Bundle`.
    """

    def __init__(self, kind: str, enlisted: Enlisted, box: Any):
        self._kind, self._spec, self._parameters = kind, enlisted.spec, enlisted.parameters
        self.box = box
        self._first = 0
        self._done: list[Segment] = []  # of this part of the element, from `_first` on

    def begin(self, committed: int) -> None:
        """Begins a part of the element; the engine has committed the segments before this one."""
        first, records = self._parameters.begin_segments(self._kind, self._spec.worker, committed)
        self._first, self._done = first, [decode(record) for record in records]

    @property
    def next(self) -> int:
        """Number of the first segment that is neither committed nor on record."""
        return self._first + len(self._done)

    def finished(self) -> bool:
        """Whether the run's budget is reached or the run is being stopped."""
        return self.box.finished()

    def segment(self, number: int) -> Segment | None:
        """Runs a segment, unless it is on record; None if it is committed."""
        if number < self._first:
            return None
        if number < self.next:
            return self._done[number - self._first]
        begun = time.monotonic()
        self.box.run_segment(number)
        figures = self.box.take()
        seconds = time.monotonic() - begun
        spec = self._spec
        identity = self._kind, spec.worker, number, spec.submission
        segment = Segment(*identity, time.time(), seconds, **figures)
        self._done.append(segment)
        self._record(number)
        return segment

    def _record(self, number: int) -> None:
        """Records a segment, after those before it that a shard lacks which restarted older."""
        following = number
        while following <= number:
            record = encode(self._done[following - self._first])
            following = self._parameters.finish_segment(
                self._kind, self._spec.worker, self._first, following, record
            )


@contextlib.contextmanager
def open_actor(
    config: ExperimentConfig, addresses: Addresses, spec: WorkerSpec
) -> Iterator[OpenWorker]:
    """Opens an actor with its environments, policy, adder and connections."""
    from pipelines.experiment import builders

    with contextlib.ExitStack() as stack:
        build = functools.partial(builders.build_policy, config)
        worker = stack.enter_context(enlisted(config, addresses, spec, 'actor', build))
        actor = stack.enter_context(
            acting(config, addresses.replay, worker, worker.network, worker.parameters)
        )
        yield OpenWorker('actor', worker, actor)


@contextlib.contextmanager
def acting(
    config: ExperimentConfig,
    replay: tuple[str, ...],
    worker: Enlisted,
    policy: 'GreedyPolicy',
    parameters: Any,
) -> Iterator[ActorWorker]:
    """Opens a worker's actor with its environments and adder.

    It acts by `policy`, writes to the shards at `replay` and pulls from `parameters`.
    """
    from agents.actor import Actor
    from infra.replay.adder import Adder
    from infra.replay.status import StatusReader
    from pipelines.experiment import builders
    from pipelines.experiment.frames import trajectory_spec

    spec = worker.spec
    seeds = (config.run.seed, spec.worker, spec.submission, worker.begun_before)
    with contextlib.ExitStack() as stack:
        environment = stack.enter_context(_environment(config, (*seeds, _ENVIRONMENT_STREAM)))
        adder = stack.enter_context(
            Adder(
                replay[shard_of_worker(spec.worker, len(replay))],
                trajectory_spec(config),
                config.actor.envs_per_actor,
                config.replay.max_in_flight_items,
                timeout_seconds=REPLAY_SECONDS,
            )
        )
        behaviour = builders.build_behaviour(config, policy, spec.worker, environment.num_actions)
        stack_size = config.environment.frame_stack
        actor = Actor(config.actor, environment, behaviour, adder, parameters, stack_size)
        own_replay = StatusReader(replay) if config.run.replay_in_workers else None
        exploration = (*seeds, _EXPLORATION_STREAM)
        yield ActorWorker(actor, exploration, config, worker.telemetry, adder, own_replay)
        actor.sync()  # reports the last agent steps


def shards_of(config: ExperimentConfig, addresses: Addresses, spec: WorkerSpec) -> tuple[str, ...]:
    """Addresses of the replay shards that a learning worker samples."""
    shards = addresses.replay
    if config.replay.replay_mode == 'local':
        shards = (shards[shard_of_worker(spec.worker, len(shards))],)
    return shards


def samples_of(config: ExperimentConfig, shards: tuple[str, ...]) -> 'ReplayDataset':
    """Batches from the replay shards at these addresses."""
    from infra.replay.dataset import sample_dataset
    from pipelines.experiment.frames import trajectory_spec

    return sample_dataset(
        shards,
        trajectory_spec(config),
        config.learner.batch_size,
        config.agent.discount,
        timeout_seconds=STATUS_SECONDS,  # then the learner checks whether the run is over
        in_flight=config.learner.batches_in_flight,
    )


@contextlib.contextmanager
def open_learner(
    config: ExperimentConfig, addresses: Addresses, spec: WorkerSpec
) -> Iterator[OpenWorker]:
    """Opens a learner with its network, sample stream and connections."""
    shards = shards_of(config, addresses, spec)
    with contextlib.ExitStack() as stack:
        build = functools.partial(learners_network, config, spec)
        worker = stack.enter_context(enlisted(config, addresses, spec, 'learner', build))
        samples = stack.enter_context(samples_of(config, shards))
        learner = stack.enter_context(learning(config, shards, worker, samples))
        yield OpenWorker('learner', worker, learner)


def learners_network(config: ExperimentConfig, spec: WorkerSpec) -> 'AgentGradient':
    """The network of a learning worker, on its device."""
    from agents import device
    from pipelines.experiment import builders

    return builders.build_learner(config, device.choose(config.learner.learner_device, spec.worker))


@contextlib.contextmanager
def learning(
    config: ExperimentConfig, replay: tuple[str, ...], worker: Enlisted, samples: Iterator['Sample']
) -> Iterator[LearnerWorker]:
    """Opens a worker's learner, which learns from `samples` of the shards at `replay`."""
    from agents.gradient_pipeline import InTurn, stream_on
    from agents.learner import Learner
    from infra.parameter_server.lanes import PushLanes
    from infra.replay.priorities import PriorityWriter

    with contextlib.ExitStack() as stack:
        prioritized = config.replay.prioritized
        priorities = stack.enter_context(PriorityWriter(replay)) if prioritized else None
        # A gradient computed ahead would be as old as a turn of the bundle's actor.
        stream = InTurn if config.run.topology == 'bundled' else stream_on(worker.network.device)
        lanes = PushLanes(worker.parameters, config.learner.pushes_in_flight)
        parameters = stack.enter_context(lanes)
        learner = Learner(config.learner, worker.network, samples, parameters, priorities, stream)
        stack.callback(learner.close)
        precision = worker.network.model.precision
        learner_worker = LearnerWorker(learner, config, worker.telemetry, precision)
        stack.callback(learner_worker.report)
        yield learner_worker
