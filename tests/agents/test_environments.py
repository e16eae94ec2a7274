"""Environments beside Atari: gymnasium's, TF-Agents' and a user's own, sound and broken."""

import functools
import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
import time
import warnings
from importlib import metadata

import gymnasium
import numpy as np
import pytest
import tree
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv
from tf_agents.specs import array_spec

from agents.config import EnvironmentConfig
from agents.environments import factory
from agents.environments.atari import emulator_seeds
from agents.environments.errors import EnvironmentFailedError
from agents.environments.factory import check_name, open_environment
from agents.environments.frames import FrameSpec, FrameStack
from agents.environments.tf_agents import TfAgentsEnvironment
from agents.environments.vector import VectorEnvironment
from agents.games import GameError
from tests.support import environments, tf_environments
from tests.support.environments import LENGTH
from tests.support.waiting import eventually, has_ended

OWN = 'tests.support.environments'
OF_TF = 'tests.support.tf_environments'
ROOT = pathlib.Path(__file__).resolve().parents[2]


def opened(name, count=2, **settings):
    return open_environment(EnvironmentConfig(game=check_name(name), **settings), count, seed=1)


def played(name, steps, count=2, **settings):
    """The results of `steps` steps, the reset's first."""
    with opened(name, count, **settings) as environment:
        actions = np.arange(count, dtype=np.int32) % environment.num_actions
        results = [environment.reset()]
        results += [environment.step_frames(actions) for _ in range(steps)]
    return results


def refusal(name, steps, **settings):
    """The error's message of an environment that fails within `steps` steps."""
    with pytest.raises(EnvironmentFailedError) as failure:
        played(name, steps, **settings)
    return str(failure.value)


@pytest.mark.parametrize('name', ['counter', 'next_step', 'py_counter'])
def test_an_episodes_last_observation_is_a_frame_of_its_own_and_the_next_step_begins_another(name):
    results = played(f'{OWN}:{name}', 2 * LENGTH + 2)
    # Step t of an episode shows t; the step after its last shows 0 of the next.
    shown = [result.frame[0, 1:].tolist() for result in results]
    expected = [[episode, step] for episode in range(2) for step in range(LENGTH + 1)]
    assert shown == [*expected, [2, 0]]
    rewards = [result.reward[0] for result in results]
    assert rewards == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0]
    flags = {
        field: [step for step, result in enumerate(results) if getattr(result, field)[0]]
        for field in ('terminated', 'truncated', 'last', 'first', 'life_lost')
    }
    assert flags == {
        'terminated': [5],
        'truncated': [11],
        'last': [5, 11],
        'first': [0, 6, 12],
        'life_lost': [],
    }


@pytest.mark.parametrize('name', ['same_step', 'disabled'])
def test_where_the_last_observation_is_not_shown_the_next_episode_begins_within_the_step(name):
    results = played(f'{OWN}:{name}', 2 * LENGTH)
    shown = [result.frame[0, 1:].tolist() for result in results]
    assert shown == [[e, step] for e in range(2) for step in range(LENGTH)] + [[2, 0]]
    for field, steps in (('terminated', [5]), ('truncated', [10]), ('first', [0, 5, 10])):
        assert [i for i, each in enumerate(results) if getattr(each, field)[0]] == steps
    assert not any(result.last.any() for result in results)


def plain_loop(game, seed, actions, next_step):
    """What one environment shows: (frame, reward, terminated, truncated, first, last) of a step."""
    env = gymnasium.make(game, max_episode_steps=12)
    flat = functools.partial(spaces.flatten, env.observation_space)
    shown, _ = env.reset(seed=seed)
    rows, over = [(flat(shown), 0.0, False, False, True, False)], False
    for action in actions:
        if over and next_step:
            shown, _ = env.reset()
            rows.append((flat(shown), 0.0, False, False, True, False))
            over = False
            continue
        shown, reward, terminated, truncated, _ = env.step(int(action))
        over = terminated or truncated
        if over and not next_step:
            shown, _ = env.reset()
        flags = (over and not next_step, over and next_step)
        rows.append((flat(shown), reward, terminated, truncated, *flags))
    return rows


