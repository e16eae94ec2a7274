"""The sharded replay for unmodified TF-Agents drivers and learners.

driver -> ReplayObserver -> rows in the shards -> ShardedReplayBuffer -> Transitions, learner
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tf_agents.replay_buffers import replay_buffer
from tf_agents.trajectories import policy_step, trajectory
from tf_agents.trajectories import time_step as ts

from agents.model import tf_agents_transition
from infra.addresses import require_addresses
from infra.replay.adder import Adder
from infra.replay.config import shard_of_worker
from infra.replay.dataset import ReplayDataset, sample_dataset
from infra.replay.priorities import PriorityWriter
from infra.replay.status import StatusReader
from infra.replay.trajectory import Steps, TrajectorySpec, Transition


class UnbatchingObserver:
    """Gives each row of batched trajectories to an observer of its own.

    TF-Agents' Reverb observers follow one environment and take no batch dimension; with this they
    serve a batched one:

        UnbatchingObserver(lambda: ReverbAddTrajectoryObserver(client, table, 2), batch_size)
    """

    def __init__(self, make_observer: Callable[[], Any], num_environments: int) -> None:
        """`make_observer` is called once an environment."""
        self._observers = [make_observer() for _ in range(num_environments)]

    def __call__(self, batch: trajectory.Trajectory) -> None:
        """Takes a Trajectory of arrays [E, ...].

        Raises:
          ValueError: it has another number of rows.
        """
        if len(batch.step_type) != len(self._observers):
            raise ValueError(f'{len(batch.step_type)} rows for {len(self._observers)} observers')
        for row, observer in enumerate(self._observers):
            observer(tf.nest.map_structure(lambda column: column[row], batch))  # noqa: B023

    def flush(self) -> None:
        """Flushes every observer."""
        for observer in self._observers:
            observer.flush()

    def close(self) -> None:
        """Closes every observer."""
        for observer in self._observers:
            observer.close()


class ReplayObserver:
    """Writes batched trajectories to this project's replay shards; use it in a `with`.

    Each frame is stored once, and n-step transitions are formed by the replay, across the ends of
    episodes and lives included. A driver that resets in mid-episode cuts it there. Environment i
    uses shard i modulo their number.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        spec: TrajectorySpec,
        num_environments: int,
        clip_reward: bool = True,
        **adder: Any,
    ) -> None:
        """
        Args:
          addresses: host:port of every shard, in order.
          spec: of the rows; observations are uint8 [height, width, frame_stack], newest last.
          num_environments: E, rows of a trajectory.
          clip_reward: whether rewards are clipped to [-1, 1].
          **adder: further arguments of `Adder`, such as `timeout_seconds`.

        Raises:
          ValueError: an address is none, or there is no environment.
        """
        addresses = require_addresses(addresses)
        if num_environments < 1:
            raise ValueError(f'num_environments is {num_environments}; it must be at least 1')
        self._clip_reward = clip_reward
        self._observation_shape = (*spec.frame_shape, spec.frame_stack)
        # A stream each: a boundary is a step of the driver's, but no agent step, so environments
        # do not stay abreast.
        self._adders = [
            Adder(addresses[shard_of_worker(i, len(addresses))], spec, 1, **adder)
            for i in range(num_environments)
        ]

    def __enter__(self) -> 'ReplayObserver':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, batch: trajectory.Trajectory) -> None:
        """Takes a Trajectory of arrays or tensors [E, ...].

        Raises:
          ValueError: it has another number of rows, or does not fit the spec.
          ReplayTimeout, ReplayUnavailable, ReplaySpecMismatch: see `Adder.add`.
        """
        if len(batch.step_type) != len(self._adders):
            raise ValueError(f'{len(batch.step_type)} rows for {len(self._adders)} environments')
        observation = np.asarray(batch.observation)
        if observation.shape[1:] != self._observation_shape:
            raise ValueError(
                f'observations are {observation.shape[1:]}, the spec has {self._observation_shape}'
            )
        reward = np.asarray(batch.reward)
        steps = Steps(
            frame=observation[..., -1],
            action=np.asarray(batch.action),
            reward=np.clip(reward, -1.0, 1.0) if self._clip_reward else reward,
            discount=np.asarray(batch.discount),
            first=np.asarray(batch.step_type) == ts.StepType.FIRST,
        )
        last = np.asarray(batch.next_step_type) == ts.StepType.LAST
        truncated = last & (steps.discount > 0)
        boundary = np.asarray(batch.step_type) == ts.StepType.LAST
        for e, adder in enumerate(self._adders):
            if not boundary[e]:  # between two episodes nothing is decided
                row = slice(e, e + 1)
                adder.add(Steps(*(column[row] for column in steps)), truncated[row])

    def flush(self, timeout_seconds: float | None = None) -> bool:
        """Waits until every transition is confirmed; whether it was, within the time."""
        confirmed = [adder.flush(timeout_seconds) for adder in self._adders]
        return all(confirmed)

    def close(self) -> None:
        """Sends what is left, as far as that takes no longer than two seconds an environment."""
        for adder in self._adders:
            adder.close()


class SampleInfo(NamedTuple):
    """What the replay tells of each transition of a batch."""

    key: Any  # uint64 [B], the item
    probability: Any  # float64 [B], with which it was drawn at its shard
    table_size: Any  # int64 [B], items at its shard then
    shard: Any  # int32 [B], index into the addresses


