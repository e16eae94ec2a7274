"""Evaluation: policies in, the scores of games under a published protocol out.

Runs at the end of training, or as a command:
  python pipelines/evaluate.py --run_dir runs/my-run
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

if __name__ == '__main__':  # this checkout's packages, whatever PYTHONPATH and the environment hold
    sys.path[: not sys.flags.safe_path] = [str(pathlib.Path(__file__).resolve().parents[1])]

from infra.disk import is_remote, write_json
from infra.flags import Parser, integer, nonempty_path
from infra.output import protect_output
from infra.process import exit_with_launcher
from pipelines.errors import UsageError, one_line_errors
from pipelines.evaluation import local, results
from pipelines.evaluation.entrants import Entrant, Request, entrants
from pipelines.evaluation.play import Failure, Game, Score
from pipelines.evaluation.protocols import PROTOCOLS
from pipelines.experiment import config as config_lib
from pipelines.storage import evaluations, provenance
from pipelines.storage.reading import CHECKPOINT_FLAG
from pipelines.storage.space import temporary_files
from pipelines.suites.games import games_of

if TYPE_CHECKING:
    from pipelines.evaluation.video import Film

_PROGRESS_SECONDS = 10.0
_DESCRIPTION = """Plays games with one policy or several and writes their scores.

  evaluate.py --run_dir runs/a                              a run's newest checkpoint, its own rules
  evaluate.py --run_dir runs/a runs/b --checkpoint best     several runs, each in a file of its own
  evaluate.py --policy runs/a/policy --protocol rainbow     a SavedModel, by another protocol
  evaluate.py --policy random --games atari49               random actions in each of 49 games
  evaluate.py --run_dir runs/a --runner DirectRunner --num_workers 4      in parallel, by Beam

