"""What a run needs of the machine, checked before anything is written.

Memory for its replay and processes, disk for its checkpoints.
"""

import pathlib

from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.launch import Launch
from pipelines.storage.run_directory import RunDirectory
from pipelines.storage.space import require_disk, require_memory

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
    if launch.engine.runs_locally:
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
