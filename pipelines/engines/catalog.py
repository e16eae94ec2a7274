"""The engines: the value of --runner and the user's flags in, the Beam flags of a job out.

The table `ENGINES` holds everything that differs between engines.
"""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from infra.flags import value_of
from pipelines.engines import dataflow
from pipelines.errors import UsageError

_END_SECONDS = 30.0  # a request to a remote service and one or two retries
# Beam ends a job with the streams that report on it, by default after 300 s.
_JOB_STREAM_SECONDS = 31_536_000  # a year
_LONG_JOBS = (f'--job_server_timeout={_JOB_STREAM_SECONDS}',)


def _placed_by_dask(options: Any) -> contextlib.AbstractContextManager:
    from pipelines.engines.dask import placed

    return placed(options)


@dataclasses.dataclass(frozen=True)
class Engine:
    """How jobs run on one Beam runner.

    Attributes:
      beam_runner: Beam's name of the runner.
      flags: Beam flags of every job.
      first_flags: Beam flags of every job that the user's flags override.
      defaults: Beam flags of a job, computed from the kind of its workers, their number, the user's
        flags and the names of its resource hints; the user's flags override them.
      count_flag: Beam flag for the number of workers; empty if the engine needs none.
      reserved_flags: flags that a user must not set, because `flags` and `count_flag` set them.
      required: groups of flags; the user must set at least one flag of each group.
      example: required flags as a user would write them.
      options_module: module that registers the engine's own Beam flags when imported; empty if
        Beam always registers them.
      forwards: passes flags that Beam does not know to the job server.
      runs_locally: workers are processes on this machine.
      always_remote: workers always run on other machines.
      outlives_submitter: a job continues after its submitting process exits, unless `end` ends it.
      end: ends a job, given its result and options.
      follow: reports state changes of a job, given its result, options and a callback; None if only
        the log shows them.
      end_seconds: time limit of `end`, or, without `outlives_submitter`, of the job process's exit.
      launcher_restarts_workers: the launcher replaces dead workers, because the engine does not.
      side_by_side: runs all steps of a job at once: a job may hold workers of several kinds.
      elements_in_turn: may work through the elements of a step one by one: each worker gets a job.
      needs_outputs: runs only what leads to a pipeline's last transform.
      continues_elements: takes the rest of an element that returns early, and commits its results.
      polls: asks for an element's progress ten times a second until it may split the element.
      job_context: context manager in which the pipeline runs, given its options.
    """

    beam_runner: str
    flags: tuple[str, ...] = ()
    first_flags: tuple[str, ...] = ()
    defaults: Callable[[str, int, Sequence[str], Collection[str]], list[str]] = lambda *_: []
    count_flag: str = ''
    reserved_flags: tuple[str, ...] = ()
    required: tuple[tuple[str, ...], ...] = ()
    example: str = ''
    options_module: str = ''
    forwards: bool = False
    runs_locally: bool = False
    always_remote: bool = False
    outlives_submitter: bool = False
    end: Callable[[Any, Any], None] = lambda result, _: result.cancel()
    follow: Callable[[Any, Any, Callable[[str], None]], None] | None = None
    end_seconds: float = 5.0
    launcher_restarts_workers: bool = False
    side_by_side: bool = False
    elements_in_turn: bool = False
    needs_outputs: bool = False
    continues_elements: bool = False
    polls: bool = False
    job_context: Callable[[Any], contextlib.AbstractContextManager] = contextlib.nullcontext

    @property
    def takes_count(self) -> bool:
        """Whether a job has as many workers as its flags say; others decide by themselves."""
        return bool(self.count_flag) or self.defaults is not Engine.defaults

    def job_flags(
        self, kind: str, num_workers: int, extra: Sequence[str], hints: Collection[str] = ()
    ) -> list[str]:
        """Beam flags of a job with `num_workers` workers; the last of two equal flags counts."""
        defaults = [*self.first_flags, *self.defaults(kind, num_workers, extra, hints)]
        count = [f'{self.count_flag}={num_workers}'] if self.count_flag else []
        return [*defaults, *extra, f'--runner={self.beam_runner}', *self.flags, *count]

    def register_flags(self) -> None:
        """Registers the engine's own flags with Beam."""
        if self.options_module:
            importlib.import_module(self.options_module)


