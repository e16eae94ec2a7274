"""Episodes of any kind of frame, stored and sampled back, equal a plain loop over them.

The loop knows episodes only: neither rows nor windows. Rewards are multiples of 1/2 and gamma is
1/2, so that every n-step sum is exact in float32.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import hypothesis
import numpy as np
import pytest
import reverb
from hypothesis import strategies

from infra.replay.adder import Adder
from infra.replay.config import EXPERIENCE_TABLE, ReplayConfig
from infra.replay.dataset import sample_dataset
from infra.replay.errors import ReplaySpecMismatch
from infra.replay.server import ShardConfig, build_tables, start_server, stop_server
from infra.replay.trajectory import Steps, TrajectorySpec

GAMMA = 0.5
BATCH_SIZE = 8
# Of the row that shows a last observation; no transition may contain them.
IGNORED_ACTION, IGNORED_REWARD = -7, 1000.0

KINDS = {
    'vectors of float32': TrajectorySpec((4,), 1, frame_dtype='float32'),
    'vectors of float64, stacked': TrajectorySpec((3,), 2, frame_dtype='float64'),
    'vectors of int64, stacked': TrajectorySpec((2,), 3, frame_dtype='int64'),
    'one-hot vectors': TrajectorySpec((5,), 1, frame_dtype='uint8'),
    'images': TrajectorySpec((3, 4, 2), 1, frame_dtype='uint8'),
    'images, stacked': TrajectorySpec((3, 4, 2), 2, frame_dtype='uint8'),
    'grey frames, stacked': TrajectorySpec((5, 6), 4, frame_dtype='uint8'),
    'maps of int16, stacked': TrajectorySpec((3, 4), 2, frame_dtype='int16'),
}


@dataclasses.dataclass(frozen=True)
class Episode:
    """T actions and what they earned; T + 1 frames, the last of which no action follows."""

    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool  # else truncated

    def __len__(self) -> int:
        return len(self.actions)

    def observation(self, t: int, spec: TrajectorySpec) -> np.ndarray:
        """What the agent sees at step t: the last frames, zeros before the episode's first."""
        zeros = np.zeros_like(self.frames[0])
        times = range(t - spec.frame_stack + 1, t + 1)
        seen = [self.frames[i] if i >= 0 else zeros for i in times]
        return np.stack(seen, -1) if zeros.ndim == 2 else np.concatenate(seen, -1)


@dataclasses.dataclass(frozen=True)
class Row:
    """One environment's part of what an actor adds at a step."""

    frame: np.ndarray
    action: int
    reward: float
    discount: float
    first: bool
    truncated: bool


def made_up(spec: TrajectorySpec, length: int, terminated: bool, seed: int) -> Episode:
    """An episode of random frames, large and negative numbers among them."""
    rng = np.random.default_rng(seed)
    shape, kind = (length + 1, *spec.frame_shape), np.dtype(spec.frame_dtype)
    if kind.kind == 'f':
        frames = rng.normal(scale=1e6, size=shape).astype(kind)
        frames[0] = np.inf  # which a product with zero would turn into NaN
    else:
        limits = np.iinfo(kind)
        frames = rng.integers(limits.min, limits.max, shape, kind, endpoint=True)
    rewards = rng.integers(-4, 5, length) / 2
    return Episode(frames, rng.integers(0, 5, length), rewards, terminated)


def rows_of(episodes: Sequence[Episode], next_step: bool) -> list[Row]:
    """The rows of one environment: with next-step autoreset, one more for each last observation."""
    rows = []
    for episode in episodes:
        for t in range(len(episode)):
            ends = t == len(episode) - 1
            rows.append(
                Row(
                    episode.frames[t],
                    int(episode.actions[t]),
                    float(episode.rewards[t]),
                    discount=0.0 if ends and episode.terminated else 1.0,
                    first=t == 0,
                    truncated=ends and not episode.terminated and not next_step,
                )
            )
        if next_step:
            last = episode.frames[-1]
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
    following = b'' if discount == 0 else np.asarray(next_observation).tobytes()
    return np.asarray(observation).tobytes(), int(action), float(reward), float(discount), following


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
                field.name: np.array([getattr(row, field.name) for row in rows])
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
            columns = [np.asarray(column) for column in sample.transition]
            assert columns[0].dtype == columns[-1].dtype == spec.frame_dtype
            assert columns[0].shape[1:] == columns[-1].shape[1:] == spec.observation_shape
            for i, key in enumerate(sample.key):
                found[int(key)] = fingerprint(*(column[i] for column in columns))
    return list(found.values())


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
    spec = TrajectorySpec((1,), 1, 2, 'float32')
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


@pytest.mark.parametrize(
    'other', [TrajectorySpec((4,), 1, 1, 'int32'), TrajectorySpec((2, 2), 1, 1, 'float32')]
)
def test_frames_of_equal_size_but_another_type_or_shape_are_refused_by_writer_and_reader(other):
    spec = TrajectorySpec((4,), 1, 1, 'float32')
    assert (other.window, other.row_bytes) == (spec.window, spec.row_bytes)
    (row,) = rows_of([made_up(other, 1, True, seed=0)], next_step=False)
    with shard(spec) as address:
        with pytest.raises(ReplaySpecMismatch, match='stores rows_float32_4_stack_1'):
            store(address, other, [[row]])
        with sample_dataset([address], other, BATCH_SIZE, GAMMA, timeout_seconds=20) as dataset:
            with pytest.raises(ReplaySpecMismatch, match='stores rows_float32_4_stack_1'):
                next(dataset)
