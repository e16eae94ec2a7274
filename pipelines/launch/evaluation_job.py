"""Plays an evaluation's games on an engine: entrants and games in, scores of each policy out.

Workers read the policies from a shared directory and write the scores there: a temporary one of
this machine if the workers run on it, otherwise a new one below Beam's `--temp_location`.
"""

import contextlib
import json
import os
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from infra.disk import scratch
from infra.flags import value_of
from infra.process import own_code
from pipelines.engines import catalog
from pipelines.engines.catalog import Engine
from pipelines.errors import UsageError
from pipelines.evaluation.entrants import Entrant
from pipelines.evaluation.play import Game
from pipelines.evaluation.policies import packed
from pipelines.launch import beam_job
from pipelines.preflight.engine import require_flags, require_reachable
from pipelines.transforms.evaluate import Evaluate, Write, played_files, policy_file, scores_file

_PROGRESS_SECONDS = 10.0
_LAST_LINES = 20


def run(
    entrants: Sequence[Entrant],
    games: Sequence[Game],
    runner: str,
    num_workers: int,
    flags: Sequence[str],
    notify: Callable[[str], None],
) -> dict[int, dict[str, Any]]:
    """Runs the Beam job; returns each entrant's scores (see `results.combined`) by its index.

    Raises:
      UsageError: the engine lacks a flag or cannot be reached, or the shared directory is not
        shared.
    """
    engine = catalog.engine(runner)
    catalog.require_free(runner, flags)
    require_flags(runner, flags)
    require_reachable(flags)
    engine.register_flags()
    options = PipelineOptions(engine.job_flags('evaluation', num_workers, flags))
    os.environ.update(own_code(os.environ.get('PYTHONPATH', '')))  # of Beam's worker processes
    if engine.runs_locally:
        beam_job.end_with_workers(num_workers)
    with _shared_directory(engine, flags) as directory, _temporary_files_of_children():
        for index, entrant in enumerate(entrants):
            with FileSystems.create(policy_file(directory, index)) as file:
                file.write(packed(entrant.policy))
        pipeline = beam.Pipeline(options=options)
        scores = pipeline | 'Evaluate' >> Evaluate(games, directory)
        _ = scores | 'Write scores' >> beam.ParDo(Write(directory))
        with _logged(runner), _progress(directory, len(games), notify):
            with engine.job_context(options):
                beam_job.run(pipeline, options, engine)
        return {index: _read(directory, index) for index in range(len(entrants))}


@contextlib.contextmanager
def _shared_directory(engine: Engine, flags: Sequence[str]) -> Iterator[str]:
    """Yields a new directory for policies and scores, removed at the end."""
    place = None if engine.runs_locally else value_of('--temp_location', flags)
    if place is None:
        with tempfile.TemporaryDirectory(prefix='gorila-evaluation-') as directory:
            yield directory
        return
    directory = FileSystems.join(place, f'gorila-evaluation-{uuid.uuid4().hex}')
    FileSystems.mkdirs(directory)
    try:
        yield directory
    finally:
        FileSystems.delete([directory])


@contextlib.contextmanager
def _temporary_files_of_children() -> Iterator[None]:
    """Lets worker processes on this machine write temporary files where they are removed."""
    tempfile.gettempdir()  # this process keeps its own
    before = dict(os.environ)
    with scratch() as directory:
        os.environ['TMPDIR'] = str(directory)
        try:
            yield
        finally:
            os.environ.pop('TMPDIR')
            os.environ.update(before)


@contextlib.contextmanager
def _logged(runner: str) -> Iterator[None]:
    """Keeps the output of Beam and its workers from the terminal; shows its end if the job fails.

    Raises:
      UsageError: the block raised an error.
    """
    with tempfile.TemporaryFile('w+', errors='replace') as log, os.fdopen(os.dup(2), 'w') as shown:
        before = sys.stderr
        os.dup2(log.fileno(), 2)
        sys.stderr = shown
        try:
            yield
        except Exception as error:  # of any kind: engines raise their own
            log.seek(0)
            shown.writelines(log.readlines()[-_LAST_LINES:])
            reason = (str(error) or repr(error)).splitlines()[0]
            raise UsageError(
                f'--runner {runner}: the job failed ({reason}). Fix: see the lines above.'
            ) from error
        finally:
            shown.flush()
            sys.stderr = before
            os.dup2(shown.fileno(), 2)


@contextlib.contextmanager
def _progress(directory: str, total: int, notify: Callable[[str], None]) -> Iterator[None]:
    """Reports the number of finished games while the block runs."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_PROGRESS_SECONDS):
            with contextlib.suppress(Exception):  # only for show
                (matched,) = FileSystems.match([played_files(directory)])
                notify(f'{len(matched.metadata_list)} of {total} episodes')

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _read(directory: str, index: int) -> dict[str, Any]:
    """Reads the scores of an entrant.

    Raises:
      UsageError: the workers have not written them here.
    """
    path = scores_file(directory, index)
    try:
        with FileSystems.open(path) as file:
            return json.loads(file.read())
    except (OSError, ValueError) as error:
        raise UsageError(
            f'{path}: the workers wrote no scores here ({error}). Fix: set --temp_location to a'
            ' directory that all workers share, such as gs://BUCKET/tmp.'
        ) from error