@pytest.mark.parametrize('game', ['lake', 'cart'])
@pytest.mark.parametrize('mode', ['next_step', 'same_step', 'disabled'])
def test_each_way_to_begin_the_next_episode_equals_a_plain_loop(game, mode):
    actions = np.random.default_rng(0).integers(2, size=(100, 2)).astype(np.int32)
    with opened(f'{OWN}:{game}_{mode}') as environment:
        results = [environment.reset(), *map(environment.step_frames, actions)]
    first_seed = int(emulator_seeds(1, 2)[0])  # gymnasium seeds the second with the next number
    ends = {'terminated': 0, 'truncated': 0}
    for number in range(2):
        name = {'lake': 'FrozenLake-v1', 'cart': 'CartPole-v1'}[game]
        rows = plain_loop(name, first_seed + number, actions[:, number], mode == 'next_step')
        fields = ('frame', 'reward', 'terminated', 'truncated', 'first', 'last')
        for field, values in zip(fields, zip(*rows)):
            found = [getattr(result, field)[number] for result in results]
            np.testing.assert_array_equal(found, np.array(values), field)
        for end in ends:
            ends[end] += sum(getattr(result, end)[number] for result in results)
    assert ends['terminated']
    assert ends['truncated']


@pytest.mark.parametrize(
    'name', [f'{OWN}:counter', f'{OWN}:py_counter', 'CartPole-v1', f'{OWN}:cart_poles']
)
def test_each_environment_has_a_seed_of_its_own_the_same_each_time(name):
    first, again = (played(name, 1, count=4)[0].frame for _ in range(2))
    assert len(np.unique(first, axis=0)) == 4
    np.testing.assert_array_equal(first, again)
    with open_environment(EnvironmentConfig(game=name), 4, seed=2) as other:
        assert not np.isin(other.reset().frame[:, 0], first[:, 0]).any()


def test_environments_step_in_processes_of_their_own_as_in_this_one():
    inside, outside = (
        played(f'{OWN}:counter', LENGTH + 1, env_processes=own) for own in (False, True)
    )
    for one, other in zip(inside, outside):
        np.testing.assert_array_equal(one.frame, other.frame)
        np.testing.assert_array_equal(one.last, other.last)


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """Process IDs that the tests' environments write down."""
    path = tmp_path / 'notes'
    monkeypatch.setenv('NOTES_OF_ENVIRONMENTS', str(path))
    return lambda: [int(line) for line in path.read_text().split()] if path.exists() else []


def test_a_process_that_hangs_does_not_keep_its_environments_from_closing(notes):
    environment = opened(f'{OWN}:hanging', env_processes=True)
    environment.reset()
    environment.step_frames(np.zeros(2, np.int32))
    message = []

    def step():
        with pytest.raises(EnvironmentFailedError) as failure:
            environment.step_frames(np.zeros(2, np.int32))
        message.append(str(failure.value))

    thread = threading.Thread(target=step)
    thread.start()
    assert eventually(lambda: len(notes()) == 2)
    before = time.monotonic()
    environment.close()
    assert time.monotonic() - before < 10  # it waits for three seconds
    thread.join(10)
    (text,) = message
    assert text.startswith(f'{OWN}:hanging, step 2: step did not end before close() (')
    assert text.endswith('). Fix: call close() after the last step().')
    assert all(map(has_ended, notes()))


def test_a_step_after_close_is_not_blamed_on_the_environment():
    environment = opened('CartPole-v1', env_processes=True)
    environment.reset()
    environment.close()
    with pytest.raises(EnvironmentFailedError) as failure:
        environment.step_frames(np.zeros(2, np.int32))
    assert 'CartPole-v1, step 1: step did not end before close() (raised' in str(failure.value)


def test_a_process_closes_its_environment_before_it_ends(notes):
    with opened(f'{OWN}:closing', env_processes=True) as environment:
        environment.reset()
    environment.close()  # again
    assert len(set(notes()) - {os.getpid()}) == 2
    assert all(map(has_ended, set(notes()) - {os.getpid()}))


