"""What a run needs of the machine, checked before anything is written.

Memory for its replay and processes, disk for its checkpoints, free ports, servers that answer.
"""

import pathlib
import socket
from collections.abc import Sequence

from pipelines.config import ExperimentConfig
from pipelines.errors import UsageError
from pipelines.options import Launch
from pipelines.run_directory import require_disk, require_memory

# Measured with tests/benchmarks/benchmark_replay.py on Pong, rounded up: games with busier screens
# compress less, an uncompressed frame has 7,056 bytes.
BYTES_PER_TRANSITION = 3_000
_BYTES_PER_PROCESS = 600_000_000  # TensorFlow, its buffers and a batch
_KEPT_CHECKPOINTS = 3  # two complete ones and the one being written
_CONNECT_SECONDS = 5.0
_BYTES_WITHOUT_REPLAY = 200_000_000  # parameters, slots, logs, events


def memory_bytes(config: ExperimentConfig) -> int:
    """Memory of a run on one machine, in bytes."""
    run = config.run
    processes = run.num_actors + run.num_learners + config.parameter_server.num_parameter_shards
    return config.replay.replay_capacity * BYTES_PER_TRANSITION + processes * _BYTES_PER_PROCESS


def disk_bytes(config: ExperimentConfig) -> int:
    """Disk of a run directory, in bytes."""
    replay = config.replay.replay_capacity if config.run.checkpoint_replay else 0
    return _KEPT_CHECKPOINTS * replay * BYTES_PER_TRANSITION + _BYTES_WITHOUT_REPLAY


def require_room(config: ExperimentConfig, launch: Launch) -> None:
    """Checks that this machine can hold the run, when the run's boxes are on this machine.

    Raises:
      UsageError: too little memory or disk; the message says how much is there and needed.
    """
    if launch.runner != 'DirectRunner' or launch.replay_addresses:
        return
    require_memory(memory_bytes(config))
    require_disk(
        pathlib.Path(launch.run_dir or 'runs'),
        disk_bytes(config),
        'free some, choose a smaller --replay_capacity, or add --no-checkpoint_replay',
    )


def require_ports(config: ExperimentConfig, launch: Launch) -> None:
    """Checks that ports asked for are free and as many as the shards.

    Raises:
      UsageError: a port is busy, or their number is another than the shards'.
    """
    shards = {
        'parameter': config.parameter_server.num_parameter_shards,
        'replay': 1 if config.run.topology == 'bundled' else config.replay.num_replay_shards,
    }
    for kind, count in shards.items():
        ports = getattr(launch, f'{kind}_ports')
        if ports and getattr(launch, f'{kind}_addresses'):
            raise UsageError(
                f'--{kind}_ports contradicts --{kind}_addresses: give ports to start servers, or'
                ' addresses of servers that already run.'
            )
        if ports and len(set(ports)) != count:
            raise UsageError(f'--{kind}_ports {ports}: {count} different ones are needed.')
        for port in ports:
            _require_free(kind, port)


def _require_free(kind: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('', port))
        except OSError as error:
            raise UsageError(
                f'--{kind}_ports: port {port} is busy ({error.strerror}); choose another, or leave'
                ' the flag out.'
            ) from error


def require_servers(addresses: Sequence[str]) -> None:
    """Checks that somebody listens at each `host:port`.

    Raises:
      UsageError: nobody does.
    """
    for address in addresses:
        host, _, port = address.rpartition(':')
        try:
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        except OSError as error:
            raise UsageError(
                f'{address}: no server answers ({error}); start it first, or correct the address.'
            ) from error
