"""Train an Atari agent: `python pipelines/run.py --runner=DirectRunner` (see `--help`)."""

import sys
from collections.abc import Sequence

from agents.environment import UnknownGameError, rom_id
from pipelines import config as config_lib
from pipelines import options, sizing
from pipelines.config import ExperimentConfig
from pipelines.errors import UsageError
from pipelines.run_directory import RunDirectory, default_path, write_atomically


def prepare(argv: Sequence[str]) -> tuple[ExperimentConfig, options.Launch]:
    """Reads the command line and checks everything that can be checked before a file is written.

    Raises:
      UsageError: a flag, a value, or the machine is unfit; the message names it and the remedy.
    """
    launch, preset, values = options.parse(argv)
    if launch.resume:
        directory = RunDirectory.existing(launch.run_dir or '')
        config = options.resumed(config_lib.load(directory.config_file), preset, values)
    else:
        config = options.experiment(preset, values)
    try:
        game = rom_id(config.environment.game)
    except UnknownGameError as error:
        raise UsageError(f'--game: {error}') from error
    config = config_lib.replace(config, {'game': game})
    sizing.require_room(config, launch)
    sizing.require_ports(config, launch)
    sizing.require_servers(launch.parameter_addresses + launch.replay_addresses)
    return config, launch


def main(argv: Sequence[str]) -> int:
    """Runs a training from flags to summary; returns the exit code."""
    try:
        config, launch = prepare(argv)
        path = launch.run_dir or default_path(config.environment.game, config.preset)
        with RunDirectory.open(path, launch.resume) as directory:
            write_atomically(directory.config_file, config_lib.to_json(config))
            print(f'run directory: {directory.path}')
            from pipelines import launcher  # TensorFlow takes seconds: a wrong flag need not wait

            return launcher.launch(config, launch, directory)
    except UsageError as error:
        print(f'run.py: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
