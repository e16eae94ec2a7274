"""Checks memory for the processes and the replay of a run, and disk for its checkpoints."""

import pathlib

from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.launch import Launch
from pipelines.storage.run_directory import RunDirectory
from pipelines.storage.space import require_disk, require_memory

# Measured with tests/benchmarks/benchmark_replay.py on Pong, rounded up, since games with busier
# screens compress less. Of 84 x 84 pixels, whose frame has 7,056 bytes uncompressed. Measured in
# runs of Pong: 1,900 bytes, and 1,130 of 42 x 42 pixels.
BYTES_PER_TRANSITION = 3_000
_BYTES_WITHOUT_PICTURE = 1_200
_MEASURED_SIZE = 84
# Resident memory, mostly TensorFlow; measured, rounded up.
_BYTES_PER_WORKER = 800_000_000
_BYTES_PER_SERVER = 550_000_000
_BYTES_PER_JOB = 200_000_000
_BYTES_PER_ENVIRONMENT = 2_000_000  # emulator and its share of Nature inference
_BYTES_PER_BATCHED_TRANSITION = 400_000  # gradient of the Nature network
_BYTES_OF_LAUNCHER = 700_000_000
_BYTES_OF_EVALUATOR = 600_000_000
_KEPT_CHECKPOINTS = 3  # two complete ones and the one being written
_BYTES_WITHOUT_REPLAY = 300_000_000  # parameters, slots, logs, events


def memory_bytes(config: ExperimentConfig, launch: Launch) -> int:
    """Memory of the run's processes and replay on this machine, in bytes."""
    run, servers = config.run, servers_bytes(launch.started(config), launch)
    total = _BYTES_OF_LAUNCHER + len(run.workers) * _BYTES_PER_JOB + servers
    total += _BYTES_OF_EVALUATOR  # at the end in any case, while the workers end
    if launch.engine.runs_locally:
        total += sum(run.workers.values()) * _BYTES_PER_WORKER
        total += run.num_actors * config.actor.envs_per_actor * _BYTES_PER_ENVIRONMENT
        total += run.num_learners * config.learner.batch_size * _BYTES_PER_BATCHED_TRANSITION
        if run.replay_in_workers:
            total += replay_bytes(config)
    return total


def servers_bytes(config: ExperimentConfig, launch: Launch) -> int:
    """Memory of the servers of an experiment on this machine, in bytes."""
    total = 0
    if not launch.parameter_addresses:
        total += config.parameter_server.num_parameter_shards * _BYTES_PER_SERVER
    if launch.replay_addresses:
        return total
    if config.run.replay_in_workers:
        return total + _BYTES_PER_SERVER  # telemetry
    total += config.replay.num_replay_shards * _BYTES_PER_SERVER
    return total + replay_bytes(config)


def replay_bytes(config: ExperimentConfig) -> int:
    """Memory of a full replay, in bytes."""
    environment = config.environment
    scale = (environment.screen_size / _MEASURED_SIZE) ** 2 if environment.is_atari else 1.0
    picture = BYTES_PER_TRANSITION - _BYTES_WITHOUT_PICTURE
    return round(config.replay.replay_capacity * (_BYTES_WITHOUT_PICTURE + scale * picture))


def disk_bytes(config: ExperimentConfig, launch: Launch) -> int:
    """Disk space of a run directory, in bytes."""
    saved = config.run.checkpoint_replay and not config.run.replay_in_workers
    replay = replay_bytes(config) if saved and not launch.replay_addresses else 0
    return _KEPT_CHECKPOINTS * replay + _BYTES_WITHOUT_REPLAY


def _kept_bytes(run_dir: pathlib.Path) -> int:
    """Disk space that existing checkpoints of a resumed run occupy, in bytes."""
    checkpoints = RunDirectory.existing(run_dir).latest_checkpoints()
    return sum(
        file.stat().st_size for path in checkpoints for file in path.rglob('*') if file.is_file()
    )


def require_room(config: ExperimentConfig, launch: Launch) -> None:
    """Checks that this machine has the memory and disk space for its part of the run.

    Raises:
      UsageError: memory or disk space is insufficient.
    """
    run_dir = pathlib.Path(launch.run_dir or 'runs')
    require_memory(memory_bytes(config, launch))
    require_disk(
        run_dir,
        disk_bytes(config, launch) - (_kept_bytes(run_dir) if launch.resume else 0),
        'free some, choose a smaller --replay_capacity, or add --no-checkpoint_replay',
    )


def require_servers_room(config: ExperimentConfig, launch: Launch) -> None:
    """Checks that this machine has the memory for the servers alone.

    Raises:
      UsageError: memory is insufficient.
    """
    require_memory(
        servers_bytes(config, launch),
        'end other programs, or choose a smaller --replay_capacity, or fewer shards',
    )
