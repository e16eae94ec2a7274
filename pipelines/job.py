"""One Beam job in a process of its own: which workers to run in, their pipeline run to its end.

The launcher (pipelines/run.py) starts it as `python -m pipelines.job`; actors and learners are two
jobs since one pipeline's stages run in turn.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from infra.process import exit_with_parent
from pipelines import config as config_lib
from pipelines.act import Actors
from pipelines.bundle import Bundles
from pipelines.learn import Learners
from pipelines.workers import Addresses, Submission

TRANSFORMS: Mapping[str, type[beam.PTransform]] = {
    'actor': Actors,
    'learner': Learners,
    'bundle': Bundles,
}


def beam_flags(runner: str, num_workers: int, extra: Sequence[str]) -> list[str]:
    """Beam's flags for a job of `num_workers` workers; ours come last, since the last one counts.

    `DirectRunner` means Beam's in-process FnApiRunner with a process a worker, chosen by name:
    otherwise Beam looks for Prism first and then ignores the `direct_*` flags.
    """
    if runner != 'DirectRunner':
        return [*extra, f'--runner={runner}']
    return [
        *extra,
        '--runner=FnApiRunner',
        '--direct_running_mode=multi_processing',
        f'--direct_num_workers={num_workers}',
    ]


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog='python -m pipelines.job', allow_abbrev=False)
    parser.add_argument('--kind', choices=TRANSFORMS, required=True, help='what the workers are')
    parser.add_argument('--workers', required=True, help='their numbers, separated by commas')
    parser.add_argument('--submission', type=int, required=True, help='number of this submission')
    parser.add_argument('--config', type=pathlib.Path, required=True, help='config.json')
    parser.add_argument('--parameter_addresses', required=True, help='host:port,...')
    parser.add_argument('--replay_addresses', required=True, help='host:port,... or empty')
    parser.add_argument('--telemetry_address', required=True, help='host:port')
    parser.add_argument('--runner', required=True, help='Beam runner')
    return parser.parse_known_args(argv)


def main(argv: Sequence[str]) -> None:
    """Builds the pipeline of one kind of worker and runs it to its end."""
    arguments, extra = _parse(argv)
    exit_with_parent()
    addresses = Addresses(
        parameters=tuple(filter(None, arguments.parameter_addresses.split(','))),
        replay=tuple(filter(None, arguments.replay_addresses.split(','))),
        telemetry=arguments.telemetry_address,
    )
    workers = tuple(int(worker) for worker in arguments.workers.split(','))
    transform = TRANSFORMS[arguments.kind](
        config_lib.load(arguments.config), addresses, Submission(workers, arguments.submission)
    )
    flags = beam_flags(arguments.runner, len(workers), extra)
    with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
        _ = pipeline | arguments.kind.capitalize() >> transform


if __name__ == '__main__':
    main(sys.argv[1:])