class ShardedReplayBuffer(replay_buffer.ReplayBuffer):
    """All replay shards as one TF-Agents replay buffer of n-step Transitions.

    `as_dataset(sample_batch_size=B)` yields (Transition, SampleInfo). The transition is in
    TF-Agents' form: its reward is the n-step one, its discount gamma^(n-1) times those of the
    episode, for an agent that multiplies by gamma once more.

    A context manager: leaving it ends its datasets and their threads.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        spec: TrajectorySpec,
        gamma: float,
        timeout_seconds: float = 600.0,
    ) -> None:
        """
        Args:
          addresses: host:port of every shard, in order.
          spec: of what is stored there.
          gamma: discount per agent step, the agent's.
          timeout_seconds: longest wait of a dataset for transitions.

        Raises:
          ValueError: an address is none, or `gamma` is not above 0: an agent that multiplies by 0
            needs no replay.
        """
        if not 0.0 < gamma <= 1.0:
            raise ValueError(f'gamma is {gamma}; it must be more than 0 and at most 1')
        self._addresses = require_addresses(addresses)
        self._spec = spec
        self._gamma = gamma
        self._timeout_seconds = timeout_seconds
        self._status = StatusReader(addresses)
        self._priorities: PriorityWriter | None = None
        self._open: set[ReplayDataset] = set()
        self._closed = False
        super().__init__(_transition_spec(spec), capacity=None, stateful_dataset=True)

    def __enter__(self) -> 'ShardedReplayBuffer':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update_priorities(self, info: SampleInfo, error: Any) -> None:
        """Gives sampled transitions the priority of their error, float [B]; never blocks.

        Raises:
          RuntimeError: the buffer is closed.
        """
        if self._closed:
            raise RuntimeError('update_priorities() after close(): the buffer sends no more')
        if self._priorities is None:
            self._priorities = PriorityWriter(self._addresses)
        self._priorities.update(*map(np.asarray, (info.key, info.shard, error)))

    def close(self) -> None:
        """Ends the datasets, and sends the priorities that wait; idempotent."""
        self._closed = True
        for samples in list(self._open):
            samples.close()
        if self._priorities is not None:
            self._priorities.close()
            self._priorities = None

    def _num_frames(self) -> int:
        """Transitions held by all shards that answer."""
        return sum(status.get('size', 0) for status in self._status.read())

    def _as_dataset(
        self,
        sample_batch_size: int | None = None,
        num_steps: int | None = None,
        sequence_preprocess_fn: Any = None,
        num_parallel_calls: int | None = None,
    ) -> tf.data.Dataset:
        del num_parallel_calls  # a thread a shard, always
        if not sample_batch_size or sequence_preprocess_fn or num_steps not in (None, 2):
            raise NotImplementedError(
                f'sample_batch_size={sample_batch_size}, num_steps={num_steps},'
                f' sequence_preprocess_fn={sequence_preprocess_fn}: the buffer gives batches of'
                ' transitions; name a sample_batch_size alone'
            )

        def batches() -> Iterator[tuple[Transition, SampleInfo]]:
            with sample_dataset(
                self._addresses,
                self._spec,
                sample_batch_size,
                self._gamma,
                self._timeout_seconds,
                should_stop=lambda: self._closed,
            ) as samples:
                self._open.add(samples)
                try:
                    for transition, *info in samples:
                        yield transition, SampleInfo(*info)
                finally:
                    self._open.discard(samples)

        signature = _signature(self._spec, sample_batch_size)
        dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
        return dataset.map(lambda transition, info: (self._as_experience(transition), info))

    def _as_experience(self, transition: Transition) -> trajectory.Transition:
        discount = transition.discount / self._gamma
        return tf_agents_transition(transition._replace(discount=discount))

    def _add_batch(self, items: Any) -> None:
        raise NotImplementedError('the shards are written by observers; use ReplayObserver')

    def _get_next(self, sample_batch_size: Any, num_steps: Any, time_stacked: Any) -> None:
        raise NotImplementedError('use as_dataset(sample_batch_size=...)')

    def _single_deterministic_pass_dataset(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError('transitions are drawn at random; use as_dataset')

    def _gather_all(self) -> None:
        raise NotImplementedError('the shards do not list what they hold; use as_dataset')

    def _clear(self) -> None:
        raise NotImplementedError('a replay shard is emptied by starting it anew')


def _transition_spec(spec: TrajectorySpec) -> trajectory.Transition:
    """Tensor specs of one transition, without batch dimension."""
    frames = tf.TensorSpec((*spec.frame_shape, spec.frame_stack), tf.uint8, 'observation')
    time_step = ts.time_step_spec(frames)
    return trajectory.Transition(
        time_step, policy_step.PolicyStep(tf.TensorSpec((), tf.int32, 'action'), (), ()), time_step
    )


def _signature(spec: TrajectorySpec, batch_size: int) -> tuple[Transition, SampleInfo]:
    """Of the batches as they come from the shards."""

    def column(dtype: tf.DType, *shape: int) -> tf.TensorSpec:
        return tf.TensorSpec((batch_size, *shape), dtype)

    frames = column(tf.uint8, *spec.frame_shape, spec.frame_stack)
    numbers = column(tf.float32)
    return (
        Transition(frames, column(tf.int32), numbers, numbers, frames),
        SampleInfo(column(tf.uint64), column(tf.float64), column(tf.int64), column(tf.int32)),
    )