def test_a_process_that_hangs_ends_with_its_parent(notes):
    code = f"""
import numpy as np
from agents.config import EnvironmentConfig
from agents.environments.factory import open_environment
config = EnvironmentConfig(game='{OWN}:hanging', env_processes=True)
environment = open_environment(config, 1, 0)
environment.reset()
for _ in range(2):
    environment.step_frames(np.zeros(1, np.int32))
"""
    parent = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT)
    try:
        assert eventually(lambda: bool(notes()), 60)
    finally:
        parent.kill()
        parent.wait()
    (pid,) = notes()
    assert eventually(lambda: has_ended(pid), 15)


def test_a_daemon_of_multiprocessing_as_dasks_workers_are_has_processes_for_its_environments():
    # "daemonic processes are not allowed to have children", says Python.
    spawn = multiprocessing.get_context('spawn')
    daemon = spawn.Process(
        target=environments.step_in_processes, args=('CartPole-v1',), daemon=True
    )
    daemon.start()
    daemon.join(60)
    assert daemon.exitcode == 0


def test_a_process_that_dies_is_one_line():
    text = refusal(f'{OWN}:second_exits', 3, env_processes=True)
    assert text.startswith(f'{OWN}:second_exits, environment 1, step 2: step lost its process (see')


def test_a_script_that_its_own_processes_cannot_import_is_asked_to_guard_its_main_part(tmp_path):
    # Each process imports the script, which opens the environments again.
    script = tmp_path / 'script.py'
    script.write_text(
        'from agents.config import EnvironmentConfig\n'
        'from agents.environments.factory import open_environment\n'
        f'config = EnvironmentConfig(game="{OWN}:counter", env_processes=True)\n'
        'open_environment(config, 1, seed=0).close()\n'
    )
    ended = subprocess.run(
        [sys.executable, script],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    lines = [line for line in ended.stderr.splitlines() if 'EnvironmentFailedError: ' in line]
    assert len(lines) == 2, ended.stderr  # of the process, and of the script
    for line in lines:
        assert line.endswith("a script opens it below if __name__ == '__main__'.")


@pytest.mark.parametrize('name', ['next_step', 'py_counter'])
def test_what_steps_its_environments_itself_takes_no_processes(name):
    text = refusal(f'{OWN}:{name}', 1, env_processes=True)
    assert f'{OWN}:{name}: --env_processes has no effect on a ' in text
    assert text.endswith('Fix: omit it, or return a gymnasium.Env.')


def test_an_error_in_a_process_is_the_same_line_as_in_this_one():
    message = set()
    for own in (False, True):
        message.add(refusal(f'{OWN}:broken_nan', 3, count=1, env_processes=own))
    (line,) = message
    assert line.startswith(f'{OWN}:broken_nan, environment 0, step 2: observation float64[3]')


def test_opening_environments_needs_no_tensorflow():
    code = f"""
import sys
from agents.config import EnvironmentConfig
from agents.environments.factory import check_name, open_environment
for name in ('CartPole-v1', '{OWN}:counter', '{OWN}:structured_disabled', 'pong'):
    open_environment(EnvironmentConfig(game=check_name(name)), 1, 0).close()
assert 'tensorflow' not in sys.modules
"""
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, timeout=60)


STRUCTURED = {
    'picture': FrameSpec((10, 10, 1), 'uint8', 0, 255),
    'phase': FrameSpec((6,), 'uint8', 0, 1),  # one-hot of 0 to 5
    'pair': (FrameSpec((2,), 'float32', -1, 1), FrameSpec((2,), 'int8', 0, 1)),
    'counter': FrameSpec((3,), 'float64', 0, 2**31),
}


@pytest.mark.parametrize('name', ['structured', 'structured_next_step', 'structured_disabled'])
def test_a_structure_stays_one_of_arrays_of_their_own_types(name):
    with opened(f'{OWN}:{name}') as environment:
        assert environment.frame_spec == STRUCTURED
        environment.reset()
        for _ in range(2):
            frame = environment.step_frames(np.zeros(2, np.int32)).frame
    assert tree.map_structure(lambda array: str(array.dtype), frame) == tree.map_structure(
        lambda part: part.dtype, STRUCTURED
    )
    np.testing.assert_array_equal(frame['picture'], np.full((2, 10, 10, 1), 2))
    assert frame['phase'].tolist() == [[0, 0, 1, 0, 0, 0]] * 2
    assert [part.tolist() for part in frame['pair']] == [[[0.5, -0.5]] * 2, [[1, 0]] * 2]
    assert frame['counter'][:, 1:].tolist() == [[0, 2]] * 2


