"""One Beam job in a process of its own: which workers to run in, their pipeline run to its end.

The launcher (pipelines/run.py) starts it as `python -m pipelines.job`; actors and learners are two
jobs since one pipeline's stages run in turn.
"""

import argparse
import functools
import pathlib
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from infra.process import exit_with_parent
from infra.tls import read_roots
from pipelines import config as config_lib
from pipelines import engines
from pipelines.act import Actors
from pipelines.bundle import Bundles
from pipelines.files import write_atomically
from pipelines.learn import Learners
from pipelines.remote import read_text
from pipelines.run_directory import is_remote
from pipelines.workers import Addresses, Submission

TRANSFORMS: Mapping[str, type[beam.PTransform]] = {
    'actor': Actors,
    'learner': Learners,
    'bundle': Bundles,
}


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog='python -m pipelines.job', allow_abbrev=False)
    parser.add_argument('--kind', choices=TRANSFORMS, required=True, help='what the workers are')
    parser.add_argument('--workers', required=True, help='their numbers, separated by commas')
    parser.add_argument('--submission', type=int, required=True, help='number of this submission')
    parser.add_argument('--config', required=True, help='config.json, here or at gs://...')
    parser.add_argument('--parameter_addresses', required=True, help='host:port,...')
    parser.add_argument('--replay_addresses', required=True, help='host:port,... or empty')
    parser.add_argument('--telemetry_address', required=True, help='host:port')
    parser.add_argument('--tls_roots', help='PEM file, if the parameter shards speak TLS')
    parser.add_argument('--state_file', type=pathlib.Path, help="is kept to say the job's state")
    parser.add_argument('--runner', required=True, help='engine')
    return parser.parse_known_args(argv)


def main(argv: Sequence[str]) -> None:
    """Builds the pipeline of one kind of worker and runs it to its end."""
    arguments, extra = _parse(argv)
    engine = engines.engine(arguments.runner)
    exit_with_parent(engine.end_seconds)
    addresses = Addresses(
        parameters=tuple(filter(None, arguments.parameter_addresses.split(','))),
        replay=tuple(filter(None, arguments.replay_addresses.split(','))),
        telemetry=arguments.telemetry_address,
        tls_roots=read_roots(arguments.tls_roots) if arguments.tls_roots else None,
    )
    workers = tuple(int(worker) for worker in arguments.workers.split(','))
    transform = TRANSFORMS[arguments.kind](
        _config(arguments.config), addresses, Submission(workers, arguments.submission)
    )
    engine.register_flags()
    options = PipelineOptions(engine.job_flags(arguments.kind, len(workers), extra))
    with engine.surroundings(options):
        pipeline = beam.Pipeline(options=options)
        _ = pipeline | arguments.kind.capitalize() >> transform
        _run(pipeline, options, engine, arguments.state_file)


def _config(path: str) -> config_lib.ExperimentConfig:
    if is_remote(path):
        return config_lib.from_json(read_text(path))
    return config_lib.load(pathlib.Path(path))


class _Ended(BaseException):  # Beam's own threads and waits catch every Exception
    """SIGTERM came: nobody needs the job any more."""


def _run(
    pipeline: beam.Pipeline,
    options: PipelineOptions,
    engine: engines.Engine,
    state_file: pathlib.Path | None,
) -> None:
    """Runs a job to its end; where it would outlive this process, SIGTERM ends it too."""
    if not engine.outlives:
        pipeline.run().wait_until_finish()
        return
    noted: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: noted.append(number))  # while it is submitted
    result = pipeline.run()
    try:
        signal.signal(signal.SIGTERM, _raise_ended)
        if noted:
            _raise_ended()
        if engine.follow is not None and state_file is not None:
            told = (result, options, functools.partial(write_atomically, state_file))
            threading.Thread(target=engine.follow, args=told, daemon=True).start()
        result.wait_until_finish()
    except _Ended:
        print('ending the job ...', flush=True)
        engine.end(result, options)
        sys.exit(128 + signal.SIGTERM)


def _raise_ended(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may come twice
    raise _Ended


if __name__ == '__main__':
    main(sys.argv[1:])
