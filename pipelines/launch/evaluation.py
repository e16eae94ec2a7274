"""Carries out an evaluation: a request in, scores played here or on an engine, results out."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from infra.cores import whole_cores
from infra.disk import write_json
from pipelines.engines import catalog
from pipelines.errors import FailedError, UsageError, require_effect, unwritable
from pipelines.evaluation import local
from pipelines.evaluation.entrants import Entrant, Request, entrants
from pipelines.evaluation.play import Failure, Game, Score
from pipelines.evaluation.policies import Policy
from pipelines.evaluation.results import PROGRESS_SECONDS, by_policy, combined, file_name
from pipelines.experiment import config as config_lib
from pipelines.experiment.job_settings import JobSettings
from pipelines.preflight.engine import require_flags, require_reachable
from pipelines.storage import evaluations, provenance

if TYPE_CHECKING:
    from pipelines.evaluation.video import Film


@dataclasses.dataclass(frozen=True)
class Work:
    """Where games are played.

    Attributes:
      runner: Beam's engine; None: threads of this process.
      num_workers: games at a time; None: the cores that this process may use.
      beam_flags: of the engine.
      hang_seconds: after so long without a step a game fails.
    """

    runner: str | None = None
    num_workers: int | None = None
    beam_flags: Sequence[str] = ()
    hang_seconds: float = JobSettings.hang_seconds

    @property
    def workers(self) -> int | None:
        """Games at a time; None: the engine decides."""
        if self.runner is not None and not catalog.engine(self.runner).takes_count:
            return None
        return whole_cores() if self.num_workers is None else self.num_workers

    def require_ready(self) -> None:
        """Checks the engine and its flags, before policies are read.

        Raises:
          UsageError: the engine or a flag is unknown, a flag is missing, or an address unreachable.
        """
        if self.runner is None:
            return
        chosen = catalog.engine(self.runner)
        given = {'num_workers': self.num_workers}
        require_effect(given, {'num_workers': ('an engine that takes it', chosen.takes_count)})
        catalog.require_free(self.runner, self.beam_flags)
        require_flags(self.runner, self.beam_flags)
        from pipelines.experiment import command_line  # imports Beam

        command_line.require_known(chosen, self.beam_flags)
        require_reachable(self.beam_flags)


def require_valid(episodes: int | None, epsilon: float | None, seed: int | None) -> None:
    """Checks an evaluation's numbers before anything is read.

    Raises:
      UsageError: a value is out of range.
    """
    given = {'evaluation_episodes': episodes, 'evaluation_epsilon': epsilon, 'seed': seed}
    values = {name: value for name, value in given.items() if value is not None}
    try:
        config_lib.replace(config_lib.ExperimentConfig(), values)
    except UsageError as error:  # begins with the name of the setting
        raise UsageError(
            f'--{str(error).removeprefix("--").removeprefix("evaluation_")}'
        ) from error


def evaluate(
    request: Request,
    output: str | None,
    work: Work,
    command: Sequence[str],
    film: 'Film | None' = None,
    show: Callable[[str, Mapping[str, Any]], None] = lambda *_: None,
) -> dict[str, dict[str, Any]]:
    """Plays the requested games and writes a result for each policy and game.

    Args:
      request: what to evaluate.
      output: as the flag.
      work: where to play.
      command: for the results' provenance.
      film: a video to make of a game, after the results are written.
      show: receives each result's file and values once it is written.

    Returns:
      The results by the path of their file, which exists if a game was played (`episodes`).

    Raises:
      UsageError: the request cannot be carried out, or a result or the video cannot be written.
      FailedError: no game could be played.
    """
    work.require_ready()
    found = entrants(request, notify)
    filmed = _game_of(found, film)
    files = _files(found, output)
    results = _results(found, work, files, command)
    _report_failures(results)
    with _noted() as written:
        _write_all(results, written, show)
        if film is not None and filmed is not None:
            _record(found[0].policy, filmed, film)
    return results


@contextlib.contextmanager
def _noted() -> Iterator[list[str]]:
    """Yields a list of the files written so far, which an exception (a signal) then names."""
    written: list[str] = []
    try:
        yield written
    except BaseException as error:
        if written:
            error.add_note(f'Written: {", ".join(written)}.')
        raise


def _results(
    found: Sequence[Entrant], work: Work, files: Sequence[str], command: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Plays all games; returns the results by their files."""
    began = monotonic()
    scores = _play(found, work, files)
    own = {
        'engine': work.runner or 'threads',
        'workers': work.workers,
        'seconds': round(monotonic() - began, 3),
        'provenance': provenance.describe(command),
    }
    return {
        file: entrant.result(scores[i]) | own for i, (entrant, file) in enumerate(zip(found, files))
    }


def _game_of(found: Sequence[Entrant], film: 'Film | None') -> Game | None:
    """
    Raises:
      UsageError: see `video.game_of`.
    """
    if film is None:
        return None
    from pipelines.evaluation import video

    return video.game_of(found, film)


