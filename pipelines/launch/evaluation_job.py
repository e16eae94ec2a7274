"""Plays an evaluation's games on an engine: entrants and games in, scores of each policy out.

Workers read the policies from a shared directory and write the scores there: a temporary one of
this machine if the workers run on it, otherwise a new one below Beam's `--temp_location`.
"""

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from infra.disk import scratch
from infra.flags import value_of
from infra.process import descendants, own_code
from pipelines.engines import catalog
from pipelines.engines.catalog import Engine
from pipelines.errors import FailedError, UsageError
from pipelines.evaluation import results
from pipelines.evaluation.entrants import Entrant
from pipelines.evaluation.play import Failure, Game, Score
from pipelines.evaluation.policies import packed
from pipelines.launch import beam_job
from pipelines.launch.interrupts import before_end, ended_before, handled, raise_ended
from pipelines.transforms.evaluate import Evaluate, Shared, Write, read_json, write_json

_LAST_LINES = 20
_END_SECONDS = 10.0


def run(
    entrants: Sequence[Entrant],
    games: Sequence[Game],
    runner: str,
    num_workers: int,
    flags: Sequence[str],
    hang_seconds: float,
    notify: Callable[[str], None],
) -> Mapping[int, Mapping[str, Any]]:
    """Runs the Beam job; returns each entrant's scores (see `results.combined`) by its index.

    If the job fails, a second one plays the games that are missing; what is missing then has
    failed.

    Raises:
      JobFailedError: no game was played.
      UsageError: the shared directory is not shared.
    """
    engine = catalog.engine(runner)
    engine.register_flags()
    options = PipelineOptions(engine.job_flags('evaluation', num_workers, flags))
    job = _Job(runner, engine, options, hang_seconds)
    with _shared_directory(engine, flags) as directory, _environment_of_children():
        shared = Shared(directory)
        _put(entrants, shared)
        if engine.runs_locally:
            signal.signal(signal.SIGUSR1, _raise_no_workers)
            beam_job.end_with_workers(num_workers, lambda: bool(_played(shared)), _give_up)
        try:
            job.play(games, shared)
            return {index: _scores(shared, index) for index in range(len(entrants))}
        except JobFailedError as error:
            return results.by_policy(_rescued(job, games, shared, error, notify))


@contextlib.contextmanager
def _ending_workers() -> Iterator[None]:
    """On a signal ends the workers of this machine, for which Beam waits; then as `raise_ended`.

    Ends the process if Beam waits all the same, for a worker that was about to start.
    """
    limits: list[threading.Timer] = []

    def end(number: int) -> None:
        limits.append(_limit(128 + number))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    try:
        with handled(raise_ended), before_end(end):
            yield
    finally:
        for limit in limits:
            limit.cancel()


def _limit(exit_code: int) -> threading.Timer:
    """Ends the process after `_END_SECONDS`, unless cancelled."""
    limit = threading.Timer(_END_SECONDS, os._exit, (exit_code,))
    limit.daemon = True
    limit.start()
    return limit


class NoWorkersError(BaseException):
    """No worker process could start; not an `Exception`, since Beam catches those."""


def _give_up() -> None:
    """Raises `NoWorkersError` in the main thread; ends the process if Beam does not let it out."""
    _limit(1)
    os.kill(os.getpid(), signal.SIGUSR1)


def _raise_no_workers(*_: Any) -> None:
    raise NoWorkersError('no worker process could start')


class JobFailedError(FailedError):
    """The engine's job failed."""


@dataclasses.dataclass(frozen=True)
class _Job:
    """How jobs run.

    Attributes:
      runner: value of --runner.
      engine: of that name.
      options: of Beam.
      hang_seconds: after so long without a step a game fails.
    """

    runner: str
    engine: Engine
    options: PipelineOptions
    hang_seconds: float

    def play(self, games: Sequence[Game], shared: Shared) -> None:
        """Plays games to the end and shows progress.

        Raises:
          JobFailedError: the engine reports a failure.
        """
        pipeline = beam.Pipeline(options=self.options)
        scores = pipeline | 'Evaluate' >> Evaluate(games, shared, self.hang_seconds)
        _ = scores | 'Write scores' >> beam.ParDo(Write(shared))
        total = len(_records(shared)) + len(games)  # a job before it may have played some
        with _logged(self.runner) as shown, _progress(shared, total, shown):
            here = self.engine.runs_locally
            with _ending_workers() if here else contextlib.nullcontext():
                with self.engine.job_context(self.options):
                    beam_job.run(pipeline, self.options, self.engine)