Flags of Beam follow --runner. A game depends on its seed alone: the scores are the same on any
engine and any number of workers.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; those that only Beam knows are its `beam_flags`."""
    parser = Parser(
        prog='evaluate.py',
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_policies(parser)
    _add_rules(parser)
    _add_work(parser)
    _add_video(parser)
    arguments, beam_flags = parser.parse_known_args(argv)
    if beam_flags and not arguments.runner:
        parser.error(f'unrecognized arguments: {" ".join(beam_flags)}')
    if arguments.num_workers < 1:
        parser.error(f'--num_workers {arguments.num_workers}: must be at least 1.')
    arguments.beam_flags = beam_flags
    return arguments


def _add_policies(parser: argparse.ArgumentParser) -> None:
    several: Any = {'nargs': '+', 'action': 'extend', 'type': nonempty_path, 'default': []}
    parser.add_argument('--run_dir', **several, help='Run directories, local or gs://...')
    parser.add_argument('--checkpoint', **CHECKPOINT_FLAG)
    parser.add_argument(
        '--policy', **several, help="Directories of SavedModels, or 'random' for random actions."
    )
    parser.add_argument(
        '--games',
        metavar='GAME,...',
        help='Games of the --policy, or the groups atari49 and atari5. Default: that of the run'
        ' which holds it.',
    )


def _add_rules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--protocol',
        choices=PROTOCOLS,
        help="Rules of the games, see docs/evaluation.md. Default: the run's own; otherwise noop.",
    )
    parser.add_argument(
        '--starts', type=nonempty_path, help='File of start points, for --protocol human.'
    )
    parser.add_argument(
        '--episodes', type=integer, help="Games of each policy. Default: the run's or protocol's."
    )
    parser.add_argument(
        '--epsilon',
        type=float,
        help="Probability of a random action. Default: the run's or protocol's.",
    )
    parser.add_argument('--seed', type=integer, help="Seed of the games. Default: the run's, or 1.")


def _add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--output',
        type=nonempty_path,
        help='New file for the result; a directory if there are several. Default: a new'
        ' evaluation-*.json in each run, and evaluations/ for other policies.',
    )
    parser.add_argument(
        '--runner', help='Engine of Beam, as for run.py. Default: threads of this process.'
    )
    parser.add_argument(
        '--num_workers',
        type=integer,
        default=len(os.sched_getaffinity(0)),
        help='Games at a time. Default: the cores of this machine.',
    )


def _add_video(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--video',
        type=nonempty_path,
        help='New .mp4 or .gif file that shows one game of the policy. Default: no video.',
    )
    parser.add_argument(
        '--video_episode',
        type=integer,
        default=0,
        help="The game that --video shows, by its number in the result's details. Default: 0.",
    )
    parser.add_argument(
        '--video_overlay',
        action='store_true',
        help='Show score, actions and expected returns beside the picture.',
    )


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


@one_line_errors('evaluate.py', OSError)
def main(argv: Sequence[str]) -> int:
    """Evaluates policies; returns the exit code: 1 if a game could not be played."""
    arguments = parse(argv)
    exit_with_launcher()
    require_valid(arguments.episodes, arguments.epsilon, arguments.seed)
    request = Request(
        run_dirs=arguments.run_dir,
        checkpoint=arguments.checkpoint,
        policies=arguments.policy,
        games=() if arguments.games is None else games_of(arguments.games),
        protocol=arguments.protocol,
        starts=arguments.starts,
        episodes=arguments.episodes,
        epsilon=arguments.epsilon,
        seed=arguments.seed,
    )
    work = Work(arguments.runner, arguments.num_workers, arguments.beam_flags)
    try:
        # Beam removes its own files as the process ends, after this block.
        with temporary_files() if work.runner is None else contextlib.nullcontext():
            film = _film(arguments)
            written = evaluate(request, arguments.output, work, ['evaluate.py', *argv], film)
    except KeyboardInterrupt:
        print('evaluate.py: interrupted; no result written.', file=sys.stderr)
        return 130
    for file, result in written.items():
        print(f'{_line(result)}\nwritten to {file}')
    return int(any(result['failed'] for result in written.values()))


def _film(arguments: argparse.Namespace) -> 'Film | None':
    """What to film.

    Raises:
      UsageError: no video can be written there.
    """
    if arguments.video is None:
        return None
    from pipelines.evaluation import video  # imports FFmpeg

    path = video.new_file(arguments.video)
    return video.Film(path, arguments.video_episode, arguments.video_overlay)


@dataclasses.dataclass(frozen=True)
class Work:
    """Where games are played.

    Attributes:
      runner: Beam's engine; None: threads of this process.
      num_workers: games at a time.
      beam_flags: of the engine.
    """

    runner: str | None = None
    num_workers: int = 1
    beam_flags: Sequence[str] = ()


def evaluate(
    request: Request,
    output: str | None,
    work: Work,
    command: Sequence[str],
    film: 'Film | None' = None,
) -> dict[str, dict[str, Any]]:
    """Plays the requested games and writes a result for each policy and game.

    Args:
      request: what to evaluate.
      output: as the flag.
      work: where to play.
      command: for the results' provenance.
      film: a video to make of a game, after the results are written.

    Returns:
      The results, by the path of their file.

    Raises:
      UsageError: the request cannot be carried out, no game of a policy could be played, or the
        video cannot be written.
      OSError: the parent directory of `output` cannot be created.
    """
    found = entrants(request, _notify)
    filmed = _game_of(found, film)
    files = [_target(entrant, output, len(found)) for entrant in found]
    with _writable():
        for file in files:
            evaluations.require_new(file)
    written = _results(found, work, files, command)
    _require_played(written)
    with _writable():
        for file, result in written.items():
            evaluations.write(file, result)
    if film is not None and filmed is not None:
        _record(found[0], filmed, film, files[0])
    return written


def _results(
    found: Sequence[Entrant], work: Work, files: Sequence[str], command: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Plays all games; returns the results by their files."""
    began = monotonic()
    scores = _play(found, work, files)
    own = {
        'engine': work.runner or 'threads',
        'workers': work.num_workers,
        'seconds': round(monotonic() - began, 3),
        'provenance': provenance.describe(command),
    }
    return {
        file: entrant.result(scores[i]) | own for i, (entrant, file) in enumerate(zip(found, files))
    }


@one_line_errors('video.mp4', OSError)
def film_run(argv: Sequence[str]) -> int:
    """Makes the video at the end of the run in the directory `argv`; returns the exit code."""
    from pipelines.evaluation import video  # imports FFmpeg

    (run_dir,) = argv
    video.record_run(run_dir, _notify)
    return 0


def _game_of(found: Sequence[Entrant], film: 'Film | None') -> Game | None:
    """
    Raises:
      UsageError: see `video.game_of`.
    """
    if film is None:
        return None
    from pipelines.evaluation import video

    return video.game_of(found, film)


