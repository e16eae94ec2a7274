"""Episodes of any kind of frame, stored and sampled back, equal a plain loop over them.

The loop knows episodes only: neither rows nor windows. Rewards are multiples of 1/2 and gamma is
1/2, so that every n-step sum is exact in float32.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis
import numpy as np
import pytest
import reverb
import tree
from hypothesis import strategies

from infra.replay.adder import Adder
from infra.replay.config import EXPERIENCE_TABLE, ReplayConfig
from infra.replay.dataset import sample_dataset
from infra.replay.errors import ReplaySpecMismatch
from infra.replay.server import ShardConfig, build_tables, start_server, stop_server
from infra.replay.trajectory import FramePart, Steps, TrajectorySpec, Transition

GAMMA = 0.5
BATCH_SIZE = 8
# Of the row that shows a last observation; no transition may contain them.
IGNORED_ACTION, IGNORED_REWARD = -7, 1000.0

KINDS = {
    'vectors of float32': TrajectorySpec(FramePart((4,), 'float32'), 1),
    'vectors of float64, stacked': TrajectorySpec(FramePart((3,), 'float64'), 2),
    'vectors of int64, stacked': TrajectorySpec(FramePart((2,), 'int64'), 3),
    'one-hot vectors': TrajectorySpec(FramePart((5,)), 1),
    'images': TrajectorySpec(FramePart((3, 4, 2)), 1),
    'images, stacked': TrajectorySpec(FramePart((3, 4, 2)), 2),
    'grey frames, stacked': TrajectorySpec(FramePart((5, 6)), 4),
    'maps of int16, stacked': TrajectorySpec(FramePart((3, 4), 'int16'), 2),
    'dictionaries': TrajectorySpec(
        {'speed': FramePart((2,), 'float32'), 'picture': FramePart((3, 4, 2))}, 1
    ),
    'tuples, stacked': TrajectorySpec((FramePart((5, 6)), FramePart((3,), 'int64')), 4),
    'dictionaries in a tuple, stacked': TrajectorySpec(
        (
            {'map': FramePart((2, 3), 'int16'), 'arm': (FramePart((1,), 'float64'),)},
            {'eyes': [FramePart((4, 4)), FramePart((4, 4, 3))], 'day': FramePart((7,), 'int8')},
        ),
        2,
    ),
}


@dataclasses.dataclass(frozen=True)
class Episode:
    """T actions and what they earned; T + 1 frames, the last of which no action follows."""

    frames: Any  # [T + 1, ...], nested as the spec's
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool  # else truncated

    def __len__(self) -> int:
        return len(self.actions)

    def observation(self, t: int, spec: TrajectorySpec) -> Any:
        """What the agent sees at step t: the last frames, zeros before the episode's first."""
        times = range(t - spec.frame_stack + 1, t + 1)

        def seen(frames: np.ndarray) -> np.ndarray:
            last = [frames[i] if i >= 0 else np.zeros_like(frames[0]) for i in times]
            return np.stack(last, -1) if frames.ndim == 3 else np.concatenate(last, -1)

        return tree.map_structure(seen, self.frames)


@dataclasses.dataclass(frozen=True)
class Row:
    """One environment's part of what an actor adds at a step."""

    frame: Any
    action: int
    reward: float
    discount: float
    first: bool
    truncated: bool


def made_up(spec: TrajectorySpec, length: int, terminated: bool, seed: int) -> Episode:
    """An episode of random frames, large and negative numbers among them."""
    rng = np.random.default_rng(seed)

    def random(part: FramePart) -> np.ndarray:
        shape, kind = (length + 1, *part.shape), np.dtype(part.dtype)
        if kind.kind != 'f':
            limits = np.iinfo(kind)
            return rng.integers(limits.min, limits.max, shape, kind, endpoint=True)
        frames = rng.normal(scale=1e6, size=shape).astype(kind)
        frames[0] = np.inf  # which a product with zero would turn into NaN
        return frames

    frames = tree.map_structure(random, spec.frame)
    rewards = rng.integers(-4, 5, length) / 2
    return Episode(frames, rng.integers(0, 5, length), rewards, terminated)


def at(index: int, columns: Any) -> Any:
    """One row of a nest of columns."""
    return tree.map_structure(lambda column: column[index], columns)