@pytest.mark.parametrize(('name', 'per_step'), [('counter', 2), ('next_step', 1)])
def test_an_observation_is_checked_once(name, per_step, monkeypatch):
    # Two environments, each checked alone; or a vector environment of two, as a whole.
    contains, checks = spaces.Box.contains, []

    def counted(*args):
        checks.append(args)
        return contains(*args)

    monkeypatch.setattr(spaces.Box, 'contains', counted)
    with opened(f'{OWN}:{name}') as environment:
        environment.reset()
        assert len(checks) == per_step
        for step in range(2, 5):
            environment.step_frames(np.zeros(2, np.int32))
            assert len(checks) == per_step * step


@pytest.mark.parametrize(
    ('space', 'sample', 'expected', 'spec'),
    [
        (spaces.Discrete(3, start=-1), -1, [1, 0, 0], FrameSpec((3,), 'uint8', 0, 1)),
        (spaces.Discrete(3), np.int64(2), [0, 0, 1], FrameSpec((3,), 'uint8', 0, 1)),
        (
            spaces.MultiDiscrete([2, 3], start=[0, 5]),
            np.array([1, 5]),
            [0, 1, 1, 0, 0],
            FrameSpec((5,), 'uint8', 0, 1),
        ),
        (
            spaces.MultiDiscrete([[2, 3], [1, 2]]),
            np.array([[1, 2], [0, 0]]),
            [0, 1, 0, 0, 1, 1, 1, 0],
            FrameSpec((8,), 'uint8', 0, 1),
        ),
        (
            spaces.MultiBinary((2, 2)),
            np.array([[1, 0], [1, 1]], np.int8),
            [[1, 0], [1, 1]],
            FrameSpec((2, 2), 'int8', 0, 1),
        ),
        (
            spaces.Box(-4, 4, (), np.float32),
            np.array(1.5, np.float32),
            [1.5],
            FrameSpec((1,), 'float32', -4, 4),
        ),
        (
            spaces.Box(0, 1, (2, 2, 1), bool),
            np.array([[[1], [0]], [[0], [1]]], bool),
            [[[1], [0]], [[0], [1]]],
            FrameSpec((2, 2, 1), 'uint8', 0, 1),
        ),
        (
            spaces.Box(np.array([0, -5]), np.array([9, 5]), dtype=np.int16),
            np.array([9, -5], np.int16),
            [9, -5],
            FrameSpec((2,), 'int16'),
        ),
        (
            spaces.Box(0, 65_535, (2, 3), np.uint16),
            np.full((2, 3), 65_535, np.uint16),
            np.full((2, 3), 65_535),
            FrameSpec((2, 3), 'uint16', 0, 65_535),
        ),
    ],
)
def test_each_kind_of_observation_is_an_array_that_keeps_what_it_shows(
    space, sample, expected, spec
):
    makers = [functools.partial(environments.Showing, space, sample)] * 2
    with VectorEnvironment('own', SyncVectorEnv(makers), 0) as environment:
        frames = environment.reset().frame
    assert environment.frame_spec == spec
    assert frames.dtype == spec.dtype
    np.testing.assert_array_equal(frames, [expected, expected])


