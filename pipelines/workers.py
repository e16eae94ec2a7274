"""What runs inside a worker process: a box opened from the configuration, driven by segments.

In: the experiment, the servers' addresses, a worker's number. Out: work done in the servers, and
telemetry. Everything a worker opens is closed by the `with` that opened it.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.process import exit_with_launcher
from infra.replay.config import shard_of_worker
from infra.replay.errors import ReplayError
from pipelines.config import ExperimentConfig

if TYPE_CHECKING:
    from agents.actor import Actor
    from agents.environment import AtariEnvironment
    from agents.learner import Learner
    from infra.replay.dataset import ReplayDataset
    from infra.replay.status import StatusReader
    from infra.telemetry import Telemetry

SERVER_SECONDS = 90.0
"""A worker waits so long for a parameter shard: a restart imports TensorFlow, on a busy machine."""

REPLAY_SECONDS = 600.0
"""An actor waits so long for the replay: learners may all be away, a shard may checkpoint."""

STATUS_SECONDS = 2.0
"""Between two status records of a worker, which are its heartbeat too."""

# Names of random streams: the same number must never seed two different things.
_ENVIRONMENT_STREAM, _EXPLORATION_STREAM = 1, 2


@dataclasses.dataclass(frozen=True)
class Addresses:
    """Where the servers are, each `host:port`.

    Attributes:
      parameters: parameter shards, in order.
      replay: replay shards, in order; none in the bundled topology.
      telemetry: the Reverb server with the telemetry queue.
      tls_roots: PEM, what the certificates of the parameter shards are signed by; None: no TLS.
    """

    parameters: tuple[str, ...]
    replay: tuple[str, ...]
    telemetry: str
    tls_roots: bytes | None = None

    def with_replay(self, address: str) -> 'Addresses':
        """These addresses with one other replay."""
        return dataclasses.replace(self, replay=(address,))


@dataclasses.dataclass(frozen=True)
class WorkerSpec:
    """One element of a job: a worker and the most segments it may ever need.

    Attributes:
      worker: number of the actor, learner or bundle, from 0.
      submission: number of the submission it came with: a worker that replaces a dead one must
        not play the same games again. Nor must one that the engine itself replaces, with the same
        submission: the parameter server tells it how often it was begun before.
      segments: upper bound; the run's global budget usually ends the worker sooner.
    """

    worker: int
    submission: int
    segments: int

    @property
    def name(self) -> str:
        """What the parameter server knows it by."""
        return f'{self.worker} of submission {self.submission}'


@dataclasses.dataclass(frozen=True)
class Submission:
    """The workers of one job.

    Attributes:
      workers: their numbers.
      number: how many jobs of the run were submitted before this one, over all resumptions.
    """

    workers: tuple[int, ...]
    number: int

    def specs(self, segments: int) -> list[WorkerSpec]:
        """The job's elements, each with at most `segments` segments."""
        return [WorkerSpec(worker, self.number, segments) for worker in self.workers]


def prepare_process(config: ExperimentConfig, learns: bool = True) -> None:
    """Bounds this worker process's threads and life; call it before any TensorFlow operation.

    A process that does not learn sees no accelerator; one that does takes memory of it as it needs
    more, so that several learners may share one.
    """
    exit_with_launcher()
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    # oneDNN's kernels: a gradient takes two thirds of the time on processors where TensorFlow does
    # not switch them on by itself (tests/benchmarks/benchmark_gradient.py).
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')
    os.environ.setdefault('TF_FORCE_GPU_ALLOW_GROWTH', 'true')
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # another worker in this process was first
        if not learns:
            tf.config.set_visible_devices([], 'GPU')
        accelerated = bool(tf.config.get_visible_devices('GPU'))
        tf.config.threading.set_intra_op_parallelism_threads(config.run.worker_threads)
        # On an accelerator a batch and a gradient travel beside the computation.
        tf.config.threading.set_inter_op_parallelism_threads(3 if accelerated else 1)


def budget_reached(config: ExperimentConfig) -> Callable[[Any], bool]:
    """A test of the parameter server's clock: is the run over?"""
    limit = config.max_agent_steps
    return lambda clock: clock.stopping or clock.agent_steps >= limit


