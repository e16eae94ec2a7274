"""The sharded replay for unmodified TF-Agents drivers and learners.

driver -> ReplayObserver -> rows in the shards -> ShardedReplayBuffer -> Transitions, learner
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tree
from tf_agents.replay_buffers import replay_buffer
from tf_agents.trajectories import policy_step, trajectory
from tf_agents.trajectories import time_step as ts

from agents.model import tf_agents_transition
from infra.addresses import reach_directly, require_addresses
from infra.replay.adder import Adder
from infra.replay.config import shard_of_worker
from infra.replay.dataset import ReplayDataset, sample_dataset
from infra.replay.priorities import PriorityWriter
from infra.replay.status import StatusReader
from infra.replay.trajectory import FramePart, Steps, TrajectorySpec, Transition


class UnbatchingObserver:
    """Passes each row of batched trajectories to a separate observer.

    TF-Agents' Reverb observers take one environment without a batch dimension. This wrapper makes
    them take a batch:

        UnbatchingObserver(lambda: ReverbAddTrajectoryObserver(client, table, 2), batch_size)
    """

    def __init__(self, make_observer: Callable[[], Any], num_environments: int) -> None:
        """Calls `make_observer` once per environment."""
        self._observers = [make_observer() for _ in range(num_environments)]

    def __call__(self, batch: trajectory.Trajectory) -> None:
        """Takes a Trajectory as `ReplayObserver` does and passes on each row as arrays [...].

        Raises:
          ValueError: the number of rows differs from the number of environments.
        """
        _observe(self._give, batch, len(self._observers))

    def _give(self, batch: trajectory.Trajectory) -> None:
        for row, observer in enumerate(self._observers):
            observer(tf.nest.map_structure(lambda column: column[row], batch))  # noqa: B023

    def reset(self, write_cached_steps: bool = True) -> None:
        """Resets every observer."""
        for observer in self._observers:
            observer.reset(write_cached_steps)

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

    It stores each frame once. The replay forms n-step transitions, those that end with an episode
    or life included. A driver that resets in mid-episode cuts the episode there. Environment i
    writes to shard i modulo the number of shards.
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
          spec: of the rows; its `observation` is that of observations, newest frame last.
          num_environments: E, the number of rows of a trajectory.
          clip_reward: whether to clip rewards to [-1, 1].
          **adder: further arguments of `Adder`, such as `timeout_seconds`.

        Raises:
          ValueError: an address is malformed, or `num_environments` is below 1.
        """
        addresses = require_addresses(addresses)
        reach_directly(addresses)
        if num_environments < 1:
            raise ValueError(f'num_environments is {num_environments}; it must be at least 1')
        self._clip_reward = clip_reward
        self._spec = spec
        self._shapes = [(path, p.shape) for path, p in tree.flatten_with_path(spec.observation)]
        self._begins = np.ones(num_environments, bool)  # the next row begins a sequence
        # One adder per environment: a boundary is a step of the driver but no agent step, so
        # environments advance at different rates.
        self._adders = [
            Adder(addresses[shard_of_worker(i, len(addresses))], spec, 1, **adder)
            for i in range(num_environments)
        ]

    def __enter__(self) -> 'ReplayObserver':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, batch: trajectory.Trajectory) -> None:
        """Writes a Trajectory of arrays or tensors [E, ...]; if E is 1, [...] works too.

        In a graph, such as that of a `DynamicStepDriver`, it writes when the graph runs. TensorFlow
        then raises its own errors with the messages of those below.

        Raises:
          ValueError: the number of rows is not E, or the observations do not fit the spec.
          ReplayTimeout, ReplayUnavailable, ReplaySpecMismatch: see `Adder.add`.
        """
        _observe(self._add, batch, len(self._adders))

    def _add(self, batch: trajectory.Trajectory) -> None:
        self._require_observations(batch.observation)
        steps = Steps(
            frame=_frames_of(batch.observation, self._spec)[-1],
            action=batch.action,
            reward=np.clip(batch.reward, -1.0, 1.0) if self._clip_reward else batch.reward,
            discount=batch.discount,
            first=batch.step_type == ts.StepType.FIRST,
        )
        last = batch.next_step_type == ts.StepType.LAST
        truncated = last & (steps.discount > 0)
        boundary = batch.step_type == ts.StepType.LAST
        for e, adder in enumerate(self._adders):
            if boundary[e]:  # the agent decides nothing between two episodes
                continue
            row = slice(e, e + 1)
            step = _rows(steps, row)
            if self._begins[e] and not step.first:
                step = _add_older_frames(adder, step, _rows(batch.observation, row), self._spec)
            adder.add(step, truncated[row])
            self._begins[e] = False

    def _require_observations(self, observation: Any) -> None:
        """
        Raises:
          ValueError: the observations do not fit the spec.
        """
        given = [(path, array.shape[1:]) for path, array in tree.flatten_with_path(observation)]
        if given != self._shapes:
            raise ValueError(
                f'observations are {_shown(given)}, the spec has {_shown(self._shapes)}'
            )

    def reset(self, write_cached_steps: bool = True) -> None:
        """Starts a new sequence with the next row of each environment, in mid-episode too.

        Drops transitions that still need a later row. All others are written already, so
        `write_cached_steps`, an argument of TF-Agents' observers, has no effect.
        """
        del write_cached_steps
        self._begins[:] = True

    def flush(self, timeout_seconds: float | None = None) -> bool:
        """Waits until the shards confirm every transition; false if the time ends first."""
        confirmed = [adder.flush(timeout_seconds) for adder in self._adders]
        return all(confirmed)

    def close(self) -> None:
        """Sends the remaining rows, for at most two seconds per environment."""
        for adder in self._adders:
            adder.close()


