"""Servers by themselves: `python pipelines/servers.py --host 10.0.0.1 ...`, for runs to attach to.

In: the flags that the run will be given. Out: replay and parameter shards on this machine until
SIGINT or SIGTERM, and the flags that lead a run to them. One start serves one run; a parameter
shard that dies takes what it has learned with it, and ends them all: the run has its checkpoints.
"""

import pathlib
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from infra.cluster import Cluster, ClusterConfig, ClusterError
from pipelines import options, sizing
from pipelines.config import ExperimentConfig
from pipelines.errors import UsageError
from pipelines.options import Launch
from pipelines.run_directory import RunDirectory, default_path

_POLL_SECONDS = 0.5


def cluster_config(
    config: ExperimentConfig, launch: Launch, directory: pathlib.Path, restore: bool = True
) -> ClusterConfig:
    """The servers of a run, or those it attaches to.

    Without `restore` there is no checkpoint that a server could start again from.
    """
    from pipelines import agent

    return ClusterConfig(
        run_directory=directory,
        parameter_server=config.parameter_server,
        replay=config.replay,
        trajectory=agent.trajectory_spec(config),
        batch_size=config.learner.batch_size,
        experience=config.run.topology != 'bundled',
        host=launch.host,
        replay_checkpoint_directory=directory / 'servers' / 'replay',
        parameter_addresses=launch.parameter_addresses,
        replay_addresses=launch.replay_addresses,
        parameter_ports=launch.parameter_ports,
        replay_ports=launch.replay_ports,
        restart_parameter_shards=restore,
    )


class _Stopped(BaseException):
    """SIGINT or SIGTERM came."""


def _raise_stopped(*_: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the servers end within seconds
    raise _Stopped


def serve(config: ExperimentConfig, launch: Launch, directory: pathlib.Path) -> int:
    """Serves until a signal comes; returns the exit code.

    Raises:
      ClusterError: a server cannot be started, or not be kept alive.
    """
    print(f'starting servers, logs in {directory / "logs"} ...', file=sys.stderr, flush=True)
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _raise_stopped)
        with Cluster(cluster_config(config, launch, directory, restore=False)) as cluster:
            print(_attaching_flags(cluster), flush=True)
            while True:
                cluster.check()
                time.sleep(_POLL_SECONDS)
    except _Stopped:
        return 0


def _attaching_flags(cluster: Cluster) -> str:
    """The flags that lead a run to the servers."""
    # With bundles the telemetry's server alone, which a run is given as its replay.
    replay = cluster.replay_addresses or (cluster.telemetry_address,)
    return (
        f'--parameter_addresses={",".join(cluster.parameter_addresses)}'
        f' --replay_addresses={",".join(replay)}'
    )


def _prepare(argv: Sequence[str]) -> tuple[ExperimentConfig, Launch]:
    """Reads and checks the command line.

    Raises:
      UsageError: a flag or a value is wrong, or it is one of a run's that this is not.
    """
    launch, preset, values = options.parse(argv)
    if launch.resume or launch.parameter_addresses or launch.replay_addresses:
        raise UsageError(
            '--resume, --parameter_addresses and --replay_addresses are for run.py: here new'
            ' servers are started.'
        )
    config = options.experiment(preset, values)
    sizing.require_servers_room(config, launch)
    sizing.require_ports(config, launch)
    return config, launch


def main(argv: Sequence[str]) -> int:
    """Starts the servers of an experiment and keeps them; returns the exit code."""
    try:
        config, launch = _prepare(argv)
        path = launch.run_dir or default_path('servers', config.preset)
        with RunDirectory.open(path, False) as directory:
            return serve(config, launch, directory.path)
    except (UsageError, ClusterError) as error:
        print(f'servers.py: {error}', file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
