"""A run's directory with one checkpoint of a new network, as evaluation and export read it."""

import contextlib
import pathlib
from collections.abc import Iterator

from pipelines.experiment import builders
from pipelines.experiment import config as config_lib
from pipelines.experiment.config import ExperimentConfig
from pipelines.storage.checkpoints import Checkpoints
from pipelines.storage.run_directory import RunDirectory
from tests.support import parameter_servers


@contextlib.contextmanager
def active(path: pathlib.Path, config: ExperimentConfig, updates: int = 7) -> Iterator[None]:
    """Writes configuration and checkpoint through real parameter shards; locked in the block."""
    policy = builders.build_policy(config)
    with RunDirectory.open(path) as directory, contextlib.ExitStack() as stack:
        directory.config_file.write_text(config_lib.to_json(config))
        shards = stack.enter_context(parameter_servers.serve(config.parameter_server))
        addresses = [shard.address for shard in shards]
        layout = builders.layout_of(policy)
        client = stack.enter_context(parameter_servers.connect(addresses, layout))
        client.initialise(policy.parameters())
        counters = {'updates': updates, 'agent_steps': 100, 'wall_seconds': 60.0}
        Checkpoints(directory, config).save(client, (), counters)
        yield


def write(path: pathlib.Path, config: ExperimentConfig) -> None:
    """Writes an ended run."""
    with active(path, config):
        pass
