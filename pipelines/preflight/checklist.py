"""Everything that is refused before a file is written, in order."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipelines.errors import UsageError
from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.launch import Launch
from pipelines.preflight import attached_servers, engine, network, resources


def require_fit(config: ExperimentConfig, launch: Launch, values: Mapping[str, Any]) -> None:
    """Checks what this machine, the agent, the servers and the engine must be or have for a run.

    Args:
      config: the experiment.
      launch: how it is launched, in a local directory.
      values: settings given on the command line.

    Raises:
      UsageError: something is unfit; the message names it and the remedy.
    """
    require_device(config, launch)
    require_agent(config, values)
    resources.require_room(config, launch)
    network.require_ports(config, launch)
    network.require_tls(launch)
    attached_servers.require_servers(config, launch)
    require_engine(config, launch)


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


def require_engine(config: ExperimentConfig, launch: Launch) -> None:
    """Checks that what is to run the jobs is there and fit.

    Raises:
      UsageError: it is not.
    """
    engine.require_jobs(config, launch)
    if launch.runner == 'DaskRunner':
        from pipelines.preflight.dask_cluster import require_cluster

        print(require_cluster(config, launch), flush=True)


def require_device(config: ExperimentConfig, launch: Launch) -> None:
    """Checks that the accelerator asked for is on this machine, if the learners are.

    Raises:
      UsageError: it is not.
    """
    if not (launch.engine.runs_locally and config.learner.learner_device.startswith('gpu')):
        return
    from agents import device

    try:
        device.require(config.learner.learner_device)
    except device.DeviceError as error:
        raise UsageError(str(error)) from error


def require_agent(config: ExperimentConfig, values: Mapping[str, Any]) -> None:
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
    from agents.custom_agent import ForeignAgentError
    from pipelines.experiment import builders

    try:
        builders.try_agent(config)
    except ForeignAgentError as error:
        raise UsageError(f'--agent {error}') from error