def rows_of(episodes: Sequence[Episode], next_step: bool) -> list[Row]:
    """The rows of one environment: with next-step autoreset, one more for each last observation."""
    rows = []
    for episode in episodes:
        for t in range(len(episode)):
            ends = t == len(episode) - 1
            rows.append(
                Row(
                    at(t, episode.frames),
                    int(episode.actions[t]),
                    float(episode.rewards[t]),
                    discount=0.0 if ends and episode.terminated else 1.0,
                    first=t == 0,
                    truncated=ends and not episode.terminated and not next_step,
                )
            )
        if next_step:
            last = at(-1, episode.frames)
            rows.append(Row(last, IGNORED_ACTION, IGNORED_REWARD, 1.0, False, truncated=True))
    return rows


def expected(
    episodes: Sequence[Episode], next_step: bool, spec: TrajectorySpec, num_rows: int
) -> Iterator[tuple]:
    """Transitions of one environment whose window of rows is complete within `num_rows`."""
    n, row = spec.n_step, 0
    for episode in episodes:
        length = len(episode)
        for t in range(length):
            following = episode.rewards[t : t + n]  # rewards up to the episode's end
            reward = sum(GAMMA**k * following[k] for k in range(len(following)))
            ended = episode.terminated and t + n >= length
            # A last observation is known only where its environment shows it.
            known = t + n <= length if next_step else t + n < length
            if row + n < num_rows and (ended or known):
                now, action = episode.observation(t, spec), episode.actions[t]
                following_observation = None if ended else episode.observation(t + n, spec)
                discount = 0.0 if ended else GAMMA**n
                yield fingerprint(now, action, reward, discount, following_observation)
            row += 1
        row += next_step


def fingerprint(observation, action, reward, discount, next_observation) -> tuple:
    """A transition as what can be sorted. Behind an end the next observation does not matter."""
    following = b'' if discount == 0 else in_bytes(next_observation)
    return in_bytes(observation), int(action), float(reward), float(discount), following


def in_bytes(observation: Any) -> bytes:
    return b''.join(np.asarray(array).tobytes() for array in tree.flatten(observation))


@contextlib.contextmanager
def shard(spec: TrajectorySpec) -> Iterator[str]:
    """A replay server in this process; yields its address."""
    replay = ReplayConfig(replay_capacity=10_000, min_replay_size=1, agent_steps_per_update=0.0)
    server = start_server(build_tables(ShardConfig(replay, spec, BATCH_SIZE, telemetry=False), 0))
    try:
        yield f'localhost:{server.port}'
    finally:
        stop_server(server)


def store(address: str, spec: TrajectorySpec, streams: Sequence[Sequence[Row]]) -> int:
    """Adds the streams' rows side by side; the number of windows."""
    with Adder(address, spec, len(streams), timeout_seconds=10) as adder:
        for rows in zip(*streams):
            columns = {
                field.name: tree.map_structure(
                    lambda *values: np.array(values), *(getattr(row, field.name) for row in rows)
                )
                for field in dataclasses.fields(Row)
            }
            truncated = columns.pop('truncated')
            assert adder.add(Steps(**columns), truncated)
        assert adder.flush()
        return adder.items


def drawn(address: str, spec: TrajectorySpec, count: int) -> list[tuple]:
    """All `count` transitions of the shard, drawn until each was seen."""
    found: dict[int, tuple] = {}
    with sample_dataset([address], spec, BATCH_SIZE, GAMMA, timeout_seconds=20) as dataset:
        # The last of 100 is missed by 300 batches of 8 with probability 0.99^2400 < 1e-10.
        for _ in range(300):
            if len(found) == count:
                break
            sample = next(dataset)
            require_kind(sample.transition, spec)
            for i, key in enumerate(sample.key):
                found[int(key)] = fingerprint(*at(i, sample.transition))
    return list(found.values())


def require_kind(transition: Transition, spec: TrajectorySpec) -> None:
    """Nest, shapes and types of the observations are those of the frames, stacked."""
    for observation in (transition.observation, transition.next_observation):
        found = tree.map_structure(lambda array: (array.shape[1:], str(array.dtype)), observation)
        wanted = tree.map_structure(lambda part: (stacked(part, spec), part.dtype), spec.frame)
        assert found == wanted


def stacked(part: FramePart, spec: TrajectorySpec) -> tuple[int, ...]:
    shape = (*part.shape, 1) if len(part.shape) == 2 else part.shape
    return (*shape[:-1], shape[-1] * spec.frame_stack)