def _record(entrant: Entrant, game: Game, film: 'Film', result: str) -> None:
    """Makes the video.

    Raises:
      UsageError: it cannot be written; `result` is already.
    """
    from pipelines.evaluation import video

    try:
        score = video.record(entrant.policy, game, film)
    except UsageError as error:
        raise UsageError(f'{error} The scores are in {result}.') from error
    print(f'{film.path}: game {game.episode}, score {score.value:g}, {score.frames} frames')


def _play(
    found: Sequence[Entrant], work: Work, files: Sequence[str]
) -> Mapping[int, Mapping[str, Any]]:
    """Plays all games; returns the scores of each entrant by its index."""
    games = [game for index, entrant in enumerate(found) for game in entrant.games(index)]
    if work.runner is None:
        return _play_here(found, games, work.num_workers, files)
    from pipelines.launch import evaluation_job  # imports Beam

    return evaluation_job.run(found, games, work.runner, work.num_workers, work.beam_flags, _notify)


def _target(entrant: Entrant, output: str | None, count: int) -> str:
    """Path of the file for a result."""
    named = entrant.result({})
    if output is not None and count == 1:
        return output
    if output is not None:
        return f'{output.rstrip("/")}/{results.file_name(named, elsewhere=True)}'
    if entrant.policy.kind == 'run':
        folder = entrant.policy.path.rstrip('/')
        return f'{folder}/{results.file_name(named, elsewhere=False)}'
    return f'evaluations/{results.file_name(named, elsewhere=True)}'


@contextlib.contextmanager
def _writable() -> Iterator[None]:
    """Turns an error of a write in the block into one line with a remedy."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f'{error.filename}: cannot be written ({error.strerror}). Fix: name another file as'
            ' --output.'
        ) from error


def _play_here(
    found: Sequence[Entrant], games: Sequence[Game], num_threads: int, files: Sequence[str]
) -> dict[int, dict[str, Any]]:
    """Plays in this process and shows progress; returns the scores by policy."""
    records: list[Score | Failure] = []
    due = monotonic() + _PROGRESS_SECONDS
    progress = None
    if len(files) == 1 and not is_remote(files[0]):  # the launcher reads it
        progress = evaluations.progress_file(pathlib.Path(files[0]))
    try:
        policies = [entrant.policy for entrant in found]
        for record in local.play_all(policies, games, num_threads):
            records.append(record)
            if progress is not None:
                write_json(progress, {'episodes': len(records)})
            if monotonic() >= due:
                due = monotonic() + _PROGRESS_SECONDS
                _notify(_progress(records, len(games), single=len(found) == 1))
    finally:
        if progress is not None:
            progress.unlink(missing_ok=True)
    return results.by_policy(records)


def _progress(records: Sequence[Score | Failure], total: int, single: bool) -> str:
    done = f'{len(records)} of {total} episodes'
    mean = results.combined(records)['mean']
    return f'{done}, mean return {mean:.1f}' if single and mean is not None else done


def _require_played(written: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UsageError if no game of a policy could be played; reports single failures."""
    for result in written.values():
        name = f'{result["policy"]["path"]} in {result["game"]}'
        for failure in result['failures']:
            _notify(f'{name}: game {failure["episode"]} failed ({failure["reason"]})')
        if not result['episodes']:
            reason = result['failures'][0]['reason'] if result['failures'] else 'no game ended'
            raise UsageError(f'{name}: no game could be played ({reason}). Fix: see the reason.')


def _line(result: Mapping[str, Any]) -> str:
    failed = f', {result["failed"]} failed' if result['failed'] else ''
    deviations = ''.join(f', {name} {value}' for name, value in result['deviations'].items())
    return (
        f'{result["game"]}: mean return {result["mean"]:.1f}, standard deviation'
        f' {result["std"]:.1f}, over {result["episodes"]} games{failed} (protocol'
        f' {result["protocol"]}{deviations}, epsilon {result["epsilon"]:g},'
        f' {result["policy"]["path"]})'
    )


def _notify(text: str) -> None:
    print(f'evaluate.py: {text}', file=sys.stderr, flush=True)


if __name__ == '__main__':
    protect_output()
    sys.exit(main(sys.argv[1:]))