class Status:
    """Tells the monitor, every few seconds, that a worker lives and what it does."""

    def __init__(self, telemetry: 'Telemetry', kind: str):
        self._telemetry = telemetry
        self._kind = kind
        self._due = 0.0

    def tell(self, describe: Callable[[], dict[str, Any]]) -> None:
        """Records a heartbeat and `describe()` when they are due."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + STATUS_SECONDS
            _beat(self._telemetry)
            self.tell_now(describe)

    def tell_now(self, describe: Callable[[], dict[str, Any]]) -> None:
        """Records `describe()`, due or not."""
        self._telemetry.record(self._kind, **describe())


def _beat(telemetry: 'Telemetry') -> None:
    """A sign of life; the first one tells the process id before the slow parts of the start."""
    telemetry.record('heartbeat', pid=os.getpid())


class ActorWorker:
    """An actor that acts in segments and reports its episodes."""

    def __init__(
        self,
        actor: 'Actor',
        seeds: tuple[int, ...],
        config: ExperimentConfig,
        telemetry: 'Telemetry',
        replay: 'StatusReader | None' = None,
    ):
        """`seeds`: of its exploration; `replay`: a bundle's own, which nobody else can ask."""
        self._actor = actor
        self._config = config
        self._telemetry = telemetry
        self._status = Status(telemetry, 'actor')
        self._look_due = 0.0
        self._budget_reached = budget_reached(config)
        self._replay = replay
        self._seeds = seeds

    def finished(self) -> bool:
        """Whether the run's budget is reached, or it is being stopped."""
        return self._budget_reached(self._actor.clock)

    def run(self, segment: int, agent_steps: int) -> int:
        """Acts for `agent_steps` decisions, or until the run is finished; returns how many."""
        rng = np.random.default_rng([*self._seeds, segment])
        made = 0
        while made < agent_steps and not self.finished():
            for episode in self._actor.step(rng):
                self._telemetry.record('episode', **dataclasses.asdict(episode))
            made += self._config.actor.envs_per_actor
            self._status.tell(self._describe)
        return made

    def wait(self) -> bool:
        """Called while the replay takes nothing: keeps reporting; whether to give up waiting."""
        self._status.tell(self._describe)
        now = time.monotonic()
        if now >= self._look_due:
            self._look_due = now + STATUS_SECONDS
            self._actor.look()
        return self.finished()

    def _describe(self) -> dict[str, Any]:
        replay = {'replay': self._replay.read()[0]} if self._replay else {}
        return {'epsilon': self._actor.epsilon, **replay}


class LearnerWorker:
    """A learner that learns in segments and reports its losses."""

    def __init__(
        self, learner: 'Learner', config: ExperimentConfig, telemetry: 'Telemetry', patient: bool
    ):
        """`patient`: waits for the replay as long as the run goes on. A bundle's learner must not:
        it shares its thread with the actor that it would wait for."""
        self._learner = learner
        self._patient = patient
        self._status = Status(telemetry, 'learner')
        self._budget_reached = budget_reached(config)

    def finished(self) -> bool:
        """Whether the run's budget is reached, or it is being stopped."""
        return self._budget_reached(self._learner.clock)

    def run(self, updates: int) -> int:
        """Computes `updates` gradients, or fewer when the run is finished before; how many."""
        made = 0
        while made < updates and not self.finished():
            try:
                self._learner.update()
                made += 1
            except ReplayError:  # the actors are not that far, or a shard restarts: ask how it goes
                self._learner.look()
                if not self._patient:
                    break
            self._status.tell(self._describe)
        self._learner.finish_push()
        return made

    def report(self) -> None:
        """Tells the last figures."""
        self._status.tell_now(self._describe)

    def _describe(self) -> dict[str, Any]:
        counters = self._learner.counters
        return {
            'loss': counters.loss,
            'mean_absolute_error': float(np.mean(counters.absolute_error)),
            'rejected_outlier': counters.outliers,
            'priorities_dropped': counters.priorities_dropped,
        }


def _connect(stack: contextlib.ExitStack, config: ExperimentConfig, addresses: Addresses, layout):
    """A client of the parameter server, closed by `stack`."""
    from infra.parameter_server.client import ParameterClient

    server = config.parameter_server
    return stack.enter_context(
        ParameterClient(
            addresses.parameters,
            layout,
            wire_dtype=server.wire_dtype,
            shared_memory=server.shared_memory,
            copy_parts=False,  # actor and learner assign them at once
            timeout_seconds=SERVER_SECONDS,
            tls_roots=addresses.tls_roots,
        )
    )


