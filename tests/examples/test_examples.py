"""The example scripts run as their docstrings say and print what they should.

`follow_a_run.py`, `play_a_trained_policy.py` and `own_agent.py` need a run of ours:
tests/end_to_end/ has them.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from agents.config import EnvironmentConfig
from agents.environments.factory import open_environment

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_SECONDS = 120  # they take 5 s alone on a core


def _run(script: str) -> str:
    """What `script` prints."""
    result = subprocess.run(
        [sys.executable, f'tests/examples/{script}'],
        cwd=_ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def _steps_and_episodes(printed: str) -> tuple[int, int]:
    match = re.fullmatch(r'(\d+) steps, (\d+) episodes\n', printed)
    assert match, printed
    return int(match[1]), int(match[2])


def test_pydriver_plays_a_batch_with_a_dqn_agent_of_tf_agents():
    steps, episodes = _steps_and_episodes(_run('drive_with_pydriver.py'))
    # 4 games a step: at most 3 beyond the 800. A step into a new episode counts as none.
    assert 800 <= steps <= 803
    # Breakout's first ball is lost within 100 steps of hardly any play, in each of 4 games.
    assert episodes >= 4


def test_actor_plays_a_single_game_into_reverb():
    printed = dict(line.split(' = ') for line in _run('collect_with_actor.py').splitlines())
    # 3 runs of 200 steps; each makes a transition but the last, whose successor has not come.
    assert (printed['EnvironmentSteps'], printed['transitions']) == ('600', '599')
    # Random play of Space Invaders: about 50 points and 180 steps a life.
    assert int(printed['NumberOfEpisodes']) >= 2
    assert float(printed['AverageReturn']) > 0


def test_parallel_py_environment_plays_two_games_in_processes_of_their_own():
    steps, episodes = _steps_and_episodes(_run('play_in_processes.py'))
    assert 400 <= steps <= 401
    assert episodes >= 2


def test_an_unmodified_tf_agents_loop_trains_through_our_servers():
    printed = _run('train_through_our_servers.py')
    match = re.fullmatch(r'(\d+) transitions, (\d+) updates, loss (\d+\.\d+)\n', printed)
    assert match, printed
    # 400 steps in 4 games of Pong; the last 3 of each wait for what follows.
    assert int(match[1]) == 400 - 4 * 3
    assert int(match[2]) == 50


def test_an_own_loop_learns_from_prioritized_replay():
    printed = _run('prioritized_replay_in_an_own_loop.py')
    match = re.fullmatch(r'(\d+) transitions, (\d+) batches with unlike weights\n', printed)
    assert match, printed
    assert int(match[1]) == 300 - 2 * 1  # the last of each game waits for what follows
    # All priorities are 1 at first, but each shard gives half of a batch: weights are alike until
    # errors have come back. A few batches are on their way before.
    assert 15 <= int(match[2]) <= 30


def test_our_agent_trains_in_a_loop_of_tf_agents():
    printed = _run('our_agent_in_a_tf_agents_loop.py')
    match = re.fullmatch(r'(\d+) items, 20 updates, loss (\d+\.\d+)\n', printed)
    assert match, printed
    # 300 steps of 2 games, windows of 3 within episodes: a game of Breakout loses a life every 30
    # steps of chance or so, and 2 windows with it.
    assert 230 < int(match[1]) <= 300 - 2 * 2
    # Cross-entropy with 51 atoms: log(51) = 3.93 before anything is learned.
    assert float(match[2]) == pytest.approx(3.93, abs=0.2)


def test_our_agent_trains_on_cart_pole_in_a_loop_of_tf_agents():
    printed = _run('our_agent_on_cart_pole.py')
    match = re.fullmatch(r'(\d+) episodes, loss (\d+\.\d+) to (\d+\.\d+)\n', printed)
    assert match, printed
    # Half of 500 actions by chance: the pole falls after 10 to 50 steps.
    assert 500 / 50 <= int(match[1]) <= 500 / 8


def _command(name: str, *flags: str, seconds: float = 300.0) -> str:
    """What a command of pipelines/ prints; the scripts here are on PYTHONPATH, as they say."""
    result = subprocess.run(
        [sys.executable, f'pipelines/{name}.py', *flags],
        cwd=_ROOT,
        env={**os.environ, 'PYTHONPATH': str(_ROOT / 'tests' / 'examples')},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_an_environment_of_ones_own_is_trained_evaluated_and_filmed(tmp_path):
    run_dir = tmp_path / 'run'
    flags = [f'--run_dir={run_dir}', '--num_actors=1', '--num_learners=1', '--envs_per_actor=4']
    flags += ['--max_steps=1500', '--min_replay_size=200', '--epsilon_updates=200']
    flags += ['--evaluator_cpu_share=0', '--evaluation_episodes=5']
    _command('run', '--environment=own_environment:make', *flags)
    summary = json.loads((run_dir / 'summary.json').read_text())
    assert summary['exit_reason'] == 'max_frames'
    assert 1_500 <= summary['agent_steps'] < 1_500 + 64  # a bundle's segment at most
    # The way from the farthest start is 5 steps: 1 - 5 * 0.05. By chance it takes 25 on average.
    assert summary['evaluation']['mean'] >= 0.75
    assert (run_dir / 'video.mp4').stat().st_size > 500


_DOORS = {
    'own_environment:make': 1,
    'own_vector_environment:make': 1,
    'own_py_environment:single': 1,
    'own_py_environment:batch': 1,
    'own_py_environment:of_suite_gym': 4,  # CartPole
}
"""Factories of the examples, and the size of their observations."""


@pytest.mark.parametrize('name', _DOORS)
def test_each_door_for_an_environment_of_ones_own_gives_episodes(name, monkeypatch):
    monkeypatch.syspath_prepend(_ROOT / 'tests' / 'examples')
    ended = np.zeros(3, int)
    with open_environment(EnvironmentConfig(name), num_environments=3, seed=1) as environment:
        assert environment.frame_spec.shape == (_DOORS[name],)
        assert environment.num_actions == 2
        seen, total = environment.reset(), 0.0
        for _ in range(60):
            before = seen
            seen = environment.step_frames(np.ones(3, np.int32))
            assert (seen.first == before.last).all()  # the next step begins the next episode
            ended += seen.terminated
            total += seen.reward.sum()
    # To the right, always: at most 5 steps to the end of a corridor, and one to the next episode;
    # the pole falls within 12.
    assert (ended >= 60 // 13).all()
    assert total > 0


def test_environments_of_every_door_are_played_by_the_command_for_evaluations(tmp_path):
    games = ','.join(_DOORS)
    _command(
        'evaluate', '--policy=random', f'--games={games}', '--episodes=2', f'--output={tmp_path}/'
    )
    results = [json.loads(file.read_text()) for file in tmp_path.glob('*.json')]
    assert {result['game'] for result in results} == set(_DOORS)
    assert all((result['protocol'], result['failed']) == ('plain', 0) for result in results)