ENGINES: Mapping[str, Engine] = {
    # Beam's in-process FnApiRunner with one process per worker. The name `DirectRunner` would make
    # Beam try Prism first and ignore the `direct_*` flags.
    'DirectRunner': Engine(
        'FnApiRunner',
        flags=('--direct_running_mode=multi_processing',),
        count_flag='--direct_num_workers',
        reserved_flags=('--direct_running_mode', '--direct_num_workers'),
        runs_locally=True,
        launcher_restarts_workers=True,
    ),
    'DaskRunner': Engine(
        'apache_beam.runners.dask.dask_runner.DaskRunner',
        count_flag='--dask_npartitions',  # the default runs 128 elements in turn
        reserved_flags=('--dask_npartitions', '--dask_partition_size'),
        required=(('--dask_client_address', '--dask_scheduler_file'),),
        example='--dask_client_address=tcp://HOST:8786',
        options_module='pipelines.engines.dask',
        side_by_side=True,
        needs_outputs=True,
        job_context=_placed_by_dask,
    ),
    'PrismRunner': Engine(
        'PrismRunner',
        first_flags=_LONG_JOBS,
        runs_locally=True,
        launcher_restarts_workers=True,
        side_by_side=True,
        # Prism hands a step's elements to one thread, which cannot give some back while the first
        # worker is being prepared, and runs eight bundles of a job at most.
        elements_in_turn=True,
        continues_elements=True,
        polls=True,
    ),
    'PortableRunner': Engine(
        'PortableRunner',
        first_flags=_LONG_JOBS,
        # Without --environment_type Beam starts containers, which lack this project.
        required=(('--job_endpoint',), ('--environment_type',)),
        example='--job_endpoint=HOST:8099 --environment_type=EXTERNAL'
        ' --environment_config=HOST:50000 (see docs/engines.md)',
        forwards=True,
        launcher_restarts_workers=True,
        elements_in_turn=True,  # Prism's job server, too
        continues_elements=True,
        polls=True,  # the same
        outlives_submitter=True,
        end_seconds=_END_SECONDS,
    ),
    'FlinkRunner': Engine(
        'FlinkRunner',
        first_flags=_LONG_JOBS,
        forwards=True,
        outlives_submitter=True,
        end_seconds=_END_SECONDS,
    ),
    'SparkRunner': Engine(
        'SparkRunner',
        first_flags=_LONG_JOBS,
        forwards=True,
        outlives_submitter=True,
        end_seconds=_END_SECONDS,
    ),
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
        ' --sdk_container_image=IMAGE (see docs/deploy/images.md)',
        always_remote=True,
        side_by_side=True,
        continues_elements=True,
        outlives_submitter=True,
        end=dataflow.end,
        follow=dataflow.follow,
        end_seconds=dataflow.DRAIN_SECONDS + _END_SECONDS,
    ),
}

SIDE_BY_SIDE = tuple(name for name, engine in ENGINES.items() if engine.side_by_side)
"""Engines whose jobs may hold workers of several kinds."""


def engine(runner: str) -> Engine:
    """Returns the engine that --runner names.

    Raises:
      UsageError: no engine has that name.
    """
    if runner not in ENGINES:
        raise UsageError(f'--runner {runner!r}: unknown. Fix: choose one of {", ".join(ENGINES)}.')
    return ENGINES[runner]


def require_free(runner: str, flags: Sequence[str]) -> None:
    """Rejects Beam flags that this project sets itself.

    Raises:
      UsageError: the engine is unknown, or a flag is reserved.
    """
    for flag in engine(runner).reserved_flags:
        if value_of(flag, flags) is not None:
            raise UsageError(
                f'{flag}: reserved, since the number of workers determines it (--num_actors and'
                ' --num_learners; of evaluate.py, --num_workers). Fix: omit it.'
            )
