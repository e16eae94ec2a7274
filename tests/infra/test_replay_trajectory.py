"""What is stored, sampled back, equals the transitions of a plain loop over the episodes."""

import dataclasses
import json

import numpy as np
import pytest

from infra.replay import server as server_lib
from infra.replay.adder import Adder
from infra.replay.config import ReplayConfig
from infra.replay.dataset import sample_dataset
from infra.replay.trajectory import (
    FramePart,
    Steps,
    TrajectorySpec,
    compiled_to_transition,
    n_step_return,
    pack_rows,
    to_transition,
)

GAMMA = 0.9
COLUMNS = ('frame', 'action', 'reward', 'discount', 'first', 'truncated')


def random_stream(steps, environments, shape, seed, end=0.15, cut=0.1):
    """Columns [steps, environments, ...] of a made-up game: ends, lives, truncations."""
    rng = np.random.default_rng(seed)
    size = (steps, environments)
    ended = rng.random(size) < end
    truncated = (rng.random(size) < cut) & ~ended
    life = ended & (rng.random(size) < 0.5)  # the game goes on: no new first frame
    first = np.ones(size, bool)
    first[1:] = (ended & ~life | truncated)[:-1]
    return {
        'frame': rng.integers(0, 256, (*size, *shape), dtype=np.uint8),
        'action': rng.integers(0, 18, size).astype(np.int32),
        'reward': rng.integers(-1, 2, size).astype(np.float32),
        'discount': 1.0 - ended.astype(np.float32),
        'first': first,
        'truncated': truncated,
    }


def game_stream(game, steps, environments):
    """The same columns of a real game, played at random; a lost life ends an episode."""
    from ale_py.vector_env import AtariVectorEnv

    environment = AtariVectorEnv(
        game,
        environments,
        num_threads=1,
        stack_num=1,
        autoreset_mode='SameStep',
        max_num_frames_per_episode=600,  # so that truncations happen
    )
    observation, info = environment.reset(seed=1)
    rng = np.random.default_rng(1)
    lives = np.array(info['lives'])
    first = np.ones(environments, bool)
    columns: dict[str, list] = {name: [] for name in COLUMNS}
    for _ in range(steps):
        action = rng.integers(0, 4, environments).astype(np.int32)
        frame = observation[:, 0].copy()
        observation, reward, terminated, truncated, info = environment.step(action)
        lost = (np.array(info['lives']) < lives) & ~truncated
        lives = np.array(info['lives'])
        ended = np.asarray(terminated) | lost
        cut = np.asarray(truncated) & ~ended
        for name, value in zip(
            COLUMNS, (frame, action, reward, 1.0 - ended, first, cut), strict=True
        ):
            columns[name].append(np.array(value))
        first = np.asarray(terminated | truncated)
    return {name: np.array(values) for name, values in columns.items()}


def seen_at(stream, e, t, spec):
    """What the agent sees at step t: the frames back to the episode's first, zeros before."""
    observation = np.zeros((*spec.frame.shape, spec.frame_stack), np.uint8)
    for age in range(spec.frame_stack):
        if t - age < 0:
            break
        observation[..., spec.frame_stack - 1 - age] = stream['frame'][t - age, e]
        if stream['first'][t - age, e]:
            break
    return observation


def loop_transitions(stream, e, spec, gamma):
    """The transitions of one environment, computed one step after another."""
    transitions = []
    for t in range(len(stream['frame']) - spec.n_step):
        reward, discount, cut = 0.0, 1.0, False
        for k in range(spec.n_step):
            cut = cut or (discount > 0 and bool(stream['truncated'][t + k, e]))
            reward += discount * float(stream['reward'][t + k, e])
            discount *= gamma * float(stream['discount'][t + k, e])
        if cut:
            continue
        now, later = seen_at(stream, e, t, spec), seen_at(stream, e, t + spec.n_step, spec)
        transitions.append((now, int(stream['action'][t, e]), reward, discount, later))
    return transitions


