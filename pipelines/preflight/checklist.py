"""All checks of a run before it writes a file, in order."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import tree

from agents.config import BUILTIN, FACTORY, NetworkConfig
from agents.environments.errors import EnvironmentFailedError
from infra.flags import as_flag
from pipelines.errors import UsageError
from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.launch import Launch
from pipelines.preflight import attached_servers, engine, network, resources
from pipelines.preflight.trial import Trial


def require_fit(config: ExperimentConfig, launch: Launch, values: Mapping[str, Any]) -> None:
    """Checks that machine, agent, servers and engine can run the experiment.

    Args:
      config: the experiment.
      launch: how it is launched, with a local run directory.
      values: settings given on the command line.

    Raises:
      UsageError: a check fails.
    """
    require_freshness(config, launch, values)
    require_device(config, launch)
    warn_of_precision(config, launch)
    require_environment(config, values, launch.jobs.hang_seconds)
    require_agent(config, values)
    resources.require_room(config, launch)
    network.require_ports(config, launch)
    network.require_tls(launch)
    attached_servers.require_servers(config, launch)
    require_engine(config, launch)


def require_restorable(launch: Launch) -> None:
    """Checks that a resumed run starts all its servers or attaches to all of them.

    Raises:
      UsageError: it attaches to one kind only.
    """
    given = [kind for kind in ('parameter', 'replay') if getattr(launch, f'{kind}_addresses')]
    if launch.resume and len(given) == 1:
        raise UsageError(
            f'--{given[0]}_addresses: contradicts --resume, since running servers cannot load a'
            ' checkpoint. Fix: omit it to resume from the checkpoint with new servers, or pass both'
            ' --parameter_addresses and --replay_addresses of servers that hold the state of this'
            ' run.'
        )


def require_freshness(config: ExperimentConfig, launch: Launch, values: Mapping[str, Any]) -> None:
    """Checks that the shards accept the gradients of a lone learner, however far away it is.

    Raises:
      UsageError: its oldest ones exceed `max_staleness`, unless the run began with these settings.
    """
    names = {'max_staleness', 'learner_pull_period', 'overlap_push', 'pushes_in_flight'}
    if launch.resume and names.isdisjoint(values):  # an earlier version accepted them
        return
    learner, most = config.learner, config.parameter_server.max_staleness
    # A bundle's learner pulls before each of its turns, which are short.
    pulls = 0 if config.run.topology == 'bundled' else learner.learner_pull_period - 1
    pushes = learner.pushes_in_flight if learner.overlap_push else 0
    # Later pushes may overtake one: `LearnerConfig.pushes_in_flight`.
    oldest = pulls + max(0, 2 * pushes - 1)
    if oldest <= most:
        return
    causes = [f'--learner_pull_period {learner.learner_pull_period}'] * bool(pulls)
    causes += [f'--overlap_push --pushes_in_flight {pushes}'] * bool(pushes)
    others = 'lower the other(s)' + ' or add --no-overlap_push' * bool(pushes)
    raise UsageError(
        f'--max_staleness {most}: the shards would reject gradients of every learner, which are up'
        f' to {oldest} update(s) old with {" and ".join(causes)}. Fix: raise it to {oldest},'
        f' more for several learners, or {others}.'
    )


def require_engine(config: ExperimentConfig, launch: Launch) -> None:
    """Checks that the engine can run the jobs.

    Raises:
      UsageError: it cannot.
    """
    engine.require_jobs(config, launch)
    if launch.runner == 'DaskRunner':
        from pipelines.preflight.dask_cluster import require_cluster

        print(require_cluster(config, launch), flush=True)


def require_device(config: ExperimentConfig, launch: Launch) -> None:
    """Checks that this machine has the requested GPU, if the learners run on it.

    Raises:
      UsageError: the GPU does not exist.
    """
    if not (launch.engine.runs_locally and config.learner.learner_device.startswith('gpu')):
        return
    from agents import device

    try:
        device.require(config.learner.learner_device)
    except device.DeviceError as error:
        raise UsageError(str(error)) from error


def warn_of_precision(config: ExperimentConfig, launch: Launch) -> None:
    """Warns if this machine, which runs the learners, multiplies bfloat16 slowly."""
    if not launch.engine.runs_locally or config.network.precision != 'bfloat16':
        return
    from agents import device

    if not device.multiplies_bfloat16(config.learner.learner_device):
        print(
            '--precision bfloat16: slow on this processor (it has neither AVX512_BF16 nor AMX,'
            ' or TF_ENABLE_ONEDNN_OPTS is 0;'
            ' a gradient may take six times as long as with float32). Fix: --precision auto.',
            flush=True,
        )


def require_environment(
    config: ExperimentConfig, values: Mapping[str, Any], hang_seconds: float
) -> None:
    """Checks an environment outside Atari by a step in it, whose parts take `hang_seconds` at most.

    Raises:
      UsageError: it cannot be opened or used, or one of the `values` given on the command line
        configures no network for its observations.
    """
    if config.environment.is_atari:
        return
    try:
        frame = Trial(config.environment, config.run.seed).frames(hang_seconds)
    except EnvironmentFailedError as error:
        flag = 'game' if 'game' in values else 'environment'
        raise UsageError(f'--{flag} {error}') from error
    depth = config.environment.frame_stack
    observation = tree.map_structure(lambda part: part.stacked(depth), frame)
    _require_layers(config, observation, values)


def _require_layers(config: ExperimentConfig, observation: Any, values: Mapping[str, Any]) -> None:
    """
    Raises:
      UsageError: a flag configures layers that the network for such observations does not have.
    """
    of_convolutions = 'center_input', 'standardize_input', 'centralize_gradient', 'precision'
    given = [name for name in ('torso', *of_convolutions, 'dense_layers') if name in values]
    if values.get('precision') == 'auto':  # suits every network
        given.remove('precision')
    if not given or FACTORY.fullmatch(config.agent.agent):  # see `require_agent`
        return
    from agents.networks import TORSOS, torsos_of

    torsos, joined = torsos_of(observation, config.network)
    has_effect = {
        'torso': TORSOS[config.network.torso] in torsos,
        **dict.fromkeys(of_convolutions, any(torso.convolutions for torso in torsos)),
        'dense_layers': not joined.convolutions,
    }
    builtin = config.network.q_network == BUILTIN
    for name in given:
        if not (builtin and has_effect[name]):
            shown = ', '.join(str(list(part.shape)) for part in tree.flatten(observation))
            raise UsageError(
                f'{as_flag(name, values[name])}: no effect on the network for observations {shown}.'
                ' Fix: omit it.'
            )


def require_agent(config: ExperimentConfig, values: Mapping[str, Any]) -> None:
    """Checks a custom agent or network by building it, which takes seconds.

    Raises:
      UsageError: it cannot be imported or trained, or one of the `values` given on the command line
        configures the built-in networks beside a custom agent.
    """
    custom = [each for each in (config.agent.agent, config.network.q_network) if ':' in each]
    if not custom:
        return
    if FACTORY.fullmatch(config.agent.agent):
        _require_own_network(config.agent.agent, values)
    print(f'trying {custom[0]} ...', flush=True)
    from agents.custom_agent import ForeignAgentError
    from agents.networks import NetworkError
    from pipelines.experiment import builders

    try:
        builders.try_agent(config)
    except ForeignAgentError as error:
        raise UsageError(f'--agent {error}') from error
    except NetworkError as error:
        raise UsageError(str(error)) from error


def _require_own_network(agent: str, values: Mapping[str, Any]) -> None:
    """
    Raises:
      UsageError: one of the `values` configures networks that a custom agent does not use.
    """
    network_settings = {field.name for field in dataclasses.fields(NetworkConfig)}
    for name, value in values.items():
        if name in network_settings or (name == 'actor_priorities' and value):
            raise UsageError(
                f'--{name}: no effect, since {agent} has its own network. Fix: omit --{name}.'
            )
