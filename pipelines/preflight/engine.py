"""Checks the flags, files and addresses that an engine needs for the jobs of a run."""

import ipaddress
import os
import pathlib
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from infra.addresses import AddressError, reach_directly, split_address
from infra.disk import is_remote
from infra.flags import value_of
from pipelines.engines.catalog import SIDE_BY_SIDE, engine
from pipelines.errors import UsageError
from pipelines.experiment.job_settings import JobSettings

if TYPE_CHECKING:
    from pipelines.experiment.config import ExperimentConfig
    from pipelines.experiment.launch import Launch


_CONNECT_SECONDS = 5.0


def require_flags(runner: str, flags: Sequence[str]) -> None:
    """Checks that the flags required by the engine are set.

    Raises:
      UsageError: a required flag is missing.
    """
    chosen = engine(runner)
    for group in chosen.required:
        if not any(value_of(flag, flags) for flag in group):
            raise UsageError(
                f'--runner {runner}: {" or ".join(group)} is missing. Fix: add, for example,'
                f' {chosen.example}.'
            )


def require_jobs(config: 'ExperimentConfig', launch: 'Launch') -> None:
    """Checks flags, files and addresses of each job of the run.

    Raises:
      UsageError: a flag is missing or for a job of another topology; a file does not exist; an
        address is unreachable; or remote workers would look for the servers on their own machines.
    """
    if launch.actor_flags and 'actor' not in config.run.workers:
        raise UsageError(
            '--actor_flags: no such job in --topology bundled. Fix: use --learner_flags.'
        )
    if launch.one_job:
        _require_one_job(config, launch)
    if launch.jobs.element_seconds not in (0.0, JobSettings.element_seconds):
        _require_parts(launch)
    launch.jobs.sink()
    if launch.engine.runs_locally and launch.jobs.statistics_dir is not None:
        _require_writable(launch.jobs.statistics_dir)
    for kind in config.run.workers:
        flags = [*launch.beam_flags, *launch.flags_of(kind)]
        require_flags(launch.runner, flags)
        require_reachable(flags)
        _require_hints(launch.jobs.hints(kind), flags)
    attached = launch.parameter_addresses and launch.replay_addresses
    if launch.engine.always_remote and not attached and _means_this_machine(launch.host):
        raise UsageError(
            f'--runner {launch.runner}: workers cannot reach servers on {launch.host}. Fix: set'
            ' --host to an address of this machine that they reach, or attach to servers with'
            ' --parameter_addresses and --replay_addresses.'
        )


def _require_parts(launch: 'Launch') -> None:
    """
    Raises:
      UsageError: --element_seconds has no effect.
    """
    if not launch.engine.continues_elements:
        raise UsageError(
            f'--element_seconds {launch.jobs.element_seconds:g}: no effect on --runner'
            f' {launch.runner}, which runs an element in one go. Fix: omit it.'
        )


def _require_one_job(config: 'ExperimentConfig', launch: 'Launch') -> None:
    """
    Raises:
      UsageError: --one_job has no effect, the engine runs a job's steps or the elements of a step
        in turn, or flags are for one of two jobs.
    """
    if len(config.run.workers) == 1:
        raise UsageError('--one_job: a run of bundles is one job anyway. Fix: omit it.')
    if not launch.engine.side_by_side:
        raise UsageError(
            f'--one_job: --runner {launch.runner} may run the steps of a job in turn, so that the'
            f' learners would wait for the actors. Fix: omit it, or choose one of'
            f' {", ".join(SIDE_BY_SIDE)}.'
        )
    if launch.actor_flags or launch.learner_flags:
        raise UsageError(
            '--one_job: excludes --actor_flags and --learner_flags, since its machines have the'
            ' same flags. Fix: pass the flags directly, or say what workers need by --actor_ram,'
            ' --learner_ram and --learner_accelerator.'
        )
    for kind, count in config.run.workers.items():
        if launch.engine.elements_in_turn and count > 1:
            raise UsageError(
                f'--one_job: --runner {launch.runner} may run the {kind}s of a job in turn, and'
                f' there are {count}. Fix: omit it, or set --num_{kind}s 1.'
            )


def _require_writable(directory: str) -> None:
    """
    Raises:
      UsageError: workers on this machine could not write to this place.
    """
    if is_remote(directory):
        return
    path = pathlib.Path(directory).absolute()
    nearest = next(each for each in (path, *path.parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(
            f'--statistics_dir {directory}: {nearest} is no directory that can be written. Fix:'
            ' name another.'
        )


def _require_hints(hints: Mapping[str, str], flags: Sequence[str]) -> None:
    """
    Raises:
      UsageError: a hint is unreadable, or excluded by an option of Dataflow's.
    """
    if not hints:
        return
    from apache_beam.transforms import resources

    try:
        resources.parse_resource_hints(dict(hints))
    except ValueError as error:
        raise UsageError(
            f'--actor_ram, --learner_ram, --learner_accelerator: {error}. Fix: write memory as 4GB,'
            ' an accelerator as type:nvidia-l4;count:1;install-nvidia-driver.'
        ) from error
    for option in ('worker_accelerator', '--flexrs_goal'):
        if any(option in flag for flag in flags):
            named = ', '.join(hints.values())
            raise UsageError(
                f'{option}: excludes the hints of --actor_ram, --learner_ram and'
                f' --learner_accelerator ({named}). Fix: omit one or the other.'
            )


def _means_this_machine(host: str) -> bool:
    """Whether the name or address means the local machine on every machine."""
    try:
        address = ipaddress.ip_address(socket.gethostbyname(host))
    except OSError:
        return False  # unknown here: a later bind reports it
    return address.is_loopback or address.is_unspecified


def require_reachable(flags: Sequence[str]) -> None:
    """Checks the files and addresses in Beam's flags, and excludes the addresses from the proxy.

    Raises:
      UsageError: a file does not exist, or an address is unreachable.
    """
    scheduler = value_of('--dask_scheduler_file', flags)
    if scheduler and not os.path.isfile(scheduler):  # Dask would wait for ever
        raise UsageError(
            f'--dask_scheduler_file {scheduler}: does not exist. Fix: start `dask scheduler'
            f' --scheduler-file {scheduler}`, or correct the path.'
        )
    prism = value_of('--prism_location', flags)
    if prism and '://' not in prism and not os.path.isfile(prism):
        raise UsageError(
            f'--prism_location {prism}: does not exist. Fix: build Prism with `make prism` (see'
            ' docs/engines/portable.md).'
        )
    endpoint = value_of('--job_endpoint', flags)
    if endpoint and endpoint != 'embed':
        _require_listener('--job_endpoint', endpoint)
    pool = value_of('--environment_config', flags)
    if pool and value_of('--environment_type', flags) == 'EXTERNAL' and not pool.startswith('{'):
        _require_listener('--environment_config', pool)


def _require_listener(flag: str, address: str) -> None:
    try:
        socket.create_connection(split_address(address), _CONNECT_SECONDS).close()
    except AddressError as error:
        raise UsageError(f'{flag}: {error}') from error
    except OSError as error:
        raise UsageError(
            f'{flag} {address}: unreachable ({error}). Fix: start the server, or correct the'
            ' address.'
        ) from error
    reach_directly([address])
