"""The example scripts run as their docstrings say and print what they should.

`follow_a_run.py`, `play_a_trained_policy.py` and `own_agent.py` need a run of ours:
tests/end_to_end/ has them.
"""

import pathlib
import re
import subprocess
import sys

import pytest

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
