"""Train a DQN agent: `.venv/bin/python pipelines/run.py --runner=DirectRunner`."""

import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if __name__ == '__main__':  # this checkout's packages, whatever PYTHONPATH and the environment hold
    sys.path[: not sys.flags.safe_path] = [str(pathlib.Path(__file__).resolve().parents[1])]

from infra.addresses import reach_directly
from infra.disk import write_atomically
from infra.output import protect_output
from infra.process import exit_with_launcher
from pipelines.errors import UsageError, one_line_errors, unwritable
from pipelines.experiment import config as config_lib
from pipelines.experiment.config import ExperimentConfig
from pipelines.launch.interrupts import StartUp
from pipelines.monitoring import weights_and_biases
from pipelines.storage import provenance
from pipelines.storage.resuming import is_complete
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
    if launch.wandb_project is not None:
        weights_and_biases.require_ready(launch.wandb_project)
    # Checked before a new run claims its remote place; a run to resume must be fetched first.
    new = None if launch.resume else command_line.experiment(preset, values)
    launch = start_up.localized(launch)
    config = new
    if config is None:
        before = _before(launch)
        config = command_line.resumed(before, preset, values)
        changed = config_lib.changes(before, config)
        values = {name: after for name, (_, after) in changed.items()}
    checklist.require_fit(config, launch, values)
    return config, launch


def _before(launch: 'Launch') -> ExperimentConfig:
    """The experiment of the run to resume.

    Raises:
      UsageError: the run does not exist or cannot be read.
    """
    return config_lib.load(RunDirectory.existing(launch.run_dir or '').config_file)


def write_config(config: ExperimentConfig, launch: 'Launch', directory: RunDirectory) -> None:
    """Writes `config.json` and a line of `launches.jsonl`, unless the run cannot resume.

    Raises:
      UsageError: a file is not writable, no checkpoint readable, or nothing left to do.
    """
    try:
        row = {**provenance.describe(sys.orig_argv), 'engine': launch.runner}
        row |= {'resumed': launch.resume, 'changed': {}}
        row |= {'frames': 0, 'updates': 0, 'wall_seconds': 0.0}
        if launch.resume:
            row |= _resumption(config, directory)
        if launch.wandb_project is not None:
            before = provenance.launches(directory.launches_file)
            row['wandb'] = weights_and_biases.identity(launch.wandb_project, before)
        provenance.add_launch(directory.launches_file, row)
        write_atomically(directory.config_file, config_lib.to_json(config))
    except OSError as error:
        raise unwritable(directory.path, error) from error


def _resumption(config: ExperimentConfig, directory: RunDirectory) -> dict[str, Any]:
    """The progress of a run to resume, and the settings that the resumption changes.

    Raises:
      UsageError: no checkpoint is readable, or the run is at its budget and complete.
    """
    from pipelines.storage.checkpoints import readable_counters

    counters = readable_counters(directory)
    done = counters.get('agent_steps', 0)
    frames = done * config.environment.action_repeat
    budget = config.environment.budget_flag
    if done >= config.max_agent_steps and is_complete(directory):
        raise UsageError(
            f'{directory.path}: nothing is left to do ({frames:,} of'
            f' {budget} {config.run.max_frames:,}, evaluated and exported). Fix: raise {budget}, or'
            f' evaluate it again with {command("evaluate", directory.path)}.'
        )
    changed = config_lib.changes(config_lib.load(directory.config_file), config)
    seconds = counters.get('wall_seconds', 0.0)
    progress = {'frames': frames, 'updates': counters['updates'], 'wall_seconds': seconds}
    return {'changed': changed, **progress}


@one_line_errors('run.py')
def main(argv: Sequence[str]) -> int:
    """Trains from flags to summary; returns the exit code."""
    exit_with_launcher(_END_SECONDS)  # if pipelines/api.py started it
    with StartUp() as start_up:
        config, launch = prepare(argv, start_up)
        path = launch.run_dir or default_path(config.environment.game, config.preset)
        with RunDirectory.open(path, launch.resume) as directory:
            start_up.directory = directory
            write_config(config, launch, directory)
            print(f'run directory: {directory.path}', flush=True)
            from pipelines.launch import launcher

            start_up.launched = True
            return launcher.launch(config, launch, directory, start_up.remote)


if __name__ == '__main__':
    protect_output()
    sys.exit(main(sys.argv[1:]))
