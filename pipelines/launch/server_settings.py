"""Experiment and launch options in, configuration of the cluster out."""

import pathlib

from infra.cluster import ClusterConfig
from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.frames import trajectory_spec
from pipelines.experiment.launch import Launch
from pipelines.storage.run_directory import SHARD_CHECKPOINTS


def cluster_config(
    config: ExperimentConfig, launch: Launch, directory: pathlib.Path
) -> ClusterConfig:
    """The servers of an experiment."""
    return ClusterConfig(
        run_directory=directory,
        parameter_server=config.parameter_server,
        replay=config.served_replay,
        trajectory=trajectory_spec(config),
        batch_size=config.learner.batch_size,
        experience=not config.run.replay_in_workers,
        host=launch.host,
        replay_checkpoint_directory=directory / SHARD_CHECKPOINTS,
        parameter_addresses=launch.parameter_addresses,
        replay_addresses=launch.replay_addresses,
        parameter_ports=launch.parameter_ports,
        replay_ports=launch.replay_ports,
        tls=launch.tls,
    )
