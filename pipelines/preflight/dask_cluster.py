"""Checks a Dask cluster before a run: enough slots, the same code, servers reachable."""

import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import importlib
import pathlib
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.dask.dask_runner import DaskOptions

from agents.config import EnvironmentConfig
from agents.environments.errors import EnvironmentFailedError
from agents.environments.factory import open_environment
from infra.addresses import split_address
from infra.flags import value_of
from pipelines.engines.dask import host_names
from pipelines.errors import UsageError
from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.launch import LOOPBACK, Launch

if TYPE_CHECKING:
    import distributed


_CONNECT_SECONDS = 10.0
_ATTEMPTS = 5
_PACKAGES = ('agents', 'infra', 'pipelines')
# Options of Beam's Dask group that are not arguments of the Dask client.
_NOT_OF_CLIENT = ('npartitions', 'partition_size')


def _fingerprint() -> str:
    """Hash of this project's code as imported by this process."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        root = pathlib.Path(importlib.import_module(package).__path__[0])
        for file in sorted(root.rglob('*.py')):
            name = f'{package}/{file.relative_to(root).as_posix()}'
            digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


_CONFIGURATION = pathlib.Path(__file__).parents[2] / 'infra' / 'dask'


# Computed at import, because a Dask worker keeps the modules that it has imported.
_CODE = _fingerprint()


async def look_around(addresses: Sequence[str], dask_worker: Any = None) -> dict[str, Any]:
    """Runs on a worker, in its event loop.

    Returns:
      'code': version of its code; 'executing': number of elements that it runs, including those
      of disconnected clients; 'unreachable': addresses that it cannot reach; 'sampled': whether
      Dask samples its stack.
    """
    import dask

    reached = await asyncio.gather(*(_reaches(address) for address in addresses))
    return {
        'code': _CODE,
        'executing': dask_worker.state.executing_count,
        'unreachable': [address for address, yes in zip(addresses, reached) if not yes],
        'sampled': dask.config.get('distributed.worker.profile.enabled'),
    }


async def _reaches(address: str) -> bool:
    try:
        opening = asyncio.open_connection(*split_address(address))
        _, writer = await asyncio.wait_for(opening, _CONNECT_SECONDS / 2)
    except (TimeoutError, OSError):
        return False
    writer.close()
    return True


async def environment_fault(environment: EnvironmentConfig, most_seconds: float) -> str:
    """Runs on a worker: why it cannot open the environment; empty if it can."""

    def open_once() -> None:
        open_environment(environment, num_environments=1, seed=0).close()

    try:
        await asyncio.wait_for(asyncio.to_thread(open_once), most_seconds)
    except EnvironmentFailedError as error:
        return str(error)
    except TimeoutError:
        return (
            f'{environment.game}: did not open within {most_seconds:g} s. Fix: correct it, or raise'
            ' --hang_seconds.'
        )
    return ''


def require_cluster(config: ExperimentConfig, launch: Launch) -> str:
    """Checks that the cluster can run the workers; returns a line that describes it.

    Raises:
      UsageError: the cluster is unreachable, too small, or its workers are unfit.
    """
    with _connected(launch) as client, _probes(launch) as addresses:
        answers = _answers(client, addresses)
        _require_fit(answers)
        _require_environment(client, config.environment, launch.jobs.hang_seconds)
        slots = client.nthreads()
        busy = {worker: answer['executing'] for worker, answer in answers.items()}
        _require_slots(config, launch, client.scheduler_info()['address'], slots, busy)
        total = sum(slots.values())
        return (
            f'Dask: {len(slots)} worker processes, {total - sum(busy.values())} of {total} slots'
            f' free; dashboard {client.dashboard_link}{_advice(answers)}'
        )


def _advice(answers: Mapping[str, Any]) -> str:
    """A line about workers that Dask samples; empty without such workers."""
    sampled = sum(answer['sampled'] for answer in answers.values())
    if not sampled:
        return ''
    return (
        f'\nDask: {sampled} worker processes sample their stacks, which costs steps. Fix: start'
        f' them with DASK_CONFIG={_CONFIGURATION}, see docs/engines/dask.md.'
    )


def _require_environment(
    client: 'distributed.Client', environment: EnvironmentConfig, most_seconds: float
) -> None:
    """
    Raises:
      UsageError: a worker cannot open an environment outside Atari.
    """
    if environment.is_atari:
        return
    alone = dataclasses.replace(environment, env_processes=False)
    faults = client.run(environment_fault, alone, most_seconds)
    for worker, fault in faults.items():
        if fault:
            raise UsageError(f'--environment: Dask worker {worker}: {fault}')


def _answers(client: 'distributed.Client', addresses: Sequence[str]) -> dict[str, Any]:
    """Returns the report or the error of each worker.

    Retries on OSError, since the scheduler lists a departed worker for a moment.
    """
    for _ in range(_ATTEMPTS - 1):
        answers = client.run(look_around, addresses, on_error='return')
        if not any(isinstance(answer, OSError) for answer in answers.values()):
            return answers
        time.sleep(_CONNECT_SECONDS / _ATTEMPTS)
    return client.run(look_around, addresses, on_error='return')


@contextlib.contextmanager
def _connected(launch: Launch) -> Iterator['distributed.Client']:
    import distributed

    flags = [*launch.beam_flags, *launch.actor_flags, *launch.learner_flags]
    options = PipelineOptions(flags).view_as(DaskOptions)
    arguments = options.get_all_options(drop_default=True, current_only=True)
    arguments = {name: arguments[name] for name in arguments if name not in _NOT_OF_CLIENT}
    try:
        client = distributed.Client(
            **{'timeout': _CONNECT_SECONDS, **arguments}, set_as_default=False
        )
    except (OSError, ValueError) as error:
        where = arguments.get('address') or arguments.get('scheduler_file')
        raise UsageError(
            f'{where}: no Dask scheduler answers ({error}). Fix: run `dask scheduler`, or correct'
            ' the address.'
        ) from error
    with client:
        yield client


@contextlib.contextmanager
def _probes(launch: Launch) -> Iterator[list[str]]:
    """Addresses that every worker must reach: attached servers, and a listener for future ones.

    Raises:
      UsageError: --host is not an address of this machine.
    """
    given = [*launch.parameter_addresses, *launch.replay_addresses]
    if launch.parameter_addresses and launch.replay_addresses:
        yield given
        return
    try:
        listener = socket.create_server((launch.host, 0))
    except OSError as error:
        raise UsageError(
            f'--host {launch.host}: not an address of this machine ({error}). Fix: use one.'
        ) from error
    with listener:
        yield [*given, f'{launch.host}:{listener.getsockname()[1]}']


def _require_slots(
    config: ExperimentConfig,
    launch: Launch,
    scheduler: str,
    slots: Mapping[str, int],
    busy: Mapping[str, int],
) -> None:
    """Checks that there are enough free slots for each job on its hosts, and for all together.

    A busy slot is not free: an element of another run keeps it for hours.
    """
    allowed = {
        kind: host_names(value_of('--dask_hosts', [*launch.beam_flags, *launch.flags_of(kind)]))
        for kind in config.run.workers
    }
    wanted = config.run.workers
    workers = ' and '.join(f'{count} {kind}(s)' for kind, count in wanted.items())
    groups = [(f'{wanted[kind]} {kind}(s)', wanted[kind], allowed[kind]) for kind in wanted]
    everywhere = not all(allowed.values())
    union = [] if everywhere else sorted({host for hosts in allowed.values() for host in hosts})
    for name, needed, hosts in [*groups, (workers, sum(wanted.values()), union)]:
        there = [each for each in slots if not hosts or urlsplit(each).hostname in hosts]
        total, taken = sum(slots[each] for each in there), sum(busy.get(each, 0) for each in there)
        if total - taken < needed:
            where = f' on {", ".join(hosts)}' if hosts else ''
            raise UsageError(
                f'{scheduler}: too few worker slots{where} ({total}, {taken} busy) for {name}. Fix:'
                f' start more (`DASK_CONFIG={_CONFIGURATION} dask worker {scheduler}'
                f' --nworkers {needed - total + taken} --nthreads 1`), or request fewer workers.'
            )


def _require_fit(answers: Mapping[str, Any]) -> None:
    """Checks the workers' reports."""
    for worker, answer in answers.items():
        if isinstance(answer, OSError):
            raise UsageError(
                f'Dask worker {worker}: unreachable ({type(answer).__name__}: {answer}). Fix:'
                ' restart it, or remove it from the cluster.'
            )
        if isinstance(answer, BaseException):
            raise UsageError(
                f'Dask worker {worker}: cannot run this project ({type(answer).__name__}:'
                f' {answer}).'
                " Fix: start it with the `dask` of this project's environment on its host, in a"
                f' directory without another {" or ".join(_PACKAGES)}.'
            )
        if answer['code'] != _CODE:
            raise UsageError(
                f'Dask worker {worker}: has another version of this project ({answer["code"]}, not'
                f' {_CODE}). Fix: update its host and restart it.'
            )
    unreachable = collections.Counter(
        address for answer in answers.values() for address in answer['unreachable']
    )
    for address, count in unreachable.items():
        remedy = 'open the network path'
        if split_address(address)[0] == LOOPBACK:
            remedy = 'set --host to an address of this machine that they reach'
        raise UsageError(
            f'{address}: unreachable for {count} of {len(answers)} Dask workers. Fix: {remedy}.'
        )