def _environment(config: ExperimentConfig, seeds: tuple[int, ...]) -> 'AtariEnvironment':
    """The games of one actor."""
    from agents.environment import AtariEnvironment

    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    return AtariEnvironment(config.environment, config.actor.envs_per_actor, seed=seed)


@contextlib.contextmanager
def open_actor(
    config: ExperimentConfig, addresses: Addresses, spec: WorkerSpec, component: str = 'actor'
) -> Iterator[ActorWorker]:
    """An actor with its environments, policy, adder and connections.

    `component` is what its telemetry calls it.
    """
    from agents.actor import Actor
    from infra.replay.adder import Adder
    from infra.replay.status import StatusReader
    from infra.telemetry import Telemetry
    from pipelines import agent

    workers: list[ActorWorker] = []
    with contextlib.ExitStack() as stack:
        telemetry = stack.enter_context(Telemetry(addresses.telemetry, component, spec.worker))
        _beat(telemetry)
        policy = agent.build_policy(config)
        parameters = _connect(stack, config, addresses, agent.layout_of(policy))
        parameters.initialise(policy.parameters())
        before = parameters.enlist(component, spec.name)
        seeds = (config.run.seed, spec.worker, spec.submission, before)
        environment = stack.enter_context(_environment(config, (*seeds, _ENVIRONMENT_STREAM)))
        adder = stack.enter_context(
            Adder(
                addresses.replay[shard_of_worker(spec.worker, len(addresses.replay))],
                agent.trajectory_spec(config),
                config.actor.envs_per_actor,
                config.replay.max_in_flight_items,
                timeout_seconds=REPLAY_SECONDS,
                should_stop=lambda: workers[0].wait(),  # noqa: PLW0108  (filled below)
            )
        )
        behaviour = agent.build_behaviour(config, policy, spec.worker, environment.num_actions)
        actor = Actor(config.actor, environment, behaviour, adder, parameters)
        replay = StatusReader(addresses.replay) if component == 'bundle' else None
        exploration = (*seeds, _EXPLORATION_STREAM)
        workers.append(ActorWorker(actor, exploration, config, telemetry, replay))
        yield workers[0]
        actor.look()  # reports the last agent steps


def _samples(config: ExperimentConfig, shards: tuple[str, ...]) -> 'ReplayDataset':
    """Batches of the replay shards at these addresses."""
    from infra.replay.dataset import sample_dataset
    from pipelines import agent

    return sample_dataset(
        shards,
        agent.trajectory_spec(config),
        config.learner.batch_size,
        config.agent.discount,
        timeout_seconds=STATUS_SECONDS,  # then the learner asks whether the run is over
    )


@contextlib.contextmanager
def open_learner(
    config: ExperimentConfig, addresses: Addresses, spec: WorkerSpec, component: str = 'learner'
) -> Iterator[LearnerWorker]:
    """A learner with its network, sample stream and connections.

    `component` is what its telemetry calls it.
    """
    from agents import device
    from agents.gradient_stream import stream_on
    from agents.learner import Learner
    from infra.replay.priorities import PriorityWriter
    from infra.telemetry import Telemetry
    from pipelines import agent

    shards = addresses.replay
    if config.replay.replay_mode == 'local':
        shards = (shards[shard_of_worker(spec.worker, len(shards))],)
    with contextlib.ExitStack() as stack:
        telemetry = stack.enter_context(Telemetry(addresses.telemetry, component, spec.worker))
        _beat(telemetry)
        device_name = device.choose(config.learner.learner_device, spec.worker)
        network = agent.build_learner(config, device_name)
        parameters = _connect(stack, config, addresses, agent.layout_of(network))
        parameters.initialise(network.parameters())
        if component == 'learner':  # a bundle's actor has told of the bundle
            parameters.enlist(component, spec.name)
        samples = stack.enter_context(_samples(config, shards))
        prioritized = config.replay.prioritized
        priorities = stack.enter_context(PriorityWriter(shards)) if prioritized else None
        stream = stream_on(device_name)
        learner = Learner(config.learner, network, samples, parameters, priorities, stream)
        stack.callback(learner.close)
        worker = LearnerWorker(learner, config, telemetry, patient=component == 'learner')
        stack.callback(worker.report)
        yield worker
