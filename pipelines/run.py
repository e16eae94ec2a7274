"""Train an Atari agent: `python pipelines/run.py --runner=DirectRunner` (see `--help`)."""

import contextlib
import dataclasses
import io
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines import config as config_lib
from pipelines.config import ExperimentConfig
from pipelines.errors import UsageError
from pipelines.files import write_atomically
from pipelines.run_directory import RunDirectory, default_path, is_remote

# Beam and TensorFlow take seconds to import: below, where signals are watched and flags are right.
if TYPE_CHECKING:
    from pipelines.options import Launch
    from pipelines.remote_run import RemoteRun


class StartUp:
    """Until the launcher watches signals itself: SIGINT or SIGTERM ends the process at once.

    A context manager. Nothing of a new run is left behind. No exception is raised, because one in
    the middle of an import comes out of it as another.

    Attributes:
      directory: the run's, None: not opened yet.
      remote: its remote place, given free at the end; None: it has none.
    """

    def __init__(self) -> None:
        self.directory: RunDirectory | None = None
        self.remote: RemoteRun | None = None

    def __enter__(self) -> 'StartUp':
        self._before = {
            number: signal.signal(number, self._end) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        if self.remote is not None:
            self.remote.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def localized(self, launch: 'Launch') -> 'Launch':
        """The same launch in a local directory; a remote one is claimed, and fetched to go on with.

        Raises:
          UsageError: it cannot be.
        """
        url = launch.run_dir or ''
        if not is_remote(url):
            return launch
        from pipelines.remote_run import RemoteRun

        print(f'asking {url} ...', flush=True)
        self.remote = RemoteRun(url, launch.work_dir, launch.beam_flags)
        local = self.remote.open(launch.resume, lambda text: print(text, flush=True))
        return dataclasses.replace(launch, run_dir=str(local))

    def _end(self, number: int, _frame: Any) -> None:
        if self.directory is not None and not self.directory.summary_file.exists():
            # As for a mistake of the user's: the directory goes, if it is new and unused.
            self.directory.__exit__(UsageError, UsageError(signal.Signals(number).name), None)
        if self.remote is not None:
            self.remote.close()
        os._exit(128 + number)


def prepare(argv: Sequence[str], start_up: StartUp) -> tuple[ExperimentConfig, 'Launch']:
    """Reads the command line and checks everything that can be checked before a file is written.

    Of a remote run the place is claimed, and the run to go on with fetched.

    Raises:
      UsageError: a flag, a value, or the machine is unfit; the message names it and the remedy.
    """
    from agents.environment import UnknownGameError, rom_id
    from pipelines import attached, options, sizing

    launch, preset, values = options.parse(argv)
    sizing.require_restorable(launch)
    launch = start_up.localized(launch)
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
    _require_device(config, launch)
    _require_agent(config, values)
    sizing.require_room(config, launch)
    sizing.require_ports(config, launch)
    sizing.require_tls(launch)
    attached.require_servers(config, launch)
    _require_engine(config, launch)
    return config, launch


def _require_engine(config: ExperimentConfig, launch: 'Launch') -> None:
    """Checks that what is to run the jobs is there and fit.

    Raises:
      UsageError: it is not.
    """
    from pipelines import engines

    engines.require_jobs(config, launch)
    if launch.runner == 'DaskRunner':
        from pipelines.dask_cluster import require_cluster

        print(require_cluster(config, launch), flush=True)


def _require_device(config: ExperimentConfig, launch: 'Launch') -> None:
    """Checks that the accelerator asked for is on this machine, if the learners are.

    Raises:
      UsageError: it is not.
    """
    if not (launch.engine.here and config.learner.learner_device.startswith('gpu')):
        return
    from agents import device

    try:
        device.require(config.learner.learner_device)
    except device.DeviceError as error:
        raise UsageError(str(error)) from error


def _require_agent(config: ExperimentConfig, values: Mapping[str, Any]) -> None:
    """Checks an agent of the user's own, which takes seconds: TensorFlow and the agent are built.

    Raises:
      UsageError: it cannot be imported, or not be trained here, or one of the `values` given on the
        command line is of this project's own networks.
    """
    from agents.config import FACTORY, NetworkConfig

    if not FACTORY.fullmatch(config.agent.agent):
        return
    of_networks = {field.name for field in dataclasses.fields(NetworkConfig)}
    for name, value in values.items():
        if name in of_networks or (name == 'actor_priorities' and value):
            raise UsageError(
                f'--{name}: {config.agent.agent} brings a network of its own, to which this means'
                ' nothing; leave it away.'
            )
    print(f'trying {config.agent.agent} ...', flush=True)
    with contextlib.redirect_stderr(io.StringIO()):
        from agents.foreign import ForeignAgentError
        from pipelines import agent
    try:
        agent.try_agent(config)
    except ForeignAgentError as error:
        raise UsageError(f'--agent {error}') from error


def _write_config(config: ExperimentConfig, directory: RunDirectory, resume: bool) -> None:
    """Writes `config.json`; that of a run which cannot go on stays as it is.

    Raises:
      UsageError: it cannot be written, no checkpoint can be read, or nothing is left to do.
    """
    if resume:
        from pipelines.checkpoints import readable_counters

        done = readable_counters(directory).get('agent_steps', 0)
        if done >= config.max_agent_steps:
            raise UsageError(
                f'{directory.path}: {done * config.environment.action_repeat} frames are done, the'
                f' budget is {config.run.max_frames}; raise --max_frames to go on.'
            )
    try:
        write_atomically(directory.config_file, config_lib.to_json(config))
    except OSError as error:
        raise UsageError(f'{directory.config_file}: cannot be written ({error}).') from error


def main(argv: Sequence[str]) -> int:
    """Runs a training from flags to summary; returns the exit code."""
    try:
        with StartUp() as start_up:
            config, launch = prepare(argv, start_up)
            path = launch.run_dir or default_path(config.environment.game, config.preset)
            with RunDirectory.open(path, launch.resume) as directory:
                start_up.directory = directory
                _write_config(config, directory, launch.resume)
                print(f'run directory: {directory.path}', flush=True)
                # Gym, which TF-Agents imports, prints a notice of its own end.
                with contextlib.redirect_stderr(io.StringIO()):
                    from pipelines import launcher

                return launcher.launch(config, launch, directory, start_up.remote)
    except UsageError as error:
        print(f'run.py: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