@pytest.mark.parametrize(
    ('name', 'spec', 'actions'),
    [
        ('CartPole-v1', FrameSpec((4,), 'float32'), 2),
        ('Acrobot-v1', FrameSpec((6,), 'float32'), 3),
        ('MountainCar-v0', FrameSpec((2,), 'float32'), 3),
        ('FrozenLake-v1', FrameSpec((16,), 'uint8', 0, 1), 4),  # one-hot of 16 fields
        ('Taxi-v4', FrameSpec((500,), 'uint8', 0, 1), 6),
        (
            'Blackjack-v1',  # 32 sums, 11 cards, an ace or not
            tuple(FrameSpec((count,), 'uint8', 0, 1) for count in (32, 11, 2)),
            2,
        ),
        ('LunarLander-v3', FrameSpec((8,), 'float32'), 4),
        ('MinAtar/Breakout-v1', FrameSpec((10, 10, 4), 'uint8', 0, 1), 3),
        ('MinAtar/SpaceInvaders-v1', FrameSpec((10, 10, 6), 'uint8', 0, 1), 4),
        (f'{OWN}:ram', FrameSpec((128,), 'uint8', 0, 255), 6),
        (f'{OWN}:cart_poles', FrameSpec((4,), 'float32'), 2),
        (f'{OWN}:structured', STRUCTURED, 2),
        (
            f'{OF_TF}:library',
            {
                'picture': FrameSpec((2, 2, 1), 'uint8', 0, 255),
                'speed': FrameSpec((1,), 'float32', -1, 1),
            },
            4,
        ),
    ],
)
def test_environments_of_gymnasium_box2d_minatar_ale_and_tf_agents_run_as_their_spaces_say(
    name, spec, actions
):
    with opened(name, count=4) as environment:
        assert environment.num_actions == actions
        assert environment.frame_spec == spec
        rng = np.random.default_rng(0)
        result = environment.reset()
        ends = firsts = 0
        for _ in range(500):  # of four environments each
            before = result.last
            result = environment.step_frames(rng.integers(actions, size=4).astype(np.int32))
            np.testing.assert_array_equal(result.first, before)
            np.testing.assert_array_equal(result.last, result.terminated | result.truncated)
            tree.assert_same_structure(result.frame, spec)
            for array, part in zip(tree.flatten(result.frame), tree.flatten(spec)):
                assert (array.shape, array.dtype) == ((4, *part.shape), part.dtype)
            ends, firsts = ends + result.last.sum(), firsts + result.first.sum()
        assert ends >= firsts
        assert firsts or name in ('Acrobot-v1', f'{OWN}:ram')  # their episodes are longer


@pytest.mark.parametrize(
    'name',
    [
        'CartPole-v1',
        'Acrobot-v1',
        'MountainCar-v0',
        'FrozenLake-v1',
        'LunarLander-v3',
        'ALE/Pong-v5',
    ],
)
def test_an_environment_that_gymnasium_finds_clean_is_clean_when_checked_here(name):
    env = gymnasium.make(name).unwrapped
    env.spec = None  # else it is made anew, without the check
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        check_env(factory.Checked(env, name, 0), skip_render_check=True)


@pytest.mark.parametrize(
    ('how', 'message'),
    [
        ('nan', 'step 2: observation float64[3] [0.0, nan, 2.0] is not in its space Box('),
        ('outside', 'step 2: observation float64[3] [0.0, -1.0, 2.0] is not in its space'),
        ('infinite', 'step 2: observation float64[3] [0.0, inf, 2.0] is not finite'),
        ('shape', 'step 2: observation float64[2] [0.0, 0.0] is not in its space'),
        ('dtype', 'step 0: observation float64[3] [0.0, 0.0, 0.0] is not in its space'),
        ('reward', 'step 2: reward inf. Fix: return a finite number.'),
        ('none', 'step 2: reward None. Fix: return a number.'),
        ('step', 'step 2: raised RuntimeError: lost. Fix: correct its step().'),
        ('old', 'step 2: raised ValueError: not enough values to unpack (expected 5, got 4)'),
        ('reset', 'step 0: reset raised RuntimeError: no level. Fix: correct its reset().'),
        ('continuous', 'actions Box(-1.0, 1.0, (1,), float32) are not discrete. Fix: choose'),
        ('text', 'observations Text(1, 4, '),
        ('inside', 'observations Text(1, 4, '),
        ('sequence', 'have no fixed shape. Fix: choose or wrap an environment'),
        ('graph', 'observations Graph('),
        ('empty', 'observations Dict() have no fixed shape'),
        (
            'large',
            'observations Discrete(1000000000) are one-hot arrays of 1,000,000,000 numbers, more'
            ' than 65,536. Fix: wrap',
        ),
        ('actions', ': 1,000,000 actions are more than 65,536. Fix: wrap'),
        ('spaceless', ': observation_space is None, not a space. Fix: set it to a space of gymna'),
        ('differs', 'Fix: let each seed make an environment of the same spaces.'),
        ('part', 'step 2: observation/pair/0 float32[2] [0.5, -3.0] is not in its space Box(-1.0'),
        ('missing', "step 2: observation {'picture': array("),
    ],
)
def test_a_broken_environment_is_one_line_with_its_name_step_and_remedy(how, message):
    text = refusal(f'{OWN}:broken_{how}', 3)
    assert message in text
    assert text.startswith(f'{OWN}:broken_{how}')
    assert ' Fix: ' in text
    assert '\n' not in text