def fingerprint(observation, action, reward, discount, next_observation):
    """A transition as something that can be compared and sorted; floats to 1e-6."""
    return (
        np.asarray(observation).tobytes(),
        int(action),
        round(float(reward), 6),
        round(float(discount), 6),
        np.asarray(next_observation).tobytes(),
    )


def stored_transitions(stream, spec, batch_size=7):
    """Sends the stream to a server and samples until every item has been seen, by key."""
    steps, environments = stream['action'].shape
    config = ReplayConfig(replay_capacity=100_000, min_replay_size=1, agent_steps_per_update=0.0)
    shard = server_lib.ShardConfig(config, spec, batch_size)
    server = server_lib.start_server(server_lib.build_tables(shard, 0))
    address = f'localhost:{server.port}'
    found = {}
    try:
        with Adder(address, spec, environments, timeout_seconds=10) as adder:
            for t in range(steps):
                steps = Steps(*(stream[name][t] for name in Steps._fields))
                assert adder.add(steps, stream['truncated'][t])
            assert adder.flush()
            count = adder.items
        with sample_dataset([address], spec, batch_size, GAMMA, timeout_seconds=20) as dataset:
            for _ in range(200 * count // batch_size):
                sample = next(dataset)
                columns = [np.asarray(column) for column in sample.transition]
                for i, key in enumerate(sample.key):
                    found[int(key)] = fingerprint(*(column[i] for column in columns))
                if len(found) == count:
                    break
        assert len(found) == count
    finally:
        server.stop()
    return sorted(found.values())


def expected_transitions(stream, spec):
    return sorted(
        fingerprint(*transition)
        for e in range(stream['action'].shape[1])
        for transition in loop_transitions(stream, e, spec, GAMMA)
    )


@pytest.mark.parametrize('n_step', [1, 3])
@pytest.mark.parametrize('seed', [0, 1])
def test_random_streams_come_back_as_the_loop_computes_them(n_step, seed):
    spec = TrajectorySpec(FramePart((5, 6)), n_step=n_step)
    stream = random_stream(60, 3, spec.frame.shape, seed)
    assert stored_transitions(stream, spec) == expected_transitions(stream, spec)


def test_more_environments_than_one_writer_takes_come_back_too():
    spec = TrajectorySpec(FramePart((5, 6)), n_step=2)
    stream = random_stream(25, 11, spec.frame.shape, seed=2)
    assert stored_transitions(stream, spec) == expected_transitions(stream, spec)


@pytest.mark.parametrize('n_step', [1, 3])
def test_a_real_game_comes_back_as_the_loop_computes_it(n_step):
    spec = TrajectorySpec(n_step=n_step)
    stream = game_stream('breakout', 160, 2)
    # The stream must contain what it is there for.
    assert (stream['discount'] == 0).any()
    assert stream['truncated'].any()
    assert stream['first'][1:].any()
    assert stored_transitions(stream, spec) == expected_transitions(stream, spec)


@pytest.mark.parametrize('frame_stack', [1, 2, 3, 4, 8])
def test_every_depth_of_stack_is_right(frame_stack):
    spec = TrajectorySpec(FramePart((3, 4)), frame_stack=frame_stack, n_step=2)
    stream = random_stream(40, 1, spec.frame.shape, seed=frame_stack, cut=0.0)
    rows = np.concatenate(
        [pack_rows(Steps(*(stream[name][t] for name in COLUMNS[:5])), spec) for t in range(40)]
    )
    starts = range(40 - spec.window + 1)
    windows = np.stack([rows[start : start + spec.window] for start in starts])
    result = to_transition(windows, spec, GAMMA)
    loop = loop_transitions(stream, 0, spec, GAMMA)[frame_stack - 1 :]
    assert len(loop) == len(windows)
    for i, transition in enumerate(loop):
        assert fingerprint(*(column[i] for column in result)) == fingerprint(*transition)


def test_the_compiled_function_equals_the_plain_one():
    spec = TrajectorySpec(FramePart((3, 4)), n_step=3)
    stream = random_stream(spec.window, 16, spec.frame.shape, seed=5, cut=0.0)
    rows = [
        pack_rows(Steps(*(stream[name][t] for name in COLUMNS[:5])), spec)
        for t in range(spec.window)
    ]
    windows = np.stack(rows, axis=1)
    plain = to_transition(windows, spec, GAMMA)
    compiled = compiled_to_transition(spec, GAMMA)(windows)
    for one, other in zip(plain, compiled, strict=True):
        np.testing.assert_array_equal(one, other)


def test_n_step_return_stops_at_an_end():
    # r = 1 + 0.5 * 2, nothing of the 4 behind the end; no bootstrap. And without an end:
    # r = 1 + 0.5 * 2 + 0.25 * 4 = 3, discount 0.5^3 = 0.125.
    reward = np.array([[1, 2, 4], [1, 2, 4]], np.float32)
    discount = np.array([[1, 0, 1], [1, 1, 1]], np.float32)
    total, left = n_step_return(reward, discount, 0.5)
    np.testing.assert_allclose(total, [2.0, 3.0])
    np.testing.assert_allclose(left, [0.0, 0.125])


def test_frames_of_another_shape_are_refused():
    spec = TrajectorySpec()
    one = np.zeros(1)
    with pytest.raises(ValueError, match=r'uint8\[84, 84\]'):
        pack_rows(Steps(np.zeros((1, 80, 80), np.uint8), one, one, one, one), spec)


@pytest.mark.parametrize(
    ('kind', 'field', 'value'),
    [
        (FramePart, 'shape', (84, 0)),
        (FramePart, 'shape', ()),
        (FramePart, 'dtype', 'bool'),
        (TrajectorySpec, 'frame', {}),
        (TrajectorySpec, 'frame_stack', 0),
        (TrajectorySpec, 'n_step', 0),
    ],
)
def test_a_bad_spec_is_refused_by_name(kind, field, value):
    with pytest.raises(ValueError, match=field):
        kind(**{field: value})


NESTED = TrajectorySpec({'dtype': (FramePart((2,), 'int8'),), 'shape': FramePart()}, 1, 2)


@pytest.mark.parametrize('spec', [TrajectorySpec(), NESTED])
def test_a_spec_of_a_file_gives_the_same_rows(spec):
    read = TrajectorySpec.from_dict(json.loads(json.dumps(dataclasses.asdict(spec))))
    assert read.parts == spec.parts
    assert (read.window, read.rows_name) == (spec.window, spec.rows_name)


@pytest.mark.parametrize(
    ('written', 'frame'),
    [({}, FramePart((84, 84), 'uint8')), ({'frame_dtype': 'int16'}, FramePart((84, 84), 'int16'))],
)
def test_a_spec_that_earlier_versions_wrote_is_read(written, frame):
    written = {'frame_shape': [84, 84], 'frame_stack': 4, 'n_step': 3, **written}
    assert TrajectorySpec.from_dict(written) == TrajectorySpec(frame, 4, 3)


def test_rows_of_atari_are_those_of_earlier_versions():
    # 84 * 84 bytes of the frame, then action, reward, discount and first, four bytes each.
    frame = np.arange(84 * 84, dtype=np.uint8).reshape(1, 84, 84)
    one = np.ones(1)
    rows = pack_rows(Steps(frame, np.array([258]), one, one, one > 0), TrajectorySpec())
    assert TrajectorySpec().rows_name == 'rows'
    scalars = np.concatenate([np.array([258], '<i4').view('u1'), np.ones(2, '<f4').view('u1')])
    expected = [*frame.ravel(), *scalars, 1, 0, 0, 0]
    assert rows.tolist() == [[int(byte) for byte in expected]]
