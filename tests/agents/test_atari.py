"""Environment: preprocessing, starts and ends of games, lives, frame stacks."""

import ale_py
import numpy as np
import pytest
from ale_py import roms
from gymnasium.vector import AutoresetMode

from agents.config import EnvironmentConfig
from agents.environments import atari
from agents.environments.atari import AtariEnvironment
from agents.environments.frames import FrameSpec, FrameStack

_REPEAT = 4


def _area_weights(source: int, target: int) -> np.ndarray:
    """[target, source]: the share of each source pixel in each target pixel, rows summing to 1."""
    ratio = source / target
    low = np.arange(target)[:, None] * ratio
    pixel = np.arange(source)[None, :]
    overlap = np.minimum(low + ratio, pixel + 1) - np.maximum(low, pixel)
    return np.maximum(overlap, 0) / ratio


class _PlainGame:
    """A slow, obvious twin: one emulator, a loop over frames, resizing by areas."""

    def __init__(self, game: str, seed: int) -> None:
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.emulator = ale_py.ALEInterface()
        self.emulator.setFloat('repeat_action_probability', 0.0)
        self.emulator.setInt('random_seed', seed)
        self.emulator.loadROM(roms.get_rom_path(game))
        self.emulator.reset_game()
        self.actions = self.emulator.getMinimalActionSet()

    def screen(self) -> np.ndarray:
        return self.emulator.getScreenGrayscale()

    def step(self, action: int) -> tuple[np.ndarray, float]:
        """The frame, before rounding, float [84, 84], and the reward."""
        reward, screens = 0.0, []
        for _ in range(_REPEAT):
            reward += self.emulator.act(self.actions[action])
            screens.append(self.screen())
        return self.resize(np.maximum(screens[-1], screens[-2])), reward

    def resize(self, screen: np.ndarray) -> np.ndarray:
        rows, columns = (_area_weights(side, 84) for side in screen.shape)
        return rows @ screen @ columns.T


def _config(game: str = 'pong', **values: object) -> EnvironmentConfig:
    return EnvironmentConfig(game=game, **values)  # type: ignore[arg-type]


def _random_steps(environment: AtariEnvironment, count: int, seed: int = 0):
    random = np.random.default_rng(seed)
    for _ in range(count):
        shape = environment.num_environments
        action = random.integers(environment.num_actions, size=shape, dtype=np.int32)
        yield action, environment.step_frames(action)


class TestPreprocessing:
    def test_frames_and_rewards_equal_a_plain_loop_over_emulator_frames(self):
        with AtariEnvironment(_config(max_noops=0), 2, seed=5) as games:
            twin = _PlainGame('pong', int(atari.emulator_seeds(5, 2)[1]))
            first = games.reset()
            np.testing.assert_allclose(first.frame[1], twin.resize(twin.screen()), atol=1)
            total = 0.0
            for action, step in _random_steps(games, 120):
                frame, reward = twin.step(action[1])
                # OpenCV rounds to the nearest integer, by way of float32.
                np.testing.assert_allclose(step.frame[1], frame, atol=1)
                assert step.reward[1] == reward
                total += abs(reward)
        assert total > 0  # at least one point was played

    @pytest.mark.parametrize(('game', 'actions'), [('pong', 6), ('breakout', 4)])
    def test_actions_are_the_minimal_set(self, game, actions):
        with AtariEnvironment(_config(game), 1, seed=0) as games:
            assert games.num_actions == actions

    def test_types_and_shapes_are_as_documented(self):
        with AtariEnvironment(_config(), 3, seed=0) as games:
            games.reset()
            step = games.step_frames(np.zeros(3, np.int32))
        assert (step.frame.shape, step.frame.dtype) == ((3, 84, 84), np.uint8)
        assert (step.reward.shape, step.reward.dtype) == ((3,), np.float32)
        for flag in (step.terminated, step.truncated, step.life_lost, step.first):
            assert (flag.shape, flag.dtype) == ((3,), bool)


