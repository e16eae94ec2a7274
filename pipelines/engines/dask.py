"""Dask: where a job's elements may run, and how often one that failed runs again."""

import argparse
import contextlib

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.dask.dask_runner import DaskOptions  # noqa: F401  (Beam learns its flags)

RETRIES = 5
"""So often Dask runs an element again that has raised an error; of killed ones it counts itself."""


class PlacementOptions(PipelineOptions):
    """Where a job's workers may run; given for one job by `--actor_flags` or `--learner_flags`."""

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            '--dask_hosts',
            default='',
            help='hosts, separated by commas, whose Dask workers may run the job (default: all)',
        )


def placed(options: PipelineOptions) -> contextlib.AbstractContextManager:
    """In it, a job's elements go to the hosts asked for, and only a failed one is run again."""
    import dask

    hosts = host_names(options.view_as(PlacementOptions).dask_hosts)
    return dask.annotate(retries=RETRIES, **({'workers': hosts} if hosts else {}))


def host_names(text: str | None) -> list[str]:
    """The hosts in the value of `--dask_hosts`; none: all."""
    return [host.strip() for host in (text or '').split(',') if host.strip()]
