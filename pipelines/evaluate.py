"""Evaluation: a checkpoint's parameters in, the returns of no-op-start games out (paper, 5).

Runs at the end of training, or as a command:
  python pipelines/evaluate.py --run_dir runs/my-run
"""

import argparse
import datetime
import pathlib
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic
from typing import Any

if __name__ == '__main__':  # this checkout's packages, whatever PYTHONPATH and the environment hold
    sys.path[: not sys.flags.safe_path] = [str(pathlib.Path(__file__).resolve().parents[1])]

import numpy as np

from agents.config import EnvironmentConfig
from agents.environment import AtariEnvironment, FrameStack
from infra.disk import read_json, write_json
from infra.flags import Parser, integer, nonempty_path
from infra.output import protect_output
from infra.parameter_server.checkpoint import Checkpoint
from infra.process import exit_with_launcher
from pipelines.errors import UsageError, one_line_errors
from pipelines.experiment import config as config_lib
from pipelines.storage.checkpoints import read_newest
from pipelines.storage.evaluations import progress_file
from pipelines.storage.reading import readable
from pipelines.storage.run_directory import RunDirectory, output_path
from pipelines.storage.space import temporary_files

PROTOCOL = 'no-op starts'
_EVALUATION_STREAM = 3
_MAX_ENVIRONMENTS = 10
_PROGRESS_SECONDS = 10.0


def play(
    environment: AtariEnvironment,
    act: Callable[[np.ndarray], np.ndarray],
    episodes: int,
    epsilon: float,
    rng: np.random.Generator,
) -> Iterator[float]:
    """Yields the raw return of each of `episodes` games, as they end.

    Each environment plays the same number of games, give or take one: counting games as they end
    would favour short ones.
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
            'life_loss_ends_episode': False,  # a score is of a whole game
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
    config: config_lib.ExperimentConfig, saved: Checkpoint, output: pathlib.Path
) -> dict[str, Any]:
    """Plays the evaluation of `saved`; writes the result to `output` at the end and returns it.

    Raises:
      ValueError: the checkpoint is of another network.
      OSError: `output` is not writable.
    """
    from pipelines.experiment.builders import build_policy

    policy = build_policy(config)
    policy.set_parameters(saved.parameters)
    run, progress = config.run, progress_file(output)
    rng = np.random.default_rng([run.seed, _EVALUATION_STREAM])
    returns: list[float] = []
    due = monotonic() + _PROGRESS_SECONDS

    def result() -> dict[str, Any]:
        return _result(returns, run.evaluation_epsilon, saved.clock['updates'])

    try:
        write_json(progress, result())  # fails before the games if not writable
        with _environment(config, run.evaluation_episodes) as environment:
            for episode_return in play(
                environment, policy.act, run.evaluation_episodes, run.evaluation_epsilon, rng
            ):
                returns.append(episode_return)
                write_json(progress, result())
                if monotonic() >= due:
                    due = monotonic() + _PROGRESS_SECONDS
                    done = f'{len(returns)} of {run.evaluation_episodes} episodes'
                    _notify(f'{done}, mean return {np.mean(returns):.1f}')
        write_json(output, result())
    finally:
        progress.unlink(missing_ok=True)
    return result()


def _notify(text: str) -> None:
    print(f'evaluate.py: {text}', file=sys.stderr, flush=True)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog='evaluate.py',
        description="Evaluate a run's newest checkpoint: no-op starts, otherwise the run's rules.",
    )
    parser.add_argument(
        '--run_dir', type=nonempty_path, required=True, help='Run directory, local or gs://...'
    )
    parser.add_argument(
        '--episodes', type=integer, help="Games. Default: the run's --evaluation_episodes."
    )
    parser.add_argument('--epsilon', type=float, help="Default: the run's --evaluation_epsilon.")
    parser.add_argument('--seed', type=integer, help="Seed of the games. Default: the run's.")
    parser.add_argument(
        '--output',
        type=nonempty_path,
        help='JSON file for the result. Default: a new evaluation-<time>.json in --run_dir.',
    )
    return parser.parse_args(argv)


def overrides_of(episodes: int | None, epsilon: float | None, seed: int | None) -> dict[str, Any]:
    """Settings of the run that an evaluation replaces, checked before the run is read.

    Raises:
      UsageError: a value is out of range.
    """
    given = {'evaluation_episodes': episodes, 'evaluation_epsilon': epsilon, 'seed': seed}
    values = {name: value for name, value in given.items() if value is not None}
    try:
        config_lib.replace(config_lib.ExperimentConfig(), values)
    except UsageError as error:  # begins with the name of the setting
        raise UsageError(
            f'--{str(error).removeprefix("--").removeprefix("evaluation_")}'
        ) from error
    return values


@one_line_errors('evaluate.py', OSError)
def main(argv: Sequence[str]) -> int:
    """Evaluates the newest checkpoint of a run; returns the exit code."""
    arguments = parse(argv)
    exit_with_launcher()
    try:
        overrides = overrides_of(arguments.episodes, arguments.epsilon, arguments.seed)
        with temporary_files():
            result, written = evaluate_run(arguments.run_dir, overrides, arguments.output)
    except KeyboardInterrupt:
        print('evaluate.py: interrupted; no result written.', file=sys.stderr)
        return 130
    print(
        f'{result["game"]}: mean return {result["mean"]:.1f}, standard deviation'
        f' {result["std"]:.1f}, over {result["episodes"]} games ({PROTOCOL},'
        f' epsilon {result["epsilon"]})\nwritten to {written}'
    )
    return 0


def evaluate_run(
    run_dir: str, overrides: Mapping[str, Any], output: str | None = None
) -> tuple[dict[str, Any], str]:
    """Evaluates the newest checkpoint of a run, here or at gs://.

    Args:
      run_dir: directory of the run.
      overrides: settings of the run to replace, see `overrides_of`.
      output: file for the result; None: a new one in `run_dir`.

    Returns:
      (the result and the game, the file).

    Raises:
      UsageError: the run or its checkpoint is not readable, or the result not writable.
      OSError: the parent directory of `output` cannot be created.
    """
    # The digits differ between two evaluations that start in the same second.
    own = f'evaluation-{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}.json'
    with readable(run_dir, () if output else (own,)) as path:
        file = output_path(output) if output else path / own
        result = _evaluate_newest(RunDirectory.existing(path), overrides, file)
    return result, output or f'{run_dir}/{own}'


def _evaluate_newest(
    directory: RunDirectory, overrides: Mapping[str, Any], output: pathlib.Path
) -> dict[str, Any]:
    """Evaluates; returns the result and the game.

    Raises:
      UsageError: the configuration is not readable, there is no checkpoint of its network, or
        `output` is not writable or not an evaluation.
    """
    config = config_lib.replace(config_lib.load(directory.config_file), overrides)
    held = read_json(output)
    if output.is_dir() or (held is not None and 'returns' not in held):
        raise UsageError(
            f'--output {output}: not an evaluation. Fix: name a new file or an evaluation.'
        )
    saved = read_newest(directory, _notify)
    try:
        result = evaluate(config, saved, output)
    except ValueError as error:
        raise UsageError(f'{directory.path}: {error}') from error
    except OSError as error:
        raise UsageError(
            f'{output}: cannot be written ({error.strerror}). Fix: name another file as --output.'
        ) from error
    return {'game': config.environment.game, **result}


if __name__ == '__main__':
    protect_output()
    sys.exit(main(sys.argv[1:]))
