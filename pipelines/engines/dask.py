"""Dask: hosts on which a job's elements may run, retries of failed elements."""

import argparse
import contextlib

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.dask.dask_runner import DaskOptions  # noqa: F401  (registers its flags)

RETRIES = 5
"""Times that Dask reruns an element that raised; its `allowed-failures` limits killed ones."""


class PlacementOptions(PipelineOptions):
    """Hosts of a job's workers; `--actor_flags` or `--learner_flags` set them for one job."""

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            '--dask_hosts',
            default='',
            help='Comma-separated hosts whose Dask workers may run the job. Default: all.',
        )


def placed(options: PipelineOptions) -> contextlib.AbstractContextManager:
    """Within the context, elements run on the requested hosts and are retried on failure."""
    import dask

    hosts = host_names(options.view_as(PlacementOptions).dask_hosts)
    return dask.annotate(retries=RETRIES, **({'workers': hosts} if hosts else {}))


def host_names(text: str | None) -> list[str]:
    """Hosts in a value of `--dask_hosts`; an empty list means all."""
    return [host.strip() for host in (text or '').split(',') if host.strip()]
