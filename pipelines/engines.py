"""The engines that run jobs: which there are, Beam's flags for each, what each must have.

In: the value of --runner and the user's own flags. Out: the flags of one job, or an error before
anything is written. Everything that differs from engine to engine is in the table `ENGINES`.
"""

import contextlib
import dataclasses
import importlib
import ipaddress
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from infra.addresses import AddressError, split_address
from infra.flags import value_of
from pipelines import dataflow
from pipelines.errors import UsageError

if TYPE_CHECKING:
    from pipelines.config import ExperimentConfig
    from pipelines.options import Launch

_CONNECT_SECONDS = 5.0
_END_SECONDS = 30.0  # a request to a service far away, repeated once or twice


def _placed_by_dask(options: Any) -> contextlib.AbstractContextManager:
    from pipelines.dask_cluster import placed

    return placed(options)


@dataclasses.dataclass(frozen=True)
class Engine:
    """How the jobs of a run work on one of Beam's runners.

    Attributes:
      beam_runner: what Beam calls it.
      flags: Beam's flags that every job gets.
      defaults: the flags of a job (its kind, number of workers, the user's flags) that the user's
        own override.
      count_flag: Beam's flag for the number of a job's workers; empty: the engine needs none.
      decided: flags that a user must not give, since the two above set them.
      required: groups of flags; the user must give one of each.
      example: how a user would give them.
      options_module: registers Beam's flags of this engine when it is imported; empty: they are
        registered always.
      forwards: flags unknown to Beam go on to a job server, which may know them.
      here: workers are processes of this machine.
      remote: workers are always on other machines.
      outlives: a job goes on when the process that submitted it ends, unless `end` ends it.
      end: ends a job, given its result and options.
      follow: tells what becomes of a job, given its result, options and whom to tell; None: only
        its log does.
      end_seconds: how long that may take; with no `outlives`, a process's own end.
      watched: a worker that dies is replaced by the launcher, since the engine does not.
      surroundings: what a job's pipeline is run in, given its options.
    """

    beam_runner: str
    flags: tuple[str, ...] = ()
    defaults: Callable[[str, int, Sequence[str]], list[str]] = lambda *_: []
    count_flag: str = ''
    decided: tuple[str, ...] = ()
    required: tuple[tuple[str, ...], ...] = ()
    example: str = ''
    options_module: str = ''
    forwards: bool = False
    here: bool = False
    remote: bool = False
    outlives: bool = False
    end: Callable[[Any, Any], None] = lambda result, _: result.cancel()
    follow: Callable[[Any, Any, Callable[[str], None]], None] | None = None
    end_seconds: float = 5.0
    watched: bool = False
    surroundings: Callable[[Any], contextlib.AbstractContextManager] = contextlib.nullcontext

    def job_flags(self, kind: str, num_workers: int, extra: Sequence[str]) -> list[str]:
        """Beam's flags for a job of `num_workers` workers; of one given twice the last counts."""
        defaults = self.defaults(kind, num_workers, extra)
        count = [f'{self.count_flag}={num_workers}'] if self.count_flag else []
        return [*defaults, *extra, f'--runner={self.beam_runner}', *self.flags, *count]

    def register_flags(self) -> None:
        """Makes Beam know the engine's own flags."""
        if self.options_module:
            importlib.import_module(self.options_module)


ENGINES: Mapping[str, Engine] = {
    # Beam's in-process FnApiRunner with a process a worker, chosen by name: as `DirectRunner` Beam
    # looks for Prism first and then ignores the `direct_*` flags.
    'DirectRunner': Engine(
        'FnApiRunner',
        flags=('--direct_running_mode=multi_processing',),
        count_flag='--direct_num_workers',
        decided=('--direct_running_mode', '--direct_num_workers'),
        here=True,
        watched=True,
    ),
    'DaskRunner': Engine(
        'apache_beam.runners.dask.dask_runner.DaskRunner',
        count_flag='--dask_npartitions',  # otherwise 128 elements a partition, which run in turn
        decided=('--dask_npartitions', '--dask_partition_size'),
        required=(('--dask_client_address', '--dask_scheduler_file'),),
        example='--dask_client_address=tcp://HOST:8786',
        options_module='pipelines.dask_cluster',
        surroundings=_placed_by_dask,
    ),
    'PrismRunner': Engine('PrismRunner', here=True, watched=True),
    'PortableRunner': Engine(
        'PortableRunner',
        # Without the second Beam starts containers, which lack this project.
        required=(('--job_endpoint',), ('--environment_type',)),
        example='--job_endpoint=HOST:8099 --environment_type=EXTERNAL'
        ' --environment_config=HOST:50000 (see README, Engines)',
        forwards=True,
        watched=True,
        outlives=True,
        end_seconds=_END_SECONDS,
    ),
    'FlinkRunner': Engine('FlinkRunner', forwards=True, outlives=True, end_seconds=_END_SECONDS),
    'SparkRunner': Engine('SparkRunner', forwards=True, outlives=True, end_seconds=_END_SECONDS),
    'DataflowRunner': Engine(
        'DataflowRunner',
        defaults=dataflow.job_flags,
        required=(
            ('--project',),
            ('--region',),
            ('--temp_location',),
            ('--sdk_container_image',),
        ),
        example='--project=P --region=R --temp_location=gs://BUCKET/tmp'
        ' --sdk_container_image=IMAGE (with this project and Beam in it)',
        remote=True,
        outlives=True,
        end=dataflow.end,
        follow=dataflow.follow,
        end_seconds=dataflow.DRAIN_SECONDS + _END_SECONDS,
    ),
}


def engine(runner: str) -> Engine:
    """The engine that --runner names.

    Raises:
      UsageError: there is none of that name.
    """
    if runner not in ENGINES:
        raise UsageError(f'--runner {runner}: no such engine; use one of {", ".join(ENGINES)}.')
    return ENGINES[runner]


def require_free(runner: str, flags: Sequence[str]) -> None:
    """Checks that the user sets nothing that is this project's to set.

    Raises:
      UsageError: there is no such engine, or a flag is ours.
    """
    for flag in engine(runner).decided:
        if value_of(flag, flags) is not None:
            raise UsageError(
                f'{flag}: leave it out; --num_actors and --num_learners decide how many workers'
                ' there are, and each gets a place of its own.'
            )


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
      UsageError: a flag is missing or for a job that there is not; there is no such file; nobody
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
    if launch.engine.remote and not attached and _means_this_machine(launch.host):
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
    """Checks the files and addresses in Beam's own flags.

    Raises:
      UsageError: there is no such file, or nobody listens at an address.
    """
    scheduler = value_of('--dask_scheduler_file', flags)
    if scheduler and not os.path.isfile(scheduler):  # Dask would wait for it for ever
        raise UsageError(f'--dask_scheduler_file {scheduler}: no such file.')
    prism = value_of('--prism_location', flags)
    if prism and '://' not in prism and not os.path.isfile(prism):
        raise UsageError(f'--prism_location {prism}: no such file; see README, Engines.')
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
