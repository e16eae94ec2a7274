"""Train an Atari agent: `python pipelines/run.py --runner=DirectRunner` (see `--help`)."""

import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if __name__ == '__main__':  # this checkout's packages, whatever PYTHONPATH and the environment hold
    sys.path[: not sys.flags.safe_path] = [str(pathlib.Path(__file__).resolve().parents[1])]

from infra.addresses import reach_directly
from infra.disk import write_atomically
from infra.output import protect_output
from infra.process import exit_with_launcher
from pipelines.errors import UsageError, one_line_errors
from pipelines.experiment import config as config_lib
from pipelines.experiment.config import ExperimentConfig
from pipelines.launch.interrupts import StartUp
from pipelines.storage.run_directory import RunDirectory, command, default_path

# Beam and TensorFlow take seconds to import: functions do it, under `StartUp`, after the checks.
if TYPE_CHECKING:
    from pipelines.experiment.launch import Launch

_END_SECONDS = 400.0  # for the last checkpoint after the process that started the run is gone


def prepare(argv: Sequence[str], start_up: StartUp) -> tuple[ExperimentConfig, 'Launch']:
    """Reads the command line and checks everything that can be checked before a file is written.

    Claims a remote place, and fetches a run to resume from it.

    Raises:
      UsageError: a flag or value is invalid or the machine unfit; the message names the remedy.
    """
    from pipelines.experiment import command_line
    from pipelines.preflight import checklist

    launch, preset, values = command_line.parse(argv)
    reach_directly((*launch.parameter_addresses, *launch.replay_addresses), launch.host)
    checklist.require_restorable(launch)
    # Checked before a new run claims its remote place; a run to resume must be fetched first.
    new = None if launch.resume else command_line.experiment(preset, values)
    launch = start_up.localized(launch)
    config = new
    if config is None:
        before = _before(launch)
        config = command_line.resumed(before, preset, values)
        values = {name: values[name] for name in config_lib.changes(before, config)}
    checklist.require_fit(config, launch, values)
    return config, launch


def _before(launch: 'Launch') -> ExperimentConfig:
    """The experiment of the run to resume.

    Raises:
      UsageError: the run does not exist or cannot be read.
    """
    return config_lib.load(RunDirectory.existing(launch.run_dir or '').config_file)


def write_config(config: ExperimentConfig, directory: RunDirectory, resume: bool) -> None:
    """Writes `config.json`, unless the run cannot resume.

    Raises:
      UsageError: the file is not writable, no checkpoint readable, or nothing left to train.
    """
    try:
        if resume:
            _note_resumption(config, directory)
        write_atomically(directory.config_file, config_lib.to_json(config))
    except OSError as error:
        raise UsageError(
            f'{directory.config_file}: cannot be written ({error}). Fix: free space, or'
            ' gain write access.'
        ) from error


def _note_resumption(config: ExperimentConfig, directory: RunDirectory) -> None:
    """Appends time, progress and changed values of a resumption to `resumptions.jsonl`.

    Raises:
      UsageError: no checkpoint is readable, or nothing is left to train.
      OSError: the file cannot be written.
    """
    from pipelines.storage.checkpoints import readable_counters

    counters = readable_counters(directory)
    done = counters.get('agent_steps', 0)
    frames = done * config.environment.action_repeat
    if done >= config.max_agent_steps:
        raise UsageError(
            f'{directory.path}: nothing is left to train ({frames} of --max_frames'
            f' {config.run.max_frames}). Fix: raise --max_frames, or run'
            f' {command("evaluate", directory.path)} and {command("export", directory.path)}.'
        )
    changed = config_lib.changes(config_lib.load(directory.config_file), config)
    row = {'time': time.time(), 'frames': frames, 'updates': counters['updates']}
    file = directory.resumptions_file
    before = file.read_text(errors='replace') if file.exists() else ''
    write_atomically(file, f'{before}{json.dumps({**row, "changed": changed})}\n')


@one_line_errors('run.py')
def main(argv: Sequence[str]) -> int:
    """Trains from flags to summary; returns the exit code."""
    exit_with_launcher(_END_SECONDS)  # if pipelines/api.py started it
    with StartUp() as start_up:
        config, launch = prepare(argv, start_up)
        path = launch.run_dir or default_path(config.environment.game, config.preset)
        with RunDirectory.open(path, launch.resume) as directory:
            start_up.directory = directory
            write_config(config, directory, launch.resume)
            print(f'run directory: {directory.path}', flush=True)
            from pipelines.launch import launcher

            start_up.launched = True
            return launcher.launch(config, launch, directory, start_up.remote)


if __name__ == '__main__':
    protect_output()
    sys.exit(main(sys.argv[1:]))