@pytest.mark.parametrize(
    ('how', 'message'),
    [
        ('outside', ', environment 1, step 2: observation float64[3] [1.0, -1.0, 2.0] is not in'),
        ('unbounded', ', environment 1, step 2: observation float64[3] [1.0, inf, 2.0] is not fin'),
        ('dtype', ', environment 0, step 2: observation complex64[3]'),
        ('shape', ', environment 0, step 2: observation float64[2] [0.0, 0.0] is not in its space'),
        ('reward', ', environment 1, step 2: reward nan. Fix: return a finite number for each.'),
        ('rewards', ', step 2: reward float64[1] [2.0]. Fix: return a finite number for each.'),
        ('step', ', step 2: step raised RuntimeError: lost. Fix: correct its step().'),
        ('reset', ', step 2: reset raised RuntimeError: no level. Fix: correct its reset().'),
        ('mask', ', step 2: reset starts episodes outside reset_mask. Fix: reset only those'),
        ('spaceless', ': single_observation_space is None, not a space. Fix: set it to a space of'),
        ('mode', ": metadata['autoreset_mode'] is None. Fix: set it to AutoresetMode.NEXT_STEP or"),
    ],
)
def test_a_broken_vector_environment_is_one_line_with_the_number_of_the_broken_one(how, message):
    text = refusal(f'{OWN}:vector_{how}', 3)
    assert text.startswith(f'{OWN}:vector_{how}{message}'), text
    assert '\n' not in text


@pytest.mark.parametrize(
    ('how', 'message'),
    [
        ('nan', ', environment 0, step 2: observation float64[3] [nan, nan, nan] is not fini'),
        ('dtype', ', environment 0, step 2: observation float32[2, 3] [[0.0, 0.0, 2.0], [0.0, 0.0'),
        ('bounds', ', environment 0, step 2: observation float64[2, 3]'),
        ('reward', ', environment 0, step 2: reward inf. Fix: return a finite number.'),
        ('discount', ', environment 0, step 2: discount 0.5 within an episode. Fix: return 1'),
        ('goes_on', ', environment 0, step 6: the step after the LAST of an episode is not the'),
        ('step', ', step 2: step raised RuntimeError: lost. Fix: correct its step().'),
        ('reset', ', step 0: reset raised RuntimeError: no level. Fix: correct its reset().'),
        ('actions', ': 1,000,000 actions are more than 65,536. Fix: wrap the environment to have'),
        ('continuous', ': actions BoundedArraySpec(shape=(), dtype=dtype('),
        ('text', ": observations ArraySpec(shape=(), dtype=dtype('<U')"),
        ('differs', ': raised ValueError: All environments must have the same time_step_spec.'),
    ],
)
def test_a_broken_environment_of_tf_agents_is_one_line_with_its_name_step_and_remedy(how, message):
    text = refusal(f'{OF_TF}:{how}', 7)
    assert text.startswith(f'{OF_TF}:{how}{message}'), text
    assert ' Fix: ' in text
    assert '\n' not in text


def test_a_batched_environment_of_tf_agents_is_as_single_ones():
    for one, other in zip(played(f'{OWN}:py_counter', 14), played(f'{OF_TF}:batched', 14)):
        for field in ('reward', 'terminated', 'truncated', 'first', 'last'):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        np.testing.assert_array_equal(one.frame[:, 1:], other.frame[:, 1:])


