"""Evaluation games: how many each environment plays, and who chooses the actions."""

import dataclasses
import tempfile

import numpy as np
import pytest

from agents.config import EnvironmentConfig
from agents.environment import AtariEnvironment
from infra.parameter_server.checkpoint import Checkpoint
from pipelines import evaluate, export
from pipelines.evaluate import play
from pipelines.experiment import builders, presets
from pipelines.experiment import config as config_lib
from pipelines.storage import evaluations

STEPS = 8  # agent steps of a game


class CountingEnvironment(AtariEnvironment):
    """Real games, each cut after `STEPS` steps; reward 1 a step in environment 0, 2 in 1, ..."""

    def __init__(self, num_environments):
        config = EnvironmentConfig(max_noops=0, max_episode_frames=4 * STEPS)
        super().__init__(config, num_environments, seed=1, training=False)
        self.actions = []

    def step_frames(self, action):
        self.actions.append(action.copy())
        frames = super().step_frames(action)
        reward = np.arange(1, self.num_environments + 1, dtype=np.float32)
        return dataclasses.replace(frames, reward=reward)


def play_games(num_environments, episodes, epsilon=0.0):
    """The returns, the actions taken, and those that the policy chose."""
    chosen: list[np.ndarray] = []

    def act(observation):
        assert observation.shape == (num_environments, 84, 84, 4)
        chosen.append(np.full(num_environments, len(chosen) % 3, np.int32))
        return chosen[-1]

    environment = CountingEnvironment(num_environments)
    with environment:
        rng = np.random.default_rng(1)
        returns = list(play(environment, act, episodes, epsilon, rng))
    return returns, environment.actions, chosen


@pytest.mark.parametrize(
    ('num_environments', 'episodes', 'games'),
    [(3, 6, [2, 2, 2]), (3, 7, [3, 2, 2]), (3, 2, [1, 1, 0]), (1, 2, [2]), (2, 0, [0, 0])],
)
def test_every_environment_plays_its_share(num_environments, episodes, games):
    returns, _, _ = play_games(num_environments, episodes)
    assert len(returns) == episodes
    # The return of a game tells whose it was: all games are equally long.
    step = min(returns, default=0.0)
    counts = [sum(value == step * (i + 1) for value in returns) for i in range(num_environments)]
    assert counts == games


def test_policy_alone_acts_without_exploration():
    _, actions, chosen = play_games(2, 2, epsilon=0.0)
    np.testing.assert_array_equal(actions, chosen)


def test_chance_alone_acts_with_epsilon_one():
    _, actions, chosen = play_games(2, 4, epsilon=1.0)
    assert not np.array_equal(actions, chosen)
    assert {*np.ravel(actions)} == set(range(6))  # Pong's minimal set


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run whose checkpoint holds the parameters of a new network."""
    experiment = presets.experiment('laptop', {})
    (tmp_path / 'config.json').write_text(config_lib.to_json(experiment))
    policy = builders.build_policy(experiment)
    saved = Checkpoint(
        layout=builders.layout_of(policy),
        parameters=policy.parameters(),
        target=policy.parameters(),
        clock={'updates': 1},
    )
    for command in (evaluate, export):
        monkeypatch.setattr(command, 'read_newest', lambda *_: saved)
    return tmp_path


def test_an_interrupted_evaluation_leaves_the_one_before(run_dir, monkeypatch, capsys):
    (run_dir / evaluations.EVALUATION_FILE).write_text('the one before')

    def one_game_and_ctrl_c(*_):
        yield 1.0
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, 'play', one_game_and_ctrl_c)
    assert evaluate.main([f'--run_dir={run_dir}']) == 130
    assert 'interrupted' in capsys.readouterr().err
    assert (run_dir / evaluations.EVALUATION_FILE).read_text() == 'the one before'


def test_a_long_evaluation_shows_its_progress_every_ten_seconds(run_dir, monkeypatch, capsys):
    now = 1_000.0

    def one_game_in_six_seconds(*_):
        nonlocal now
        for episode_return in (1.0, 2.0, 3.0, 4.0):
            now += 6.0
            yield episode_return

    monkeypatch.setattr(evaluate, 'play', one_game_in_six_seconds)
    monkeypatch.setattr(evaluate, 'monotonic', lambda: now)
    assert evaluate.main([f'--run_dir={run_dir}', '--episodes=4']) == 0
    assert capsys.readouterr().err == (
        'evaluate.py: 2 of 4 episodes, mean return 1.5\n'
        'evaluate.py: 4 of 4 episodes, mean return 2.5\n'
    )


@pytest.mark.parametrize('command', [evaluate, export])
def test_temporary_files_of_tensorflow_are_removed(run_dir, tmp_path, monkeypatch, command):
    temporary = tmp_path / 'temporary'
    temporary.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(temporary))

    def leave_a_file(*_):
        tempfile.mkstemp(prefix='__autograph_generated_file')
        raise OSError('full')

    monkeypatch.setattr(command, command.__name__.rpartition('.')[2], leave_a_file)
    assert command.main([f'--run_dir={run_dir}']) == 2
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize('content', [b'\xff\xfe\x00', b'{}'])
def test_an_unreadable_configuration_is_one_line(tmp_path, capsys, content):
    (tmp_path / 'config.json').write_bytes(content)
    assert evaluate.main([f'--run_dir={tmp_path}']) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_run_without_a_checkpoints_directory_is_one_line(tmp_path, capsys):
    (tmp_path / 'config.json').write_text(config_lib.to_json(presets.experiment('laptop', {})))
    assert evaluate.main([f'--run_dir={tmp_path}']) == 2
    assert 'no checkpoint yet' in capsys.readouterr().err


@pytest.mark.parametrize('command', [evaluate, export])
def test_a_game_that_would_end_the_interpreter_is_one_line(tmp_path, monkeypatch, capsys, command):
    experiment = presets.experiment('laptop', {'game': 'joust'})
    (tmp_path / 'config.json').write_text(config_lib.to_json(experiment))
    monkeypatch.setattr(command, 'read_newest', lambda *_: None)
    assert command.main([f'--run_dir={tmp_path}']) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "game 'joust' cannot be played" in line
