"""Runs one Beam job: worker numbers and addresses in, their pipeline run to its end.

The launcher starts it as `python -m pipelines.job`. Actors and learners are separate jobs, since
the stages of one pipeline run in turn.
"""

import argparse
import functools
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from infra.addresses import reach_directly
from infra.disk import is_remote, write_atomically
from infra.output import protect_output
from infra.process import exit_with_parent
from infra.tls import read_roots
from pipelines.engines import catalog
from pipelines.experiment import config as config_lib
from pipelines.experiment.launch import Addresses
from pipelines.launch.interrupts import Ended, raise_ended
from pipelines.storage.object_store import read_bytes
from pipelines.transforms.act import Act
from pipelines.transforms.bundle import ActAndLearn
from pipelines.transforms.learn import Learn
from pipelines.transforms.workers import Work, Workers
from pipelines.workers.spec import Submission

WORK: Mapping[str, type[Work]] = {
    'actor': Act,
    'learner': Learn,
    'bundle': ActAndLearn,
}


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog='python -m pipelines.job', allow_abbrev=False)
    parser.add_argument('--kind', choices=WORK, required=True, help='Kind of the workers.')
    parser.add_argument('--workers', required=True, help='Their numbers, separated by commas.')
    parser.add_argument('--submission', type=int, required=True, help='Number of this submission.')
    parser.add_argument('--config', required=True, help='File config.json, local or gs://...')
    parser.add_argument(
        '--parameter_addresses', required=True, help='HOST:PORT,... in shard order.'
    )
    parser.add_argument('--replay_addresses', required=True, help='The same, or empty.')
    parser.add_argument('--telemetry_address', required=True, help='HOST:PORT.')
    parser.add_argument('--tls_roots', help='PEM file, if parameter shards use TLS.')
    parser.add_argument('--state_file', type=pathlib.Path, help='File for the state of the job.')
    parser.add_argument('--runner', required=True, help='Engine.')
    return parser.parse_known_args(argv)


def main(argv: Sequence[str]) -> None:
    """Builds the pipeline of one kind of worker and runs it to its end."""
    arguments, extra = _parse(argv)
    engine = catalog.engine(arguments.runner)
    exit_with_parent(engine.end_seconds)
    addresses = Addresses(
        parameters=tuple(filter(None, arguments.parameter_addresses.split(','))),
        replay=tuple(filter(None, arguments.replay_addresses.split(','))),
        telemetry=arguments.telemetry_address,
        tls_roots=read_roots(arguments.tls_roots) if arguments.tls_roots else None,
    )
    reach_directly(addresses.all)  # and Beam's own workers, by loopback
    workers = tuple(int(worker) for worker in arguments.workers.split(','))
    _end_with_workers(len(workers))
    work = WORK[arguments.kind](read_config(arguments.config), addresses)
    transform = Workers(work, Submission(workers, arguments.submission))
    engine.register_flags()
    options = PipelineOptions(engine.job_flags(arguments.kind, len(workers), extra))
    with engine.job_context(options):
        pipeline = beam.Pipeline(options=options)
        _ = pipeline | arguments.kind.capitalize() >> transform
        _run(pipeline, options, engine, arguments.state_file)


def read_config(path: str) -> config_lib.ExperimentConfig:
    if is_remote(path):
        return config_lib.from_json(read_bytes(path))
    return config_lib.load(pathlib.Path(path))


def _end_with_workers(count: int) -> None:
    """Ends this process after `count` worker processes of Beam's local runner have failed.

    The runner waits for ever for a process that fails before it connects; only the thread that
    watches the process raises an error.
    """
    failed: list[str] = []
    otherwise = threading.excepthook

    def note(args: Any) -> None:
        if args.thread is None or args.thread.name != 'run_worker':
            otherwise(args)
            return
        failed.append(f'worker process {len(failed) + 1} of {count} failed: {args.exc_value}')
        print(failed[-1], file=sys.stderr, flush=True)
        if len(failed) >= count:
            os._exit(1)

    threading.excepthook = note


def _run(
    pipeline: beam.Pipeline,
    options: PipelineOptions,
    engine: catalog.Engine,
    state_file: pathlib.Path | None,
) -> None:
    """Runs a job to its end; SIGTERM also ends a job that would outlive this process."""
    if not engine.outlives_submitter:
        pipeline.run().wait_until_finish()
        return
    noted: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: noted.append(number))  # while it is submitted
    result = pipeline.run()
    try:
        signal.signal(signal.SIGTERM, raise_ended)
        if noted:
            raise_ended()
        if engine.follow is not None and state_file is not None:
            report = functools.partial(write_atomically, state_file)
            follow = functools.partial(engine.follow, result, options, report)
            threading.Thread(target=follow, daemon=True).start()
        result.wait_until_finish()
    except Ended:
        print('ending the job ...', flush=True)
        engine.end(result, options)
        sys.exit(128 + signal.SIGTERM)


if __name__ == '__main__':
    protect_output()
    main(sys.argv[1:])