@pytest.mark.parametrize(
    ('spec', 'expected'),
    [
        (array_spec.BoundedArraySpec((), np.int32, 0, 9), FrameSpec((1,), 'int32', 0, 9)),
        (array_spec.ArraySpec((2, 2, 1), bool), FrameSpec((2, 2, 1), 'uint8', 0, 1)),
        (
            array_spec.BoundedArraySpec((2,), np.float32, [-1, -2], [1, 2]),
            FrameSpec((2,), 'float32'),
        ),
        (
            [array_spec.BoundedArraySpec((2, 2), np.uint8, 0, 9), array_spec.ArraySpec((), bool)],
            [FrameSpec((2, 2), 'uint8', 0, 9), FrameSpec((1,), 'uint8', 0, 1)],
        ),
    ],
)
@pytest.mark.parametrize('count', [1, 2])
def test_each_kind_of_observation_of_tf_agents_is_one_of_arrays(spec, expected, count):
    made = [tf_environments.Showing(spec) for _ in range(count)]
    with TfAgentsEnvironment('own', made) as environment:
        frames = environment.reset().frame
    assert environment.frame_spec == expected
    for array, part in zip(tree.flatten(frames), tree.flatten(expected), strict=True):
        assert (array.shape, array.dtype) == ((count, *part.shape), part.dtype)


@pytest.mark.parametrize(
    ('name', 'error', 'message'),
    [
        ('CartPole-v9', EnvironmentFailedError, 'unknown (did you mean CartPole-v1'),
        ('CartPole', EnvironmentFailedError, 'unknown (did you mean CartPole-v1?)'),
        ('minatar/breakout', EnvironmentFailedError, 'unknown (did you mean MinAtar/Breakout-v1?)'),
        ('nopackage:Own-v0', EnvironmentFailedError, "No module named 'nopackage'"),
        ('Pendulum-v1', EnvironmentFailedError, 'Pendulum-v1: actions Box('),
        (f'{OWN}:numbered', EnvironmentFailedError, 'have a part named 1, not a string. Fix: choo'),
        ('nomodule:make', EnvironmentFailedError, 'cannot import nomodule'),
        (f'{OWN}:nofunction', EnvironmentFailedError, 'has no function nofunction'),
        (f'{OWN}:nothing', EnvironmentFailedError, 'returned object. Fix: return a gymnasium.Env'),
        (f'{OWN}:two', EnvironmentFailedError, 'holds 2 environments, not 3. Fix'),
        ('math:sqrt', EnvironmentFailedError, 'TypeError: math.sqrt() takes exactly one argument'),
        ('pingpong', GameError, "unknown game 'pingpong'"),
    ],
)
def test_what_cannot_be_opened_is_named_with_a_remedy(name, error, message):
    with pytest.raises(error, match='Fix: ') as failure:
        opened(name, count=3)
    assert message in str(failure.value)
    assert '\n' not in str(failure.value)


NAMES = ('simulator:make', 'simulator:Own-v0', 'Simulated/Own-v0', 'above:make', 'within:make')
OPEN = f"""
from agents.config import EnvironmentConfig
from agents.environments.factory import open_environment
for name in {NAMES}:
    try:
        open_environment(EnvironmentConfig(game=name), 1, seed=0).close()
        print()
    except ValueError as error:
        print(error)
"""


