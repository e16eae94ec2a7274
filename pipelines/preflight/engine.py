"""What an engine must be given for the jobs of a run: flags, files and addresses, checked first."""

import ipaddress
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from infra.addresses import AddressError, reach_directly, split_address
from infra.flags import value_of
from pipelines.engines.catalog import engine
from pipelines.errors import UsageError

if TYPE_CHECKING:
    from pipelines.experiment.config import ExperimentConfig
    from pipelines.experiment.launch import Launch


_CONNECT_SECONDS = 5.0


def require_flags(runner: str, flags: Sequence[str]) -> None:
    """Checks that the user has given the flags without which the engine cannot run a job.

    Raises:
      UsageError: one is missing.
    """
    chosen = engine(runner)
    for group in chosen.required:
        if not any(value_of(flag, flags) for flag in group):
            raise UsageError(f'--runner {runner} needs {" or ".join(group)}: {chosen.example}')


def require_jobs(config: 'ExperimentConfig', launch: 'Launch') -> None:
    """Checks what the engine is given for each job of the run.

    Raises:
      UsageError: a flag is missing or for a job that there is not; there is no such file; no server
        listens at an address; workers on other machines are to reach servers on this one's own.
    """
    if launch.actor_flags and 'actor' not in config.run.workers:
        raise UsageError(
            '--actor_flags: there is no such job in --topology bundled; give --learner_flags.'
        )
    for kind in config.run.workers:
        flags = [*launch.beam_flags, *launch.flags_of(kind)]
        require_flags(launch.runner, flags)
        require_reachable(flags)
    attached = launch.parameter_addresses and launch.replay_addresses
    if launch.engine.always_remote and not attached and _means_this_machine(launch.host):
        raise UsageError(
            f'--runner {launch.runner}: its workers do not reach servers on {launch.host}; give'
            ' --host, an address of this machine that they reach, or --parameter_addresses and'
            ' --replay_addresses of servers that run elsewhere.'
        )


def _means_this_machine(host: str) -> bool:
    """Whether every machine takes the name or address for itself."""
    try:
        address = ipaddress.ip_address(socket.gethostbyname(host))
    except OSError:
        return False  # not known here: what listens there fails, and says so
    return address.is_loopback or address.is_unspecified


def require_reachable(flags: Sequence[str]) -> None:
    """Checks the files and addresses in Beam's own flags; the addresses are reached by no proxy.

    Raises:
      UsageError: there is no such file, or no server listens at an address.
    """
    scheduler = value_of('--dask_scheduler_file', flags)
    if scheduler and not os.path.isfile(scheduler):  # Dask would wait for it for ever
        raise UsageError(f'--dask_scheduler_file {scheduler}: no such file.')
    prism = value_of('--prism_location', flags)
    if prism and '://' not in prism and not os.path.isfile(prism):
        raise UsageError(f'--prism_location {prism}: no such file; see docs/engines/portable.md.')
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
            f'{flag} {address}: nobody answers ({error}); start it first, or correct the address.'
        ) from error
    reach_directly([address])