def _observe(observe: Callable, batch: trajectory.Trajectory, num_environments: int) -> None:
    """Passes the trajectory to `observe` as arrays [E, ...], at once or when the graph runs.

    Raises:
      ValueError: the number of rows is not `num_environments`.
    """

    def given(*columns: Any) -> None:
        arrays = tf.nest.pack_sequence_as(batch, [np.asarray(column) for column in columns])
        observe(_batched(arrays, num_environments))

    columns = tf.nest.flatten(batch)
    if tf.executing_eagerly():
        given(*columns)
    else:
        # TF-Agents' drivers wait for the last operation that an observer adds, which is this one.
        tf.numpy_function(given, columns, [])


def _batched(batch: trajectory.Trajectory, num_environments: int) -> trajectory.Trajectory:
    """Adds the dimension E to the arrays of a single environment.

    Raises:
      ValueError: the number of rows is not `num_environments`.
    """
    shape, expected = batch.step_type.shape, (num_environments,)
    if shape == () and num_environments == 1:
        return tf.nest.map_structure(lambda column: column[None], batch)
    if shape != expected:
        raise ValueError(
            f'trajectory: step_type has the shape {shape}, not {expected}. Fix: num_environments is'
            ' the batch size of the environment, or 1 if it has none.'
        )
    return batch


def _rows(nest: Any, rows: slice) -> Any:
    return tf.nest.map_structure(lambda column: column[rows], nest)


def _shown(shapes: list[tuple]) -> str:
    """Shapes of the parts of an observation, each with its path if it has one."""
    return ', '.join('/'.join(map(str, (*path, shape))) for path, shape in shapes)


def _frames_of(observation: Any, spec: TrajectorySpec) -> list[Any]:
    """The frames [E, ...] that observations [E, ...] stack, newest last."""

    def split(array: np.ndarray, part: FramePart) -> list[np.ndarray]:
        frames = np.split(array, spec.frame_stack, axis=-1)
        return [frame.reshape(-1, *part.shape) for frame in frames]

    by_part = map(split, tree.flatten(observation), spec.parts)
    return [tree.unflatten_as(spec.frame, frame) for frame in zip(*by_part)]


