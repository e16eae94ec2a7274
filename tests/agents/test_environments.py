"""Environments beside Atari: gymnasium's, TF-Agents' and a user's own, sound and broken."""

import numpy as np
import pytest

from agents.config import EnvironmentConfig
from agents.environments.errors import EnvironmentFailedError
from agents.environments.factory import check_name, open_environment
from agents.environments.frames import FrameSpec, FrameStack
from agents.games import GameError
from tests.support.environments import LENGTH

OWN = 'tests.support.environments'


def opened(name, count=2, **settings):
    return open_environment(EnvironmentConfig(game=check_name(name), **settings), count, seed=1)


def played(name, steps, count=2, **settings):
    """The results of `steps` steps, the reset's first."""
    with opened(name, count, **settings) as environment:
        actions = np.arange(count, dtype=np.int32) % environment.num_actions
        results = [environment.reset()]
        results += [environment.step_frames(actions) for _ in range(steps)]
    return results


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


@pytest.mark.parametrize('name', ['counter', 'py_counter'])
def test_each_environment_of_a_factory_has_a_seed_of_its_own_the_same_each_time(name):
    first, again = (played(f'{OWN}:{name}', 1, count=4) for _ in range(2))
    seeds = first[0].frame[:, 0]
    assert len(set(seeds)) == 4
    np.testing.assert_array_equal(seeds, again[0].frame[:, 0])


def test_environments_step_in_processes_of_their_own_as_in_this_one():
    inside, outside = (
        played(f'{OWN}:counter', LENGTH + 1, env_processes=own) for own in (False, True)
    )
    for one, other in zip(inside, outside):
        np.testing.assert_array_equal(one.frame, other.frame)
        np.testing.assert_array_equal(one.last, other.last)


def test_a_structure_becomes_one_vector_of_its_parts():
    result = played(f'{OWN}:structured', 2)[-1]
    # In the order of the keys: pair (2 numbers, 2 bits), phase (one-hot of 6), picture (4 pixels).
    expected = [0.5, -0.5, 1, 0, 0, 0, 1, 0, 0, 0, 2, 2, 2, 2]
    assert result.frame[0].tolist() == expected


@pytest.mark.parametrize(
    ('name', 'spec', 'actions'),
    [
        ('CartPole-v1', FrameSpec((4,), 'float32'), 2),
        ('FrozenLake-v1', FrameSpec((16,), 'int64', 0, 1), 4),  # one-hot of 16 fields
        ('Blackjack-v1', FrameSpec((45,), 'int64', 0, 1), 2),  # 32 sums, 11 cards, an ace or not
        ('LunarLander-v3', FrameSpec((8,), 'float32'), 4),
        ('MinAtar/Breakout-v1', FrameSpec((10, 10, 4), 'uint8', 0, 1), 3),
    ],
)
def test_environments_of_five_packages_run_as_their_spaces_say(name, spec, actions):
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
            assert result.frame.shape == (4, *spec.shape)
            assert result.frame.dtype == spec.dtype
            ends, firsts = ends + result.last.sum(), firsts + result.first.sum()
        assert ends >= firsts >= 4


@pytest.mark.parametrize(
    ('how', 'told'),
    [
        ('nan', 'step 2: observation float64[3] [0.0, nan, 2.0] is not in its space'),
        ('outside', 'step 2: observation float64[3] [0.0, -1.0, 2.0] is not in its space'),
        ('shape', 'step 2: observation float64[2] [0.0, 0.0] is not in its space'),
        ('dtype', 'step 0: observation float64[3] [0.0, 0.0, 0.0] is not in its space'),
        ('reward', 'step 2: reward inf. Fix: return a finite number.'),
        ('step', 'step 2: raised RuntimeError: lost. Fix: correct its step().'),
        ('reset', 'step 0: reset raised RuntimeError: no level. Fix: correct its reset().'),
        ('continuous', 'actions Box(-1.0, 1.0, (1,), float32) are not discrete. Fix: choose'),
        ('text', 'observations Text(1, 4, '),
        ('sequence', 'have no fixed shape. Fix: choose or wrap an environment'),
    ],
)
def test_a_broken_environment_is_one_line_with_its_name_step_and_remedy(how, told):
    with pytest.raises(EnvironmentFailedError) as failure:
        played(f'{OWN}:broken_{how}', 3)
    text = str(failure.value)
    assert told in text
    assert text.startswith(f'{OWN}:broken_{how}')
    assert ' Fix: ' in text
    assert '\n' not in text


@pytest.mark.parametrize(
    ('name', 'error', 'told'),
    [
        ('CartPole-v9', EnvironmentFailedError, 'did you mean CartPole-v1'),
        ('Pendulum-v1', EnvironmentFailedError, 'Pendulum-v1: actions Box('),
        ('nomodule:make', EnvironmentFailedError, 'cannot import nomodule'),
        (f'{OWN}:nofunction', EnvironmentFailedError, 'has no function nofunction'),
        (f'{OWN}:nothing', EnvironmentFailedError, 'returned object. Fix: return a gymnasium.Env'),
        (f'{OWN}:two', EnvironmentFailedError, 'holds 2 environments, not 3. Fix'),
        ('pingpong', GameError, "unknown game 'pingpong'"),
    ],
)
def test_what_cannot_be_opened_is_named_with_a_remedy(name, error, told):
    with pytest.raises(error, match='Fix: ') as failure:
        opened(name, count=3)
    assert told in str(failure.value)


def test_an_atari_id_is_the_game_and_every_other_name_stays_as_it_is():
    assert check_name('ALE/Pong-v5') == 'pong'
    for name in ('CartPole-v1', 'gymnasium:CartPole-v1', f'{OWN}:counter'):
        assert check_name(name) == name


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
    stack = FrameStack(2, 3, shape, dtype)
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
