"""What a run needs of the machine, checked before anything is written.

Memory for its replay and processes, disk for its checkpoints, free ports.
"""

import pathlib
import socket

from infra import tls
from pipelines.config import ExperimentConfig
from pipelines.errors import UsageError
from pipelines.options import Launch
from pipelines.run_directory import RunDirectory, require_disk, require_memory

# Measured with tests/benchmarks/benchmark_replay.py on Pong, rounded up: games with busier screens
# compress less, an uncompressed frame has 7,056 bytes.
BYTES_PER_TRANSITION = 3_000
# Resident memory, measured, rounded up: TensorFlow is most of it.
_BYTES_PER_WORKER = 800_000_000
_BYTES_PER_SERVER = 550_000_000
_BYTES_PER_JOB = 200_000_000
_BYTES_PER_ENVIRONMENT = 2_000_000  # an emulator, and its share of the Nature network's inference
_BYTES_PER_BATCHED_TRANSITION = 400_000  # of the Nature network's gradient
_BYTES_OF_LAUNCHER = 700_000_000
_KEPT_CHECKPOINTS = 3  # two complete ones and the one being written
_BYTES_WITHOUT_REPLAY = 300_000_000  # parameters, slots, logs, events


def memory_bytes(config: ExperimentConfig, launch: Launch) -> int:
    """Memory of the run's processes and replay on this machine, in bytes."""
    run = config.run
    total = _BYTES_OF_LAUNCHER + len(run.workers) * _BYTES_PER_JOB + servers_bytes(config, launch)
    if launch.engine.here:
        total += sum(run.workers.values()) * _BYTES_PER_WORKER
        total += run.num_actors * config.actor.envs_per_actor * _BYTES_PER_ENVIRONMENT
        total += run.num_learners * config.learner.batch_size * _BYTES_PER_BATCHED_TRANSITION
        if run.topology == 'bundled':  # bundles hold the replay themselves
            total += config.replay.replay_capacity * BYTES_PER_TRANSITION
    return total


def servers_bytes(config: ExperimentConfig, launch: Launch) -> int:
    """Memory of the servers that are started on this machine, in bytes."""
    total = 0
    if not launch.parameter_addresses:
        total += config.parameter_server.num_parameter_shards * _BYTES_PER_SERVER
    if launch.replay_addresses:
        return total
    if config.run.topology == 'bundled':
        return total + _BYTES_PER_SERVER  # of the telemetry
    total += config.replay.num_replay_shards * _BYTES_PER_SERVER
    return total + config.replay.replay_capacity * BYTES_PER_TRANSITION


def disk_bytes(config: ExperimentConfig, launch: Launch) -> int:
    """Disk of a run directory, in bytes."""
    saved = config.run.checkpoint_replay and config.run.topology != 'bundled'
    replay = config.replay.replay_capacity if saved and not launch.replay_addresses else 0
    return _KEPT_CHECKPOINTS * replay * BYTES_PER_TRANSITION + _BYTES_WITHOUT_REPLAY


def _kept_bytes(run_dir: pathlib.Path) -> int:
    """Disk that the checkpoints of a run to go on with occupy already, in bytes."""
    checkpoints = RunDirectory.existing(run_dir).latest_checkpoints()
    return sum(
        file.stat().st_size for path in checkpoints for file in path.rglob('*') if file.is_file()
    )


def require_room(config: ExperimentConfig, launch: Launch) -> None:
    """Checks that this machine can hold what of the run is on it.

    Raises:
      UsageError: too little memory or disk; the message says how much is there and needed.
    """
    run_dir = pathlib.Path(launch.run_dir or 'runs')
    require_memory(memory_bytes(config, launch))
    require_disk(
        run_dir,
        disk_bytes(config, launch) - (_kept_bytes(run_dir) if launch.resume else 0),
        'free some, choose a smaller --replay_capacity, or add --no-checkpoint_replay',
    )


def require_servers_room(config: ExperimentConfig, launch: Launch) -> None:
    """Checks that this machine can hold the servers by themselves.

    Raises:
      UsageError: too little memory; the message says how much is there and needed.
    """
    require_memory(
        servers_bytes(config, launch),
        'end other programs, or choose a smaller --replay_capacity, or fewer shards',
    )


def require_restorable(launch: Launch) -> None:
    """Checks that a run to go on with starts its servers itself, or attaches to all it had.

    Raises:
      UsageError: it attaches to some, which cannot be given a checkpoint to start from.
    """
    given = [kind for kind in ('parameter', 'replay') if getattr(launch, f'{kind}_addresses')]
    if launch.resume and len(given) == 1:
        raise UsageError(
            f'--{given[0]}_addresses alone contradicts --resume: a checkpoint cannot be restored'
            ' into servers that already run; leave it out to go on from the checkpoint with servers'
            ' of its own, or give --parameter_addresses and --replay_addresses of the servers that'
            ' have kept the state of this run.'
        )


def require_tls(launch: Launch) -> None:
    """Checks that the parameter shards to start will be let speak TLS to their own clients.

    Raises:
      UsageError: there is no certificate, or it will not be accepted at --host.
    """
    if launch.parameter_addresses or launch.tls_roots is None:
        return
    if launch.tls is None:
        raise UsageError(
            '--tls_roots: the parameter shards that are started speak no TLS; give'
            ' --tls_certificate and --tls_key, or --parameter_addresses of shards that do.'
        )
    try:
        tls.require_accepted(launch.tls, launch.tls_roots, launch.host)
    except tls.TlsError as error:
        raise UsageError(f'{error}.') from error


def require_ports(config: ExperimentConfig, launch: Launch) -> None:
    """Checks that ports asked for are free and as many as the shards, and the host this machine's.

    Raises:
      UsageError: a port is busy, their number is another than the shards', or `host` is wrong.
    """
    _require_host(launch)
    shards = {
        'parameter': config.parameter_server.num_parameter_shards,
        'replay': 1 if config.run.topology == 'bundled' else config.replay.num_replay_shards,
    }
    if both := set(launch.parameter_ports) & set(launch.replay_ports):
        raise UsageError(
            f'--parameter_ports and --replay_ports both name {min(both)}: give each shard its own.'
        )
    for kind, count in shards.items():
        ports = getattr(launch, f'{kind}_ports')
        if ports and getattr(launch, f'{kind}_addresses'):
            raise UsageError(
                f'--{kind}_ports contradicts --{kind}_addresses: give ports to start servers, or'
                ' addresses of servers that already run.'
            )
        if ports and not len(ports) == len(set(ports)) == count:
            raise UsageError(f'--{kind}_ports {ports}: {count} different ones are needed.')
        for port in ports:
            _require_free(kind, port)


def _require_host(launch: Launch) -> None:
    if launch.parameter_addresses and launch.replay_addresses:
        return  # nothing will listen
    try:
        socket.create_server((launch.host, 0)).close()
    except OSError as error:
        raise UsageError(
            f'--host {launch.host}: not an IPv4 address of this machine ({error}).'
        ) from error


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