def _record(policy: Policy, game: Game, film: 'Film') -> None:
    """Makes the video.

    Raises:
      UsageError: it cannot be written.
      FailedError: a step hangs.
    """
    from pipelines.evaluation import video

    score = video.record(policy, game, film)
    length = f'{score.frames} {policy.environment.unit}'
    print(f'{film.path}: game {game.episode}, score {score.value:g}, {length}')


def _play(
    found: Sequence[Entrant], work: Work, files: Sequence[str]
) -> Mapping[int, Mapping[str, Any]]:
    """Plays all games; returns the scores of each entrant by its index."""
    games = [game for index, entrant in enumerate(found) for game in entrant.games(index)]
    if work.runner is None:
        return _play_here(found, games, work, files)
    from pipelines.launch import evaluation_job  # imports Beam

    workers = min(work.workers or 1, len(games))
    return evaluation_job.run(
        found, games, work.runner, workers, work.beam_flags, work.hang_seconds, notify
    )


def _files(found: Sequence[Entrant], output: str | None) -> list[str]:
    """Paths of the files for the results.

    Raises:
      UsageError: one exists or cannot be written.
    """
    files = [_target(entrant, output, len(found)) for entrant in found]
    for file in files:
        evaluations.require_new(file)
    return files


def _target(entrant: Entrant, output: str | None, count: int) -> str:
    """Path of the file for a result."""
    named = entrant.result({})
    if output is not None and count == 1 and not _is_directory(output):
        return output
    if output is not None:
        return f'{output.rstrip("/")}/{file_name(named, elsewhere=True)}'
    if entrant.policy.kind == 'run':
        folder = entrant.policy.path.rstrip('/')
        return f'{folder}/{file_name(named, elsewhere=False)}'
    return f'evaluations/{file_name(named, elsewhere=True)}'


def _is_directory(output: str) -> bool:
    return output.endswith('/') and bool(output.strip('/'))


def _write_all(
    results: Mapping[str, Mapping[str, Any]],
    written: list[str],
    show: Callable[[str, Mapping[str, Any]], None],
) -> None:
    """Writes the results of policies that have played; notes and shows each.

    Raises:
      UsageError: a file is not writable; the others are written.
    """
    failed: list[UsageError] = []
    for file, result in results.items():
        if not result['episodes']:
            continue
        try:
            _write(file, result)
        except UsageError as error:
            failed.append(error)
        else:
            written.append(file)
            show(file, result)
    if failed:
        raise failed[0]


def _write(file: str, result: Mapping[str, Any]) -> None:
    """Writes a result.

    Raises:
      UsageError: the file is not writable; the score is printed.
    """
    try:
        evaluations.write(file, result)
    except (OSError, UsageError) as error:
        notify(f'not written: {evaluations.line(result)}')
        if isinstance(error, UsageError):
            raise
        raise unwritable(file, error, 'name another file as --output') from error


def _play_here(
    found: Sequence[Entrant], games: Sequence[Game], work: Work, files: Sequence[str]
) -> dict[int, dict[str, Any]]:
    """Plays in this process and shows progress; returns the scores by policy."""
    records: list[Score | Failure] = []
    due = monotonic() + PROGRESS_SECONDS
    progress = None
    if [pathlib.Path(file).name for file in files] == [evaluations.EVALUATION_FILE]:
        progress = evaluations.progress_file(pathlib.Path(files[0]))  # the launcher reads it

    def show_count() -> None:
        if progress is not None:
            with contextlib.suppress(OSError):  # a full disk
                write_json(progress, {'episodes': len(records)})

    try:
        policies, threads = [entrant.policy for entrant in found], work.workers or 1
        for record in local.play_all(policies, games, threads, work.hang_seconds, show_count):
            records.append(record)
            show_count()
            if monotonic() >= due:
                due = monotonic() + PROGRESS_SECONDS
                notify(_progress(records, len(games), single=len(found) == 1))
    finally:
        if progress is not None:
            progress.unlink(missing_ok=True)
    return by_policy(records)


def _progress(records: Sequence[Score | Failure], total: int, single: bool) -> str:
    done = f'{len(records)} of {total} episodes'
    if failures := [record for record in records if isinstance(record, Failure)]:
        done += f', {len(failures)} failed (last: {failures[-1].reason})'
    mean = combined(records)['mean']
    return f'{done}, mean return {mean:.1f}' if single and mean is not None else done


def _report_failures(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Reports the games that failed.

    Raises:
      FailedError: no game of any policy could be played.
    """
    for result in results.values():
        name = f'{result["policy"]["path"]} in {result["game"]}'
        for failure in result['failures']:
            notify(f'{name}: game {failure["episode"]} failed ({failure["reason"]})')
        if not result['episodes']:
            notify(f'{name}: no game could be played; no result is written')
    if not any(result['episodes'] for result in results.values()):
        raise FailedError('no game could be played. Fix: see the reasons above.')


def notify(text: str) -> None:
    """Prints a line of progress."""
    print(f'evaluate.py: {text}', file=sys.stderr, flush=True)
