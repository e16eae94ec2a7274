"""TF-Agents' view of the games: validation of all of the paper's, ends, resets, wrappers."""

import functools
import pickle

import numpy as np
import pytest
from tf_agents.drivers import dynamic_step_driver
from tf_agents.environments import (
    batched_py_environment,
    tf_py_environment,
    utils,
    wrappers,
)
from tf_agents.metrics import tf_metrics
from tf_agents.policies import random_py_policy, random_tf_policy
from tf_agents.specs import array_spec
from tf_agents.train import actor
from tf_agents.train.utils import train_utils

from agents.config import EnvironmentConfig
from agents.environments.atari import AtariEnvironment
from agents.py_environment import AtariPyEnvironment, SingleAtariPyEnvironment
from tests.support.paper_games import PAPER_GAMES

FIRST, MID, LAST = 0, 1, 2  # TF-Agents' StepType


def _config(game: str = 'pong', **values: object) -> EnvironmentConfig:
    return EnvironmentConfig(game=game, **values)  # type: ignore[arg-type]


def _single_steps(games: AtariPyEnvironment | SingleAtariPyEnvironment, count: int, seed: int = 0):
    """`count` random actions, each a scalar, and the time steps after them."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        action = random.integers(games.action_spec().maximum + 1, dtype=np.int32)
        yield action, games.step(action)


def test_the_paper_has_49_games():
    assert len(set(PAPER_GAMES)) == 49


# A game of 10 actions (40 frames): 3 ends mean that steps after an end are looked at too.
@pytest.mark.parametrize('game', PAPER_GAMES)
class TestValidation:
    def test_a_batch_of_a_paper_game_passes_tf_agents_validation(self, game):
        with AtariPyEnvironment(_config(game, max_episode_frames=40), 2, seed=0) as games:
            assert games.batch_size == 2
            utils.validate_py_environment(games, episodes=3)

    def test_a_single_paper_game_passes_tf_agents_validation(self, game):
        with SingleAtariPyEnvironment(_config(game, max_episode_frames=40), seed=0) as games:
            assert games.batch_size is None
            utils.validate_py_environment(games, episodes=3)


class TestBatch:
    def test_last_is_followed_by_first_and_time_steps_fit_their_spec(self):
        games = AtariPyEnvironment(_config('breakout', frame_stack=2), 3, seed=0)
        random = np.random.default_rng(0)
        before, lasts = games.reset(), 0
        assert before.is_first().all()
        for _ in range(300):
            step = games.step(random.integers(4, size=3, dtype=np.int32))
            for row in range(3):
                one = type(step)(*(column[row] for column in step))
                assert array_spec.check_arrays_nest(one, games.time_step_spec())
                assert one.is_first() == before.is_last()[row]
                assert (one.discount == 0) == one.is_last()
                if one.is_first():
                    assert one.reward == 0
                    assert not one.observation[..., 0].any()  # nothing of the old episode
                lasts += one.is_last()
            before = step
        assert lasts > 5
        games.close()

    def test_it_shows_the_frames_and_rewards_of_the_array_view(self):
        view = AtariPyEnvironment(_config(), 2, seed=3)
        random = np.random.default_rng(0)
        with AtariEnvironment(_config(), 2, seed=3) as games:
            np.testing.assert_array_equal(view.reset().observation[..., -1], games.reset().frame)
            for _ in range(100):
                action = random.integers(6, size=2, dtype=np.int32)
                time_step, step = view.step(action), games.step_frames(action)
                np.testing.assert_array_equal(time_step.observation[..., -1], step.frame)
                np.testing.assert_array_equal(time_step.reward, step.reward)
        view.close()

    def test_a_cut_game_ends_with_discount_one(self):
        games = AtariPyEnvironment(_config(max_episode_frames=8), 1, seed=0)
        games.reset()
        games.step(np.zeros(1, np.int32))
        step = games.step(np.zeros(1, np.int32))
        assert step.is_last().all()
        assert step.discount == 1
        games.close()

    def test_a_game_cut_by_the_no_op_after_a_lost_life_is_followed_by_a_first_of_the_next(self):
        random = np.random.default_rng(0)
        # The first game plays at random; the second never serves its ball and so loses no life.
        actions = [np.array([random.integers(4), 0], np.int32) for _ in range(100)]

        def play(count: int, max_frames: int) -> list:
            config = _config('breakout', max_noops=0, max_episode_frames=max_frames)
            with AtariPyEnvironment(config, 2, seed=0) as games:
                return [games.reset()] + [games.step(action) for action in actions[:count]]

        lost = [step.is_last()[0] for step in play(100, 108_000)].index(True)
        # The 4 frames of the no-op reach the limit, in the second game those of an action.
        start, *_, last, after_last, later = play(lost + 2, 4 * lost + 4)
        assert last.step_type.tolist() == [LAST, MID]
        assert after_last.step_type.tolist() == [FIRST, LAST]
        assert later.step_type.tolist() == [MID, FIRST]
        np.testing.assert_array_equal(last.discount, [0, 1])
        np.testing.assert_array_equal(after_last.discount, [1, 1])
        np.testing.assert_array_equal(after_last.observation[0], start.observation[0])
        np.testing.assert_array_equal(later.observation[1], start.observation[1])

    def test_a_reset_begins_the_next_episode_where_one_ended_and_a_new_game_elsewhere(self):
        config = _config('breakout', max_noops=0)
        with AtariPyEnvironment(config, 2, seed=0) as games:
            start = games.reset().observation
            random = np.random.default_rng(0)
            while not games.step(np.array([random.integers(4), 0], np.int32)).is_last()[0]:
                pass
            step = games.reset()
            assert step.is_first().all()
            assert games._lives.tolist() == [4, 5]
            assert (step.observation[0] != start[0]).any()  # the game that goes on has lost bricks
            np.testing.assert_array_equal(step.observation[1], start[1])

    @pytest.mark.parametrize('number', [0, -1, 2.5])
    def test_a_number_of_games_that_cannot_be_is_refused(self, number):
        with pytest.raises(ValueError, match='num_environments'):
            AtariPyEnvironment(_config(), number, seed=0)

    def test_actions_that_are_no_integers_are_refused(self):
        with AtariPyEnvironment(_config(), 1, seed=0) as games:
            games.reset()
            with pytest.raises(ValueError, match='float64'):
                games.step(np.array([np.nan]))

    @pytest.mark.parametrize('shape', [(), (1,), (3, 1)])
    def test_a_batch_of_actions_of_another_size_is_refused(self, shape):
        with AtariPyEnvironment(_config(), 3, seed=0) as games:
            games.reset()
            with pytest.raises(ValueError, match=r'one per game, \(3,\)'):
                games.step(np.zeros(shape, np.int32))

    def test_a_second_reset_starts_other_games_the_same_ones_for_the_same_seed(self):
        # Freeway's cars move in every frame: each number of no-ops starts elsewhere.
        with AtariPyEnvironment(_config('freeway'), 4, seed=0) as games:
            first, second = starts = [games.reset().observation for _ in range(2)]
            # 4 draws from 31 numbers of no-ops agree with probability 1 in 923,521.
            assert (first != second).any()
            games.seed(0)
            np.testing.assert_array_equal([games.reset().observation for _ in range(2)], starts)
            with pytest.raises(ValueError, match='non-negative'):
                games.seed(-1)

    def test_it_renders_what_the_agent_sees(self):
        with AtariPyEnvironment(_config(), 2, seed=0) as games:
            with pytest.raises(ValueError, match='not initialized'):
                games.render()
            games.reset()
            step = games.step(np.zeros(2, np.int32))
            picture = games.render()
            assert (picture.shape, picture.dtype) == ((2, 84, 84, 3), np.uint8)
            for colour in range(3):
                np.testing.assert_array_equal(picture[..., colour], step.observation[..., -1])
            with pytest.raises(NotImplementedError, match="'human' needs a window"):
                games.render('human')
            tensors = tf_py_environment.TFPyEnvironment(games)
            np.testing.assert_array_equal(tensors.render(), games.render())

    def test_an_actor_takes_a_batch(self):
        games = AtariPyEnvironment(_config(), 2, seed=0)
        policy = random_py_policy.RandomPyPolicy(games.time_step_spec(), games.action_spec())
        metrics = actor.collect_metrics(buffer_size=10)
        step = train_utils.create_train_step()
        actor.Actor(games, policy, step, steps_per_run=20, metrics=metrics).run()
        results = {metric.name: metric.result() for metric in metrics}
        # Random play loses no game of Pong, and no life, within 10 steps.
        assert (results['EnvironmentSteps'], results['NumberOfEpisodes']) == (20, 0)
        games.close()

    def test_a_driver_of_tensorflow_environments_steps_it(self):
        games = tf_py_environment.TFPyEnvironment(AtariPyEnvironment(_config(), 2, seed=0))
        policy = random_tf_policy.RandomTFPolicy(games.time_step_spec(), games.action_spec())
        steps = tf_metrics.EnvironmentSteps()
        dynamic_step_driver.DynamicStepDriver(games, policy, [steps], num_steps=10).run()
        assert steps.result() == 10
        games.close()


class TestSingle:
    def test_it_is_row_0_of_a_batch_of_one(self):
        config = _config('breakout')
        with AtariPyEnvironment(config, 1, 5) as batch, SingleAtariPyEnvironment(config, 5) as one:
            many = batch.reset()
            np.testing.assert_array_equal(one.reset().observation, many.observation[0])
            for action, step in _single_steps(one, 100):
                many = batch.step(action[None])
                for field, row in zip(step, many):
                    np.testing.assert_array_equal(field, row[0], strict=True)
            np.testing.assert_array_equal(one.render(), batch.render()[0])
            one.seed(3)
            batch.seed(3)
            np.testing.assert_array_equal(one.reset().observation, batch.reset().observation[0])

    def test_lives_matter_in_training_only(self):
        def ends(training: bool) -> int:
            with SingleAtariPyEnvironment(_config('breakout'), 0, training) as game:
                game.reset()
                return sum(step.is_last() for _, step in _single_steps(game, 100))

        assert (ends(training=True) > 0, ends(training=False)) == (True, 0)

    def test_its_constructor_can_be_pickled_with_its_arguments(self):
        make = functools.partial(SingleAtariPyEnvironment, _config('breakout'), seed=2)
        with make() as game, pickle.loads(pickle.dumps(make))() as copy:
            np.testing.assert_array_equal(game.reset().observation, copy.reset().observation)

    def test_a_wrapper_for_single_environments_cuts_it_and_the_next_game_starts_elsewhere(self):
        game = wrappers.TimeLimit(SingleAtariPyEnvironment(_config('freeway'), 0), duration=5)
        with game:
            steps = [game.reset()] + [game.step(0) for _ in range(11)]
        # 5 actions, then a reset in place of the sixth.
        assert [int(step.step_type) for step in steps] == [FIRST, MID, MID, MID, MID, LAST] * 2
        assert (steps[0].observation != steps[6].observation).any()

    def test_a_reset_after_a_lost_life_goes_on_with_the_game(self):
        # A lost life leaves 4 of Breakout's 5 lives; the fifth loss ends the game.
        with SingleAtariPyEnvironment(_config('breakout'), 0) as game:
            random, left = np.random.default_rng(0), []
            for _ in range(6):
                step = game.reset()
                assert step.is_first()
                while not step.is_last():
                    step = game.step(random.integers(4, dtype=np.int32))
                left.append(int(game._batch._lives[0]))
        assert left == [4, 3, 2, 1, 0, 4]

    def test_single_games_make_a_batch_of_tf_agents(self):
        single = [SingleAtariPyEnvironment(_config(max_episode_frames=40), seed) for seed in (0, 1)]
        games = batched_py_environment.BatchedPyEnvironment(single, multithreading=False)
        utils.validate_py_environment(games, episodes=3)
        games.close()
