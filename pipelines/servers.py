"""Run the servers of a run to attach to: `.venv/bin/python pipelines/servers.py --host HOST ...`.

In: the run's flags. Out: replay and parameter shards on this machine until a signal, and the flags
with which the run attaches. Servers are for one run; a shard that dies restarts from its saved
state. With `--config_dir DIR` it only writes the shards' configurations, for another supervisor to
start them (infra/kubernetes, infra/systemd).
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence

if __name__ == '__main__':  # this checkout's packages, whatever PYTHONPATH and the environment hold
    sys.path[: not sys.flags.safe_path] = [str(pathlib.Path(__file__).resolve().parents[1])]

from infra.cluster import (
    PARAMETER_SERVER,
    REPLAY,
    Cluster,
    ClusterError,
    write_settings,
)
from infra.disk import is_remote
from infra.flags import Parser, nonempty
from infra.output import protect_output
from pipelines.errors import UsageError, one_line_errors, unwritable
from pipelines.experiment import command_line
from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.launch import Launch
from pipelines.launch.interrupts import Ended, handled, raise_ended
from pipelines.launch.server_settings import cluster_config
from pipelines.preflight import network, resources
from pipelines.storage.run_directory import RunDirectory, default_path
from pipelines.storage.space import temporary_files

_POLL_SECONDS = 0.5


def serve(config: ExperimentConfig, launch: Launch, directory: pathlib.Path) -> int:
    """Runs servers until a signal arrives; returns the exit code.

    Raises:
      ClusterError: a server does not start or fails again and again.
      UsageError: no temporary directory exists.
    """
    print(f'starting servers, logs in {directory / "logs"} ...', file=sys.stderr, flush=True)
    try:
        with handled(raise_ended), temporary_files():
            servers = cluster_config(config, launch, directory)
            own = dataclasses.replace(servers, state_directory=directory / 'servers' / 'state')
            with Cluster(own) as cluster:
                print(_attaching_flags(cluster), flush=True)
                while True:
                    cluster.check()
                    for text in cluster.news():
                        print(f'servers.py: {text}', file=sys.stderr, flush=True)
                    time.sleep(_POLL_SECONDS)
    except Ended:
        return 0


def _attaching_flags(cluster: Cluster) -> str:
    """The flags with which a run attaches."""
    # With bundles the telemetry's server is the only one; a run names it as its replay.
    replay = cluster.replay_addresses or (cluster.telemetry_address,)
    return (
        f'--parameter_addresses={",".join(cluster.parameter_addresses)}'
        f' --replay_addresses={",".join(replay)}'
    )


def write_configurations(config: ExperimentConfig, launch: Launch, directory: pathlib.Path) -> None:
    """Writes `replay.json` and `parameter_server.json` and prints their paths.

    Raises:
      UsageError: the directory cannot be written.
    """
    servers = cluster_config(config, launch, directory)
    try:
        for component in (REPLAY, PARAMETER_SERVER):
            print(write_settings(servers, component, directory))
    except OSError as error:
        raise unwritable(f'--config_dir {directory}', error, 'name another directory') from error


def _prepare(argv: Sequence[str]) -> tuple[ExperimentConfig, Launch]:
    """Reads and checks the command line.

    Raises:
      UsageError: a flag or value is invalid, or has a meaning for runs only.
    """
    launch, preset, values = command_line.parse(argv)
    if launch.resume or launch.parameter_addresses or launch.replay_addresses:
        raise UsageError(
            '--resume, --parameter_addresses, --replay_addresses: for run.py only. Fix: leave them'
            ' out; servers.py starts new servers.'
        )
    if is_remote(launch.run_dir or ''):
        raise UsageError(
            f'--run_dir {launch.run_dir}: not on this machine. Fix: name a local directory for the'
            " servers' state and logs."
        )
    return command_line.experiment(preset, values), launch


def _config_dir(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Splits off the one flag that run.py lacks; prints its help before that of run.py."""
    parser = Parser(prog='servers.py', description=__doc__, add_help=False, allow_abbrev=False)
    parser.add_argument(
        '--config_dir',
        type=nonempty,
        help='Write replay.json and parameter_server.json here and start nothing.',
    )
    own, others = parser.parse_known_args(argv)
    if {'-h', '--help'} & set(others):
        print(parser.format_help(), end='\nand the flags of run.py:\n\n')
    return own.config_dir, others


@one_line_errors('servers.py')
def main(argv: Sequence[str]) -> int:
    """Runs the servers of an experiment; returns the exit code."""
    try:
        config_dir, argv = _config_dir(argv)
        config, launch = _prepare(argv)
        if config_dir is not None:
            launch = dataclasses.replace(launch, parameter_ports=(), replay_ports=())
            write_configurations(config, launch, pathlib.Path(config_dir))
            return 0
        resources.require_servers_room(config, launch)
        network.require_ports(config, launch)
        network.require_tls(launch)
        path = launch.run_dir or default_path('servers', config.preset)
        with RunDirectory.open(path, False) as directory:
            return serve(config, launch, directory.path)
    except ClusterError as error:
        print(f'servers.py: {error}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    protect_output()
    sys.exit(main(sys.argv[1:]))
