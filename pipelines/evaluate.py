"""Evaluation: a checkpoint's parameters in, the returns of 30 no-op-start games out (paper, 5).

Runs at the end of training and by itself:
  python pipelines/evaluate.py --run_dir runs/my-run
"""

import argparse
import contextlib
import fcntl
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from agents.config import EnvironmentConfig
from agents.environment import AtariEnvironment, FrameStack
from infra.parameter_server.checkpoint import Checkpoint
from infra.process import exit_with_launcher
from pipelines import config as config_lib
from pipelines.checkpoints import read_newest
from pipelines.errors import UsageError
from pipelines.files import write_json
from pipelines.run_directory import RunDirectory, readable

PROTOCOL = 'no-op starts'
EVALUATION_FILE = 'evaluation.json'
PROGRESS_FILE = 'evaluation.partial.json'
"""The games so far; a result replaces the one before only when it is complete."""
_LOCK_FILE = '.evaluation.lock'
_EVALUATION_STREAM = 3
_MAX_ENVIRONMENTS = 10


def play(
    environment: AtariEnvironment,
    act: Callable[[np.ndarray], np.ndarray],
    episodes: int,
    epsilon: float,
    rng: np.random.Generator,
) -> Iterator[float]:
    """Yields the raw return of each of `episodes` games, as they end.

    Every environment plays the same number of games give or take one, so that short games are not
    preferred to long ones.
    """
    count = environment.num_environments
    quota = np.full(count, episodes // count) + (np.arange(count) < episodes % count)
    stack = FrameStack(count, environment.config.frame_stack)
    returns = np.zeros(count)
    frames = environment.reset()
    while quota.any():
        observation = stack.push(frames.frame, frames.first)
        explored = rng.integers(environment.num_actions, size=count, dtype=np.int32)
        action = np.where(rng.random(count) < epsilon, explored, act(observation))
        frames = environment.step_frames(action)
        returns += frames.reward
        ended = frames.terminated | frames.truncated
        for index in np.flatnonzero(ended & (quota > 0)):
            quota[index] -= 1
            yield float(returns[index])
        returns[ended] = 0.0


def _environment(config: config_lib.ExperimentConfig, episodes: int) -> AtariEnvironment:
    rules = EnvironmentConfig(
        **{
            **vars(config.environment),
            'max_episode_frames': config.run.evaluation_max_frames,
            'life_loss_ends_episode': False,  # a game is judged whole
        }
    )
    seeds = np.random.SeedSequence([config.run.seed, _EVALUATION_STREAM])
    return AtariEnvironment(
        rules,
        num_environments=min(episodes, _MAX_ENVIRONMENTS),
        seed=int(seeds.generate_state(1)[0]),
        training=False,
    )


def _result(returns: Sequence[float], epsilon: float, updates: int) -> dict[str, Any]:
    return {
        'protocol': PROTOCOL,
        'episodes': len(returns),
        'epsilon': epsilon,
        'mean': float(np.mean(returns)) if returns else None,
        'std': float(np.std(returns)) if returns else None,
        'updates': updates,
        'returns': list(returns),
    }


def evaluate(
    config: config_lib.ExperimentConfig, saved: Checkpoint, run_dir: pathlib.Path
) -> dict[str, Any]:
    """Plays the evaluation of `saved` and writes it to the run's directory; returns the result.

    Waits for the end of another evaluation of this run.

    Raises:
      ValueError: the checkpoint holds the parameters of another network.
    """
    from pipelines.agent import build_policy

    policy = build_policy(config)
    policy.set_parameters(saved.parameters)
    progress = run_dir / PROGRESS_FILE
    run = config.run
    rng = np.random.default_rng([run.seed, _EVALUATION_STREAM])
    returns: list[float] = []
    with _alone(run_dir), _environment(config, run.evaluation_episodes) as environment:
        progress.unlink(missing_ok=True)
        for episode_return in play(
            environment, policy.act, run.evaluation_episodes, run.evaluation_epsilon, rng
        ):
            returns.append(episode_return)
            write_json(progress, _result(returns, run.evaluation_epsilon, saved.clock['updates']))
        progress.replace(run_dir / EVALUATION_FILE)
    return _result(returns, run.evaluation_epsilon, saved.clock['updates'])


@contextlib.contextmanager
def _alone(run_dir: pathlib.Path) -> Iterator[None]:
    """Inside it no other process evaluates this run; the kernel frees the lock of a dead one."""
    with open(run_dir / _LOCK_FILE, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='evaluate.py',
        description="Evaluate a run's newest checkpoint: no-op starts, epsilon 0.05, 30 games.",
    )
    parser.add_argument('--run_dir', required=True, help='directory of the run, or gs://...')
    parser.add_argument('--episodes', type=int, help="games (the run's evaluation_episodes)")
    parser.add_argument('--epsilon', type=float, help="epsilon (the run's evaluation_epsilon)")
    parser.add_argument('--seed', type=int, help="seed of the games (the run's)")
    return parser


def _config(directory: RunDirectory, arguments: argparse.Namespace) -> config_lib.ExperimentConfig:
    """The run's experiment, with the evaluation that `arguments` ask for.

    Raises:
      UsageError: a value is out of its range, or the run's configuration cannot be read.
    """
    episodes, epsilon, seed = arguments.episodes, arguments.epsilon, arguments.seed
    if episodes is not None and episodes < 1:
        raise UsageError(f'--episodes {episodes}: must be at least 1.')
    if epsilon is not None and not 0.0 <= epsilon <= 1.0:
        raise UsageError(f'--epsilon {epsilon}: must be from 0 to 1.')
    overrides = {'evaluation_episodes': episodes, 'evaluation_epsilon': epsilon, 'seed': seed}
    return config_lib.replace(
        config_lib.load(directory.config_file),
        {name: value for name, value in overrides.items() if value is not None},
    )


def main(argv: Sequence[str]) -> int:
    """Evaluates the newest checkpoint of a run; returns the exit code."""
    arguments = _parser().parse_args(argv)
    exit_with_launcher()
    try:
        with readable(arguments.run_dir, (EVALUATION_FILE,)) as path:
            return _evaluate_newest(RunDirectory.existing(path), arguments)
    except UsageError as error:
        print(f'evaluate.py: {error}', file=sys.stderr)
        return 2


def _evaluate_newest(directory: RunDirectory, arguments: argparse.Namespace) -> int:
    """Evaluates and prints the result; returns the exit code.

    Raises:
      UsageError: see `_config`, or there is no checkpoint.
    """
    config = _config(directory, arguments)
    saved = read_newest(directory, lambda text: print(f'evaluate.py: {text}', file=sys.stderr))
    try:
        result = evaluate(config, saved, directory.path)
    except (ValueError, OSError) as error:
        print(f'evaluate.py: {arguments.run_dir}: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('evaluate.py: interrupted; the evaluation before stays as it was.', file=sys.stderr)
        return 130
    print(
        f'{config.environment.game}: mean return {result["mean"]:.1f}, standard deviation'
        f' {result["std"]:.1f}, over {result["episodes"]} games ({PROTOCOL},'
        f' epsilon {result["epsilon"]})'
    )
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
