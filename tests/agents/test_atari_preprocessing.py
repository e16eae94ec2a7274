"""Our frames, rewards and ends are bit for bit those of gymnasium's `AtariPreprocessing`.

Both take the maximum of the last two grey screens of an action (grey comes first: each palette
colour is looked up in a table) and shrink it with OpenCV's INTER_AREA, ours in C++ inside ale_py,
theirs in Python. So no pixel differs. Both also leave an action at the frame that ends the game and
then show the last two screens kept before, and both show a game's first screen alone.

What differs, so that these tests start without no-ops and treat lives apart:
  - no-ops: gymnasium draws 1 to `noop_max` of them, ours 0 to `max_noops` (Mnih et al. 2015: "up to
    30"), each from its own generator;
  - the limit of frames: gymnasium counts a start's no-ops in, ours does not;
  - after an end gymnasium waits for `reset()`, ours restarts by itself in the step that follows;
  - lives: with `terminal_on_life_loss` gymnasium leaves the action at the frame that cost the life,
    shows the screens kept before, and its `reset()` starts a new game. Ours plays the action to its
    end and goes on with the same game: a lost life changes no frame, only the episodes.
"""

import ale_py
import gymnasium
import numpy as np
import pytest
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from agents.config import EnvironmentConfig
from agents.environments import atari
from agents.py_environment import SingleAtariPyEnvironment

_SEED = 3
_MAX_STEPS = 6000  # three games of random actions are over sooner; a bound for the loops
_NOOP = 0


@pytest.fixture(autouse=True, scope='module')
def _games_are_known():
    gymnasium.register_envs(ale_py)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


def _gymnasium_game(
    game: str, max_frames: int = 108_000, life_loss: bool = False, size: int = 84
) -> gymnasium.Env:
    """The wrappers of a gymnasium user, with the emulator's seed that ours has for `_SEED`."""
    emulator = gymnasium.make(
        f'ALE/{game.title().replace("_", "")}-v5',
        frameskip=1,
        repeat_action_probability=0,
        full_action_space=False,
        max_num_frames_per_episode=max_frames,
    )
    seed = int(atari.emulator_seeds(_SEED, 1)[0])
    emulator.unwrapped.ale.setInt('random_seed', seed)
    emulator.unwrapped.load_game()  # the seed counts from here on
    frames = AtariPreprocessing(
        emulator, noop_max=0, terminal_on_life_loss=life_loss, screen_size=size
    )
    return FrameStackObservation(frames, 4, padding_type='zero')


def _our_game(
    game: str, training: bool, max_frames: int = 108_000, size: int = 84
) -> SingleAtariPyEnvironment:
    config = EnvironmentConfig(
        game=game, max_noops=0, max_episode_frames=max_frames, screen_size=size
    )
    return SingleAtariPyEnvironment(config, _SEED, training)


def _actions(game: SingleAtariPyEnvironment) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.integers(game.action_spec().maximum + 1, size=_MAX_STEPS, dtype=np.int32)


def _assert_same_frames(ours: np.ndarray, stack: np.ndarray) -> None:
    """uint8 [size, size, frames], the newest last, and gymnasium's [frames, size, size]."""
    np.testing.assert_array_equal(ours, np.moveaxis(stack, 0, -1))


@pytest.mark.parametrize(
    ('game', 'scores', 'size'),
    [
        ('pong', True, 84),
        ('breakout', True, 84),
        ('seaquest', True, 84),
        ('space_invaders', True, 84),
        ('space_invaders', True, 42),
        ('qbert', True, 84),
        ('montezuma_revenge', False, 84),  # the first key is out of a random player's reach
    ],
)
def test_observations_rewards_and_ends_equal_gymnasiums_over_three_games(game, scores, size):
    ours, twin = _our_game(game, training=False, size=size), _gymnasium_game(game, size=size)
    _assert_same_frames(ours.reset().observation, twin.reset()[0])
    rewards, ends, over = 0.0, 0, False
    for action in _actions(ours):
        step = ours.step(action)
        if over:
            stack, reward, over = twin.reset()[0], 0.0, False
            assert step.is_first()
        else:
            stack, reward, over, cut, _ = twin.step(action)
            assert (step.is_last(), step.discount == 0, cut) == (over, over, False)
        _assert_same_frames(step.observation, stack)
        assert step.reward == reward
        rewards += abs(reward)
        ends += over
        if ends == 3:
            break
    assert (ends, rewards > 0) == (3, scores)
    ours.close()
    twin.close()


@pytest.mark.parametrize('game', ['breakout', 'seaquest', 'montezuma_revenge'])
def test_a_lost_life_ends_our_episode_where_gymnasium_counts_one_less_and_changes_no_frame(game):
    ours, twin = _our_game(game, training=True), _gymnasium_game(game)
    ours.reset()
    _, info = twin.reset()
    lives = start_lives = info['lives']
    lost, first = 0, False
    for action in _actions(ours):
        step = ours.step(action)
        # Ours ignores the action after a lost life: a no-op, whose reward is lost.
        stack, reward, over, _, info = twin.step(_NOOP if first else action)
        fell, lives = info['lives'] < lives, info['lives']
        np.testing.assert_array_equal(step.observation[..., -1], stack[-1])
        assert step.is_first() == first
        assert step.is_last() == (step.discount == 0) == (fell or over)
        assert step.reward == (0 if first else reward)
        if over:
            break
        lost += fell
        first = fell
    # All lives but the last are lost on the way, that one with the game.
    assert (over, lost) == (True, start_lives - 1)
    ours.close()
    twin.close()


def test_the_first_lost_life_comes_at_the_step_of_terminal_on_life_loss():
    ours, twin = _our_game('breakout', training=True), _gymnasium_game('breakout', life_loss=True)
    _assert_same_frames(ours.reset().observation, twin.reset()[0])
    for action in _actions(ours):
        step = ours.step(action)
        stack, reward, over, _, _ = twin.step(action)
        assert (step.is_last(), step.reward) == (over, reward)
        if over:
            break
        _assert_same_frames(step.observation, stack)
    assert over
    ours.close()
    twin.close()


@pytest.mark.parametrize('max_frames', [400, 402])
def test_a_game_is_cut_at_the_same_frame_even_in_the_middle_of_an_action(max_frames):
    ours = _our_game('pong', training=False, max_frames=max_frames)
    twin = _gymnasium_game('pong', max_frames)
    ours.reset()
    twin.reset()
    cuts: list[int] = []
    for index, action in enumerate(_actions(ours)[:110]):
        step = ours.step(action)
        if cuts and cuts[-1] == index - 1:
            stack, reward, cut = twin.reset()[0], 0.0, False
        else:
            stack, reward, over, cut, _ = twin.step(action)
            assert not over
        _assert_same_frames(step.observation, stack)
        assert (step.is_last(), step.discount, step.reward) == (cut, 1, reward)
        if cut:
            cuts.append(index)
    # 400 frames are 100 actions, the frames 401 and 402 half of one more; the first has index 0.
    assert cuts == [99 if max_frames == 400 else 100]
    ours.close()
    twin.close()