def _add_older_frames(adder: Adder, step: Steps, observation: Any, spec: TrajectorySpec) -> Steps:
    """Adds the older frames of a step that starts a sequence in mid-episode; returns the step.

    Each older frame of `observation` [1, ...] becomes a truncated row, so no transition starts
    there.
    """
    *older, newest = (
        step._replace(frame=frame, first=np.array([k == 0]))
        for k, frame in enumerate(_frames_of(observation, spec))
    )
    for row in older:
        adder.add(row, np.array([True]))
    return newest


class SampleInfo(NamedTuple):
    """Sampling data of each transition of a batch."""

    key: Any  # uint64 [B], identifies the item
    probability: Any  # float64 [B], of drawing the item at its shard
    table_size: Any  # int64 [B], items at its shard when it was drawn
    shard: Any  # int32 [B], index into the addresses


class ShardedReplayBuffer(replay_buffer.ReplayBuffer):
    """Presents all replay shards as one TF-Agents replay buffer of n-step Transitions.

    `as_dataset(sample_batch_size=B)` yields (Transition, SampleInfo). The transition has TF-Agents'
    form: an n-step reward, and gamma^(n-1) times the episode's discounts, since the agent
    multiplies by gamma once more.

    As a context manager it closes its datasets and their threads on exit.
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
          spec: of the stored rows.
          gamma: the agent's discount per agent step.
          timeout_seconds: longest wait of a dataset for transitions.

        Raises:
          ValueError: an address is malformed, or `gamma` is not in (0, 1].
        """
        if not 0.0 < gamma <= 1.0:
            raise ValueError(f'gamma is {gamma}; it must be more than 0 and at most 1')
        self._addresses = require_addresses(addresses)
        reach_directly(addresses)
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
        """Sets the priorities of sampled transitions from their errors, float [B]; never blocks.

        Raises:
          RuntimeError: the buffer is closed.
        """
        if self._closed:
            raise RuntimeError('update_priorities() after close(): the buffer sends no more')
        if self._priorities is None:
            self._priorities = PriorityWriter(self._addresses)
        self._priorities.update(*map(np.asarray, (info.key, info.shard, error)))

    def close(self) -> None:
        """Closes the datasets and sends pending priorities; repeated calls have no effect."""
        self._closed = True
        for samples in list(self._open):
            samples.close()
        if self._priorities is not None:
            self._priorities.close()
            self._priorities = None

    def _num_frames(self) -> int:
        """Number of transitions in all reachable shards."""
        return sum(status.get('size', 0) for status in self._status.read())

    def _as_dataset(
        self,
        sample_batch_size: int | None = None,
        num_steps: int | None = None,
        sequence_preprocess_fn: Any = None,
        num_parallel_calls: int | None = None,
    ) -> tf.data.Dataset:
        del num_parallel_calls  # there is always one thread per shard
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
    time_step = ts.time_step_spec(
        tree.map_structure(
            lambda part: tf.TensorSpec(part.shape, part.dtype, 'observation'), spec.observation
        )
    )
    return trajectory.Transition(
        time_step, policy_step.PolicyStep(tf.TensorSpec((), tf.int32, 'action'), (), ()), time_step
    )


def _signature(spec: TrajectorySpec, batch_size: int) -> tuple[Transition, SampleInfo]:
    """Output signature of the batches that the shards deliver."""

    def column(dtype: tf.DType, *shape: int) -> tf.TensorSpec:
        return tf.TensorSpec((batch_size, *shape), dtype)

    frames = tree.map_structure(
        lambda part: column(tf.as_dtype(part.dtype), *part.shape), spec.observation
    )
    numbers = column(tf.float32)
    return (
        Transition(frames, column(tf.int32), numbers, numbers, frames),
        SampleInfo(column(tf.uint64), column(tf.float64), column(tf.int64), column(tf.int32)),
    )