class TestStarts:
    def test_a_game_starts_with_zero_to_max_noops_emulator_frames(self):
        def starts(max_noops: int, games: int) -> set[int]:
            config = _config(max_noops=max_noops)
            emulators = atari.make_emulators(config, games, AutoresetMode.SAME_STEP)
            _, info = emulators.reset(seed=atari.emulator_seeds(1, games))
            return set(info['episode_frame_number'])

        # 10 draws from {0, 1} miss a value with probability 2 / 2^10.
        (start,) = starts(0, games=1)
        assert starts(1, games=10) == {start, start + 1}

    def test_the_same_seed_plays_the_same_games(self):
        def play(seed: int) -> list[np.ndarray]:
            with AtariEnvironment(_config('breakout'), 2, seed) as games:
                frames = [games.reset().frame]
                return frames + [step.frame for _, step in _random_steps(games, 60)]

        np.testing.assert_array_equal(play(7), play(7))
        assert any((one != other).any() for one, other in zip(play(7), play(8)))

    def test_neighbouring_seeds_share_no_emulator_seed(self):
        seeds = [set(atari.emulator_seeds(seed, 64)) for seed in range(20)]
        assert len(set().union(*seeds)) == 20 * 64


class TestEnds:
    def test_a_lost_life_ends_a_training_episode_but_not_its_game(self):
        with AtariEnvironment(_config('breakout', max_noops=0), 1, seed=0) as games:
            twin = _PlainGame('breakout', int(atari.emulator_seeds(0, 1)[0]))
            games.reset()
            lives, lost = twin.emulator.lives(), 0
            for action, step in _random_steps(games, 600):
                twin.step(action[0])
                assert step.terminated[0] == twin.emulator.game_over()
                if step.terminated[0]:
                    break
                assert step.life_lost[0] == (twin.emulator.lives() < lives)
                assert step.first[0] == step.life_lost[0]
                lost += step.life_lost[0]
                lives = twin.emulator.lives()
        # Breakout has 5 lives: 4 are lost on the way, the fifth with the game.
        assert (lost, step.terminated[0], step.life_lost[0], step.first[0]) == (
            4,
            True,
            False,
            True,
        )

    @pytest.mark.parametrize(
        ('training', 'matters'), [(False, True), (True, False)], ids=['evaluation', 'switched off']
    )
    def test_lives_do_not_matter_outside_training_or_when_switched_off(self, training, matters):
        config = _config('breakout', life_loss_ends_episode=matters)
        with AtariEnvironment(config, 4, seed=0, training=training) as games:
            games.reset()
            steps = [step for _, step in _random_steps(games, 150)]
        assert not any(step.life_lost.any() for step in steps)
        assert any(step.terminated.any() for step in steps)

    def test_a_game_is_cut_at_the_limit_of_frames_and_restarted_in_the_same_step(self):
        # 40 emulator frames are 10 agent steps.
        with AtariEnvironment(_config(max_noops=0, max_episode_frames=40), 2, seed=0) as games:
            start = games.reset().frame
            steps = [step for _, step in _random_steps(games, 20)]
        assert [step.truncated.all() for step in steps] == [False] * 9 + [True] + [False] * 9 + [
            True
        ]
        assert not any(step.terminated.any() for step in steps)
        assert steps[9].first.all()
        np.testing.assert_array_equal(steps[9].frame, start)
        assert (steps[8].frame != start).any()

    def test_an_action_outside_the_set_is_refused(self):
        with AtariEnvironment(_config(), 2, seed=0) as games:
            games.reset()
            with pytest.raises(ValueError, match=r'\[0, 6\] must lie in 0 \.\. 5'):
                games.step_frames(np.array([0, 6], np.int32))

    def test_a_step_before_the_first_reset_is_refused(self):
        with AtariEnvironment(_config(), 1, seed=0) as games:
            with pytest.raises(RuntimeError, match='call reset'):
                games.step_frames(np.zeros(1, np.int32))


class TestFrameStack:
    @pytest.mark.parametrize('depth', [1, 3, 4])
    def test_it_equals_the_last_frames_of_the_episode_after_zeros(self, depth):
        random = np.random.default_rng(0)
        stack = FrameStack(3, depth, FrameSpec((5, 6), 'uint8'))
        episodes: list[list[np.ndarray]] = [[], [], []]
        for step in range(40):
            frame = random.integers(256, size=(3, 5, 6), dtype=np.uint8)
            first = (random.random(3) < 0.2) | (step == 0)
            observation = stack.push(frame, first)
            for row, episode in enumerate(episodes):
                if first[row]:
                    episode.clear()
                episode.append(frame[row])
                padded = [np.zeros((5, 6), np.uint8)] * depth + episode
                np.testing.assert_array_equal(observation[row], np.stack(padded[-depth:], axis=-1))
