"""Train and evaluate from Python: an experiment in, the contents of the run's JSON files out.

    from pipelines.api import evaluate, experiment, train

    for seed in range(3):
        run_dir = f'runs/breakout-{seed}'
        summary = train(experiment('laptop', game='breakout', seed=seed), run_dir)
        print(summary['mean_return_100'], evaluate(run_dir, episodes=100)['mean'])

A run is a separate process of `run.py`, with the same checks, errors and files; it leaves signals,
logging and TensorFlow of this process alone.
"""

import collections
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from infra.disk import is_remote
from infra.process import LAUNCHER_VARIABLE, own_code
from infra.sealed import parse_object
from pipelines.errors import FailedError, UsageError
from pipelines.evaluation.entrants import Request
from pipelines.experiment import config as config_lib
from pipelines.experiment import presets
from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.job_settings import JobSettings, require_hang_seconds
from pipelines.launch.evaluation import Work, require_valid
from pipelines.launch.evaluation import evaluate as play_and_write
from pipelines.storage.run_directory import default_path

__all__ = ['FailedError', 'RunFailedError', 'UsageError', 'evaluate', 'experiment', 'train']

_REFUSED = 2  # exit code
_LAST_LINES = 20


class RunFailedError(RuntimeError):
    """A run failed; the message holds its last lines of output."""


def experiment(preset: str | None = None, **settings: Any) -> ExperimentConfig:
    """Returns the preset with these settings replaced; they are named like run.py's flags.

    None: the preset for the game or environment in `settings`.

    Raises:
      UsageError: the preset or a setting is unknown, or a value is invalid or has no effect.
    """
    from pipelines.experiment import command_line

    return command_line.experiment(preset, settings)


def train(
    experiment: ExperimentConfig | None,
    run_dir: str | os.PathLike[str] | None = None,
    runner: str = 'DirectRunner',
    resume: bool = False,
    flags: Sequence[str] = (),
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains until the budget is reached or the run is stopped; returns its `summary.json`.

    Args:
      experiment: see `experiment`; None: that of the run to resume.
      run_dir: like `--run_dir`, local or at gs://; None: a new directory in `runs/`.
      runner: the engine, like `--runner`.
      resume: whether to continue from the last checkpoint in `run_dir`.
      flags: further flags of run.py or Beam, such as `--host=10.0.0.1`.
      progress: receives each line that the run prints.

    Raises:
      UsageError: run.py refuses the experiment, a flag or this machine.
      RunFailedError: the run failed, or was stopped before its first frame.
      KeyboardInterrupt: Ctrl-C was pressed, and the run has ended.
    """
    if experiment is None and not (resume and run_dir):
        raise UsageError('experiment: None. Fix: pass an experiment, or resume=True and run_dir.')
    if experiment is not None and run_dir is None:
        run_dir = default_path(experiment.environment.game, experiment.preset)
    argv = [f'--runner={runner}', f'--run_dir={run_dir}', *flags, *['--resume'] * resume]
    started = time.time()
    code, lines = _run([*argv, *_settings(experiment, resume)], progress)
    if code == _REFUSED:
        raise UsageError(lines[-1].removeprefix('run.py: '))
    if code and code < 128:
        raise RunFailedError('\n'.join(lines))
    return _summary(str(run_dir), started, lines)


def evaluate(
    run_dir: str | os.PathLike[str],
    episodes: int | None = None,
    epsilon: float | None = None,
    seed: int | None = None,
    output: str | os.PathLike[str] | None = None,
    protocol: str | None = None,
    checkpoint: str = 'newest',
    hang_seconds: float = JobSettings.hang_seconds,
) -> dict[str, Any]:
    """Evaluates a run in this process; returns the result.

    Args:
      run_dir: directory of the run, or gs://...
      episodes, epsilon, seed, protocol, checkpoint: like evaluate.py's flags; None: the run's own.
      hang_seconds: after so long without a step a game fails.
      output: new JSON file for the result; None: one in `run_dir`.

    Raises:
      UsageError: evaluate.py refuses an argument or the run.
      FailedError: a UsageError; no game could be played.
      OSError: the parent directory of `output` cannot be created.
    """
    for name, path in (('run_dir', run_dir), ('output', output)):
        if path is not None and not os.fspath(path):
            raise UsageError(f'{name}: empty. Fix: name a path.')
    require_valid(episodes, epsilon, seed)
    require_hang_seconds(hang_seconds)
    request = Request(
        run_dirs=[os.fspath(run_dir)],
        checkpoint=checkpoint,
        protocol=protocol,
        episodes=episodes,
        epsilon=epsilon,
        seed=seed,
    )
    file = None if output is None else os.fspath(output)
    work = Work(hang_seconds=hang_seconds)
    (result,) = play_and_write(request, file, work, ['api.evaluate']).values()
    return result


def _summary(run_dir: str, since: float, lines: Sequence[str]) -> dict[str, Any]:
    """The summary, if the run has written it since then.

    Raises:
      RunFailedError: it has not.
    """
    if is_remote(run_dir):
        from pipelines.storage.object_store import read_bytes  # imports Beam

        return parse_object(read_bytes(f'{run_dir}/summary.json'))
    file = pathlib.Path(run_dir, 'summary.json')
    if not file.exists() or file.stat().st_mtime < since - 1.0:  # file times may be coarse
        raise RunFailedError('\n'.join(lines))  # stopped before its first frame
    return parse_object(file.read_bytes())


def _settings(experiment: ExperimentConfig | None, resume: bool) -> Iterator[str]:
    """The flags from which run.py builds this experiment."""
    if experiment is None:
        return
    yield f'--preset={experiment.preset}'
    game = experiment.environment.game
    yield f'--game={game}'  # presets depend on it
    # A resumed run's values may differ from its preset's.
    base = None if resume else presets.experiment(experiment.preset, {'game': game})
    for name, (group, _) in config_lib.fields().items():
        value = getattr(getattr(experiment, group), name)
        if name == 'game' or (base and value == getattr(getattr(base, group), name)):
            continue
        if isinstance(value, bool):
            yield f'--{name}' if value else f'--no-{name}'
        else:
            yield f'--{name}={value}'


def _run(argv: Sequence[str], progress: Callable[[str], None]) -> tuple[int, list[str]]:
    """Runs run.py of this checkout; returns its exit code and last lines of output.

    run.py writes its last checkpoint even if this process is interrupted or dies.
    """
    last: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
    process = subprocess.Popen(
        [sys.executable, '-m', 'pipelines.run', *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
        env={
            **os.environ,
            **own_code(os.environ.get('PYTHONPATH', '')),
            LAUNCHER_VARIABLE: str(os.getpid()),
        },
        start_new_session=True,  # Ctrl-C in the terminal must reach it only through this process
    )
    raised: BaseException | None = None
    with process:
        while True:
            try:
                for line in process.stdout or ():
                    last.append(line.rstrip('\n'))
                    if raised is None or isinstance(raised, KeyboardInterrupt):
                        progress(last[-1])
                code = process.wait()
                break
            except BaseException as error:  # Ctrl-C; a second one ends the run at once
                raised = raised or error
                process.send_signal(signal.SIGINT)
    if raised is not None:
        raise raised
    return code, list(last)