# Lengths, whether each terminates, and the seed of its numbers.
plans = strategies.lists(
    strategies.tuples(strategies.integers(1, 6), strategies.booleans(), strategies.integers(0, 99)),
    min_size=2,
    max_size=5,
)


@pytest.mark.parametrize('n_step', [1, 3])
@pytest.mark.parametrize('kind', KINDS)
def test_transitions_sampled_back_equal_a_plain_loop_over_the_episodes(kind, n_step):
    spec = dataclasses.replace(KINDS[kind], n_step=n_step)

    @hypothesis.settings(max_examples=12, deadline=None, database=None, derandomize=True)
    @hypothesis.given(strategies.tuples(plans, plans), strategies.booleans())
    def check(plans, next_step):
        reverb.Client(address).reset(EXPERIENCE_TABLE)
        games = [[made_up(spec, *episode) for episode in plan] for plan in plans]
        streams = [rows_of(episodes, next_step) for episodes in games]
        num_rows = min(map(len, streams))
        transitions = [t for game in games for t in expected(game, next_step, spec, num_rows)]
        assert store(address, spec, streams) == len(transitions)
        if transitions:
            assert sorted(drawn(address, spec, len(transitions))) == sorted(transitions)

    with shard(spec) as address:
        check()


@pytest.mark.parametrize(
    ('terminated', 'discount', 'sees'), [(True, 0.0, False), (False, 0.25, True)]
)
def test_the_last_row_of_next_step_autoreset_starts_nothing_and_is_bootstrapped_from(
    terminated, discount, sees
):
    # Three steps, then the row that shows the last observation, then two more episodes' rows.
    # n = 2: windows start at steps 0, 1, 2. That of step 1 ends at the last observation: it
    # bootstraps there if the episode was truncated, with gamma^2 = 1/4. That of step 2 reaches
    # over it: kept if the episode terminated, since it needs no bootstrap.
    spec = TrajectorySpec(FramePart((1,), 'float32'), 1, 2)
    game = Episode(np.array([[1], [2], [3], [4]], np.float32), np.arange(3), np.ones(3), terminated)
    second = Episode(np.array([[5], [6], [7]], np.float32), np.arange(2), np.zeros(2), False)
    with shard(spec) as address:
        count = store(address, spec, [rows_of([game, second], next_step=True)])
        found = {
            np.frombuffer(now, np.float32)[0]: rest for now, *rest in drawn(address, spec, count)
        }
    # Of the second episode: step 0 ends at its last observation; step 1 would reach over it.
    assert set(found) == ({1.0, 2.0, 3.0, 5.0} if terminated else {1.0, 2.0, 5.0})
    action, reward, actual, following = found[2.0]
    assert (action, reward, actual) == (1, 1.5, discount)
    assert bool(following) == sees
    if sees:
        assert np.frombuffer(following, np.float32)[0] == 4.0


VECTOR = FramePart((4,), 'float32')
PAIR = {'a': FramePart((2,), 'float32'), 'b': FramePart((2,), 'float32')}


@pytest.mark.parametrize(
    ('frame', 'other', 'name'),
    [
        (VECTOR, FramePart((4,), 'int32'), 'rows_float32_4_stack_1'),
        (VECTOR, FramePart((2, 2), 'float32'), 'rows_float32_4_stack_1'),
        (VECTOR, PAIR, 'rows_float32_4_stack_1'),
        (PAIR, tuple(PAIR.values()), 'rows_a_float32_2_b_float32_2_stack_1'),
        (PAIR, {**PAIR, 'b': FramePart((2,), 'int32')}, 'rows_a_float32_2_b_float32_2_stack_1'),
    ],
)
def test_frames_of_equal_size_but_another_type_shape_or_nest_are_refused_by_writer_and_reader(
    frame, other, name
):
    spec, wrong = (TrajectorySpec(each, 1, 1) for each in (frame, other))
    assert (wrong.window, wrong.row_bytes) == (spec.window, spec.row_bytes)
    (row,) = rows_of([made_up(wrong, 1, True, seed=0)], next_step=False)
    with shard(spec) as address:
        with pytest.raises(ReplaySpecMismatch, match=f'stores {name}'):
            store(address, wrong, [[row]])
        with sample_dataset([address], wrong, BATCH_SIZE, GAMMA, timeout_seconds=20) as dataset:
            with pytest.raises(ReplaySpecMismatch, match=f'stores {name}'):
                next(dataset)