def _put(entrants: Sequence[Entrant], shared: Shared) -> None:
    """Writes policies and start points for the workers."""
    for index, entrant in enumerate(entrants):
        with FileSystems.create(shared.policy(index)) as file:
            file.write(packed(entrant.policy))
        if entrant.starts:
            write_json(shared.starts(index), [start.actions.hex() for start in entrant.starts])


def _rescued(
    job: _Job,
    games: Sequence[Game],
    shared: Shared,
    error: JobFailedError,
    notify: Callable[[str], None],
) -> list[Score | Failure]:
    """The records of a job that failed, after a second one has played what was missing.

    Raises:
      JobFailedError: no game was played.
    """
    played = _records(shared)
    if not played:
        raise error
    missing = [game for game in games if (game.policy, game.episode) not in played]
    if missing:
        notify(f'{error} {len(missing)} of {len(games)} games are missing and played again.')
        try:
            job.play(missing, shared)
        except JobFailedError as second:
            error = second
    played = _records(shared)
    return [played.get((game.policy, game.episode)) or Failure.of(game, error) for game in games]


def _records(shared: Shared) -> dict[tuple[int, int], Score | Failure]:
    """The records of all games played so far, by policy and episode."""
    found = {}
    for path in _played(shared):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # cut by a kill
            record = results.decoded(read_json(path))
            found[record.policy, record.episode] = record
    return found


def _played(shared: Shared) -> list[str]:
    """Paths of the records."""
    (matched,) = FileSystems.match([FileSystems.join(shared.directory, 'played-*')])
    return [entry.path for entry in matched.metadata_list]


@contextlib.contextmanager
def _shared_directory(engine: Engine, flags: Sequence[str]) -> Iterator[str]:
    """Yields a new directory for policies and scores, removed at the end."""
    place = None if engine.runs_locally else value_of('--temp_location', flags)
    if place is None:
        with scratch() as path:
            yield str(path)
        return
    directory = FileSystems.join(place, f'gorila-evaluation-{uuid.uuid4().hex}')
    FileSystems.mkdirs(directory)
    try:
        yield directory
    finally:
        FileSystems.delete([directory])


@contextlib.contextmanager
def _environment_of_children() -> Iterator[None]:
    """Lets worker processes on this machine run this code, and leave no temporary files behind."""
    tempfile.gettempdir()  # this process keeps its own
    before = dict(os.environ)
    with scratch() as directory:
        own = own_code(os.environ.get('PYTHONPATH', ''))
        os.environ.update(own, TMPDIR=str(directory))
        try:
            yield
        finally:
            for name in (*own, 'TMPDIR'):
                os.environ.pop(name)
            os.environ.update(before)


@contextlib.contextmanager
def _logged(runner: str) -> Iterator[TextIO]:
    """Keeps the output of Beam and its workers from the terminal; shows its end if the job fails.

    Yields:
      A stream to the terminal.

    Raises:
      Ended: a signal came first, whatever error followed.
      JobFailedError: the block raised an error.
    """
    terminal, shown, root = os.dup(2), sys.stderr, logging.getLogger()
    handlers = root.handlers[:]  # write to the stream that was there when they were made
    with tempfile.TemporaryFile('w+', errors='replace', buffering=1) as log:
        os.dup2(log.fileno(), 2)  # of worker processes
        sys.stderr, root.handlers[:] = log, [logging.StreamHandler(log)]
        try:
            yield shown
        except (Exception, NoWorkersError) as error:  # of any kind: engines raise their own
            if (ended := ended_before(error)) is not None:
                raise ended from error
            log.seek(0)
            shown.writelines(log.readlines()[-_LAST_LINES:])
            reason = (str(error) or repr(error)).splitlines()[0]
            raise JobFailedError(
                f'--runner {runner}: the job failed ({reason}). Fix: see the lines above.'
            ) from error
        finally:
            sys.stderr, root.handlers[:] = shown, handlers
            os.dup2(terminal, 2)
            os.close(terminal)


@contextlib.contextmanager
def _progress(shared: Shared, total: int, shown: TextIO) -> Iterator[None]:
    """Shows the number of finished games while the block runs."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(results.PROGRESS_SECONDS):
            with contextlib.suppress(Exception):  # only for show
                done = len(_played(shared))
                print(f'evaluate.py: {done} of {total} episodes', file=shown, flush=True)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _scores(shared: Shared, index: int) -> Mapping[str, Any]:
    """Reads the scores of an entrant.

    Raises:
      UsageError: the workers have not written them here.
    """
    path = shared.scores(index)
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f'{path}: the workers wrote no scores here ({error}). Fix: set --temp_location to a'
            ' directory that all workers share, such as gs://BUCKET/tmp.'
        ) from error