def test_where_a_package_is_missing_the_error_names_it_the_place_and_how_to_bring_it_there(
    tmp_path,
):
    """As in a worker elsewhere, whose Python lacks what the launcher's has."""
    package, shared = tmp_path / 'package', tmp_path / 'shared'
    (package / 'simulator-1.dist-info').mkdir(parents=True)
    shared.mkdir()
    (package / 'simulator.py').write_text(
        'import gymnasium\n'
        f'from {OWN} import Counter, counter as make\n'
        'def register():\n'
        '    gymnasium.register("Simulated/Own-v0", Counter, kwargs={"seed": 7})\n'
        'gymnasium.register("Own-v0", Counter, kwargs={"seed": 7})\n'
    )
    points = '[gymnasium.envs]\nsimulator = simulator:register\n'
    (package / 'simulator-1.dist-info' / 'entry_points.txt').write_text(points)
    (shared / 'above.py').write_text('from simulator import make\n')
    (shared / 'within.py').write_text(
        'def make(seed, opening):\n    import simulator\n    return simulator.make(seed, opening)\n'
    )

    def errors(*path):
        found = {'PYTHONPATH': os.pathsep.join(map(str, (*path, ROOT)))}
        return subprocess.run(
            [sys.executable, '-c', OPEN],
            env={**os.environ, **found},
            cwd=shared,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.splitlines()

    assert errors(package) == [''] * len(NAMES)
    missing = dict(zip(NAMES, errors(), strict=True))
    named = missing.pop('Simulated/Own-v0')
    assert named.startswith('Simulated/Own-v0: NamespaceNotFound: Namespace Simulated not found.')
    for name, error in missing.items():
        assert error.startswith(f"{name}: ModuleNotFoundError: No module named 'simulator', in ")
    for error in (named, *missing.values()):
        assert f', in {sys.executable} on ' in error
        assert '. Fix: install its package there (workers of a service get it by' in error


def test_an_atari_id_is_the_game_and_every_other_name_stays_as_it_is():
    for spelling in ('ALE/Pong-v5', 'PongNoFrameskip-v4', 'Pong'):
        assert check_name(spelling) == 'pong'
        assert EnvironmentConfig(game=check_name(spelling)).is_atari
    for name in ('CartPole-v1', 'gymnasium:CartPole-v1', f'{OWN}:counter', 'MinAtar/Freeway-v1'):
        assert check_name(name) == name
        assert not EnvironmentConfig(game=name).is_atari


def test_a_package_of_the_current_directory_registers_its_environments(tmp_path, monkeypatch):
    (tmp_path / 'package_of_this_test.py').write_text(
        'import gymnasium\n'
        f'gymnasium.register("OfThisTest-v0", "{OWN}:Counter", kwargs={{"seed": 7}})\n'
    )
    monkeypatch.chdir(tmp_path)
    with opened('package_of_this_test:OfThisTest-v0') as environment:
        assert environment.reset().frame.tolist() == [[7, 0, 0], [7, 0, 0]]
    del gymnasium.registry['OfThisTest-v0']


def test_a_package_that_fails_to_register_its_environments_stands_in_no_others_way(
    monkeypatch, caplog
):
    points = [
        metadata.EntryPoint('broken', 'nopackage:register', 'gymnasium.envs'),
        metadata.EntryPoint('whole', 'this', 'gymnasium.envs'),  # a module without a function
    ]
    monkeypatch.setattr(metadata, 'entry_points', lambda group: points)
    factory._register_installed.cache_clear()
    with pytest.raises(EnvironmentFailedError, match='unknown .did you mean CartPole-v1'):
        check_name('CartPole-v7')
    factory._register_installed.cache_clear()
    assert 'nopackage:register registers no environments: ModuleNotFoundError' in caplog.text


def test_an_action_outside_the_set_is_refused_before_any_environment_steps():
    with opened('CartPole-v1') as environment:
        environment.reset()
        with pytest.raises(ValueError, match='must lie in 0 .. 1'):
            environment.step_frames(np.array([0, 2], np.int32))


@pytest.mark.parametrize(
    ('shape', 'dtype', 'expected'),
    [
        ((2,), 'float32', (2, 6)),
        ((3, 3, 2), 'uint8', (2, 3, 3, 6)),
        ((3, 3), 'uint8', (2, 3, 3, 3)),
        ((3, 3), 'int16', (2, 3, 3, 3)),
    ],
)
def test_frames_of_any_type_are_stacked_along_their_last_axis_newest_last(shape, dtype, expected):
    stack = FrameStack(2, 3, FrameSpec(shape, dtype))
    rng = np.random.default_rng(0)
    frames = rng.integers(100, size=(4, 2, *shape)).astype(dtype)
    for t, frame in enumerate(frames):
        first = np.array([t == 0, t in (0, 2)])  # the second begins another episode at t = 2
        observation = stack.push(frame, first)
    assert observation.shape == expected
    assert observation.dtype == dtype
    newest = frames[1:].copy()
    newest[0, 1] = 0  # of the second one's previous episode
    if len(shape) == 2:
        newest = newest[..., None]
    joined = np.concatenate(list(newest), -1)
    np.testing.assert_array_equal(observation, joined)


def test_each_part_of_a_frame_has_a_stack_of_its_own():
    stack = FrameStack(1, 2, {'a': FrameSpec((2,), 'float32'), 'b': (FrameSpec((2, 2), 'uint8'),)})
    for t, first in ((1, True), (2, False)):
        frame = {'a': np.full((1, 2), t, np.float32), 'b': (np.full((1, 2, 2), t, np.uint8),)}
        observation = stack.push(frame, np.array([first]))
    assert observation['a'].tolist() == [[1, 1, 2, 2]]
    assert observation['b'][0].tolist() == [[[[1, 2]] * 2] * 2]
