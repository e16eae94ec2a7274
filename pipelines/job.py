"""Runs one Beam job: worker numbers and addresses in, their pipeline run to its end.

The launcher starts it as `python -m pipelines.job`. Actors and learners are separate jobs unless
--one_job is set, since some engines run the steps of a pipeline in turn.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence

from infra.addresses import reach_directly
from infra.disk import is_remote, write_json
from infra.output import protect_output
from infra.process import exit_with_parent
from infra.tls import read_roots
from pipelines.engines import catalog
from pipelines.experiment import config as config_lib
from pipelines.experiment import job_settings
from pipelines.experiment.launch import Addresses
from pipelines.launch import beam_job
from pipelines.launch.interrupts import Ended
from pipelines.storage.object_store import read_bytes
from pipelines.transforms.act import Act
from pipelines.transforms.bundle import ActAndLearn
from pipelines.transforms.job import build
from pipelines.transforms.learn import Learn
from pipelines.transforms.metrics import committed
from pipelines.transforms.workers import Work
from pipelines.workers.spec import Submission

WORK: Mapping[str, type[Work]] = {
    'actor': Act,
    'learner': Learn,
    'bundle': ActAndLearn,
}


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog='python -m pipelines.job', allow_abbrev=False)
    for kind in WORK:
        parser.add_argument(
            f'--{kind}s',
            type=worker_numbers,
            default=(),
            help=f'Numbers of its {kind}s, with commas.',
        )
    parser.add_argument('--submission', type=int, required=True, help='Number of this submission.')
    parser.add_argument('--config', required=True, help='File config.json, local or gs://...')
    parser.add_argument(
        '--parameter_addresses', required=True, help='HOST:PORT,... in shard order.'
    )
    parser.add_argument('--replay_addresses', required=True, help='The same, or empty.')
    parser.add_argument('--telemetry_address', required=True, help='HOST:PORT.')
    parser.add_argument('--tls_roots', help='PEM file, if parameter shards use TLS.')
    parser.add_argument('--state_file', type=pathlib.Path, help='File for the state of the job.')
    parser.add_argument('--metrics_file', type=pathlib.Path, help="File for Beam's counters.")
    parser.add_argument('--runner', required=True, help='Engine.')
    job_settings.add_arguments(parser)
    known, extra = parser.parse_known_args(argv)
    if not any(getattr(known, f'{kind}s') for kind in WORK):
        parser.error('no workers. Fix: pass --actors, --learners or --bundles.')
    return known, extra


def worker_numbers(text: str) -> tuple[int, ...]:
    """The numbers of workers in a text such as '0,1,2', each once."""
    found = tuple(int(number) for number in text.split(','))
    if len(set(found)) < len(found) or min(found) < 0:
        raise ValueError(f'{text}: from 0 on, each once')
    return found


def main(argv: Sequence[str]) -> None:
    """Builds a pipeline of workers and runs it to its end."""
    import apache_beam as beam  # here: the import of this project silences others' notices first
    from apache_beam.options.pipeline_options import PipelineOptions

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
    workers = {kind: numbers for kind in WORK if (numbers := getattr(arguments, f'{kind}s'))}
    count = sum(map(len, workers.values()))
    beam_job.end_with_workers(count)
    engine.register_flags()
    settings = job_settings.from_arguments(arguments)
    flags = [*job_settings.beam_flags(settings, engine.continues_elements), *extra]
    hints = {hint for kind in workers for hint in settings.hints(kind)}
    options = PipelineOptions(engine.job_flags('-'.join(workers), count, flags, hints))
    config = read_config(arguments.config)
    learns = any(WORK[kind].learns for kind in workers)
    works = [
        (WORK[kind](config, addresses, learns), Submission(numbers, arguments.submission))
        for kind, numbers in workers.items()
    ]
    with engine.job_context(options):
        pipeline = beam.Pipeline(options=options)
        period = settings.element_seconds * engine.continues_elements
        build(pipeline, works, settings, period, engine.needs_outputs, engine.polls)
        try:
            result = beam_job.run(pipeline, options, engine, arguments.state_file)
        except Ended as ended:
            sys.exit(ended.exit_code)
    if arguments.metrics_file is not None:
        write_json(arguments.metrics_file, committed(result))


def read_config(path: str) -> config_lib.ExperimentConfig:
    if is_remote(path):
        return config_lib.from_json(read_bytes(path))
    return config_lib.load(pathlib.Path(path))


if __name__ == '__main__':
    protect_output()
    main(sys.argv[1:])
