"""Evaluation: a checkpoint's parameters in, the returns of 30 no-op-start games out (paper, 5).

Runs at the end of training and by itself:
  python pipelines/evaluate.py --run_dir runs/my-run
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from agents.config import EnvironmentConfig
from agents.environment import AtariEnvironment, FrameStack
from infra.process import exit_with_parent
from pipelines import config as config_lib
from pipelines.errors import UsageError
from pipelines.run_directory import RunDirectory, write_json

PROTOCOL = 'no-op starts'
EVALUATION_FILE = 'evaluation.json'
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
    config: config_lib.ExperimentConfig, checkpoint: pathlib.Path, output: pathlib.Path
) -> dict[str, Any]:
    """Plays the evaluation of `checkpoint`, writing `output` after each game; returns the result.

    Raises:
      DamagedCheckpointError: the checkpoint's parameters cannot be read.
    """
    from infra.parameter_server.checkpoint import read_checkpoint
    from pipelines.agent import build_policy

    saved = read_checkpoint(str(checkpoint / 'parameters'))
    policy = build_policy(config)
    policy.set_parameters(saved.parameters)
    run = config.run
    rng = np.random.default_rng([run.seed, _EVALUATION_STREAM])
    returns: list[float] = []
    with _environment(config, run.evaluation_episodes) as environment:
        for episode_return in play(
            environment, policy.act, run.evaluation_episodes, run.evaluation_epsilon, rng
        ):
            returns.append(episode_return)
            write_json(output, _result(returns, run.evaluation_epsilon, saved.clock['updates']))
    return _result(returns, run.evaluation_epsilon, saved.clock['updates'])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='evaluate.py',
        description="Evaluate a run's newest checkpoint: no-op starts, epsilon 0.05, 30 games.",
    )
    parser.add_argument('--run_dir', type=pathlib.Path, required=True, help='directory of the run')
    parser.add_argument('--episodes', type=int, help="games (the run's evaluation_episodes)")
    parser.add_argument('--epsilon', type=float, help="epsilon (the run's evaluation_epsilon)")
    parser.add_argument('--seed', type=int, help="seed of the games (the run's)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Evaluates the newest checkpoint of a run; returns the exit code."""
    arguments = _parser().parse_args(argv)
    exit_with_parent()
    try:
        directory = RunDirectory.existing(arguments.run_dir)
        overrides = {
            'evaluation_episodes': arguments.episodes,
            'evaluation_epsilon': arguments.epsilon,
            'seed': arguments.seed,
        }
        config = config_lib.replace(
            config_lib.load(directory.config_file),
            {name: value for name, value in overrides.items() if value is not None},
        )
        checkpoints = directory.latest_checkpoints()
        if not checkpoints:
            raise UsageError(f'{arguments.run_dir}: holds no checkpoint to evaluate.')
    except UsageError as error:
        print(f'evaluate.py: {error}', file=sys.stderr)
        return 2
    result = evaluate(config, checkpoints[0], directory.path / EVALUATION_FILE)
    print(
        f'{config.environment.game}: mean return {result["mean"]:.1f}, standard deviation'
        f' {result["std"]:.1f}, over {result["episodes"]} games ({PROTOCOL},'
        f' epsilon {result["epsilon"]})'
    )
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
