"""Evaluation: policies in, the scores of games under a published protocol out.

Runs at the end of training, or as a command:
  python pipelines/evaluate.py --run_dir runs/my-run
"""

import argparse
import contextlib
import pathlib
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if __name__ == '__main__':  # this checkout's packages, whatever PYTHONPATH and the environment hold
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: imports would print a traceback
    sys.path[: not sys.flags.safe_path] = [str(pathlib.Path(__file__).resolve().parents[1])]

from infra.flags import Parser, integer, nonempty, nonempty_path
from infra.output import protect_output
from infra.process import exit_with_launcher
from pipelines.errors import one_line_errors, require_effect
from pipelines.evaluation.entrants import Request
from pipelines.evaluation.policies import RANDOM
from pipelines.experiment.games import games_of
from pipelines.experiment.job_settings import JobSettings, require_hang_seconds
from pipelines.experiment.protocols import PROTOCOLS
from pipelines.launch.evaluation import Work, evaluate, require_valid
from pipelines.launch.interrupts import stoppable
from pipelines.storage.evaluations import line
from pipelines.storage.reading import CHECKPOINT_FLAG
from pipelines.storage.space import temporary_files

if TYPE_CHECKING:
    from pipelines.evaluation.video import Film

_MOST_WORKERS = 1024
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
    workers = arguments.num_workers
    if workers is not None and not 1 <= workers <= _MOST_WORKERS:
        parser.error(f'--num_workers {arguments.num_workers}: must be from 1 to {_MOST_WORKERS}')
    arguments.beam_flags = beam_flags
    return arguments


def _add_policies(parser: argparse.ArgumentParser) -> None:
    several: Any = {'nargs': '+', 'action': 'extend', 'type': nonempty_path, 'default': []}
    parser.add_argument('--run_dir', **several, help='Run directories, local or gs://...')
    parser.add_argument('--checkpoint', **{**CHECKPOINT_FLAG, 'default': None})
    parser.add_argument(
        '--policy', **several, help="Directories of SavedModels, or 'random' for random actions."
    )
    parser.add_argument(
        '--games',
        metavar='GAME,...',
        help='Games of the --policy, or the groups atari49 and atari5. Default: the one that it was'
        " trained for; for 'random' those of the other policies.",
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
        help='New file for the result; a directory if it ends with / or there are several. Default:'
        ' a new evaluation-*.json in each run, and evaluations/ for other policies.',
    )
    parser.add_argument(
        '--runner',
        type=nonempty,
        help='Engine of Beam, as for run.py. Default: threads of this process.',
    )
    parser.add_argument(
        '--num_workers',
        type=integer,
        help='Games at a time; of threads, DirectRunner, DaskRunner and DataflowRunner: other'
        ' engines decide by themselves. Default: the cores that this process may use.',
    )
    parser.add_argument(
        '--hang_seconds',
        type=float,
        default=JobSettings.hang_seconds,
        help='Time for a game to start, and without a step, after which it fails. Default:'
        f' {JobSettings.hang_seconds:g}.',
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
        help="The game that --video shows, by its number in the result's details. Default: 0.",
    )
    parser.add_argument(
        '--video_overlay',
        action='store_true',
        default=None,
        help='Show score, actions and expected returns beside the picture.',
    )


@one_line_errors('evaluate.py', OSError)
@stoppable('evaluate.py', 'No result is written.')
def main(argv: Sequence[str]) -> int:
    """Evaluates policies; returns the exit code: 1 if a game could not be played."""
    arguments = parse(argv)
    exit_with_launcher()
    require_valid(arguments.episodes, arguments.epsilon, arguments.seed)
    require_hang_seconds(arguments.hang_seconds)
    _require_effect(arguments)
    request = Request(
        run_dirs=arguments.run_dir,
        checkpoint=arguments.checkpoint or 'newest',
        policies=arguments.policy,
        games=() if arguments.games is None else games_of(arguments.games),
        protocol=arguments.protocol,
        starts=arguments.starts,
        episodes=arguments.episodes,
        epsilon=arguments.epsilon,
        seed=arguments.seed,
    )
    work = Work(
        arguments.runner, arguments.num_workers, arguments.beam_flags, arguments.hang_seconds
    )
    # Beam removes its own files as the process ends, after this block.
    with temporary_files() if work.runner is None else contextlib.nullcontext():
        film = _film(arguments)
        results = evaluate(request, arguments.output, work, ['evaluate.py', *argv], film, _show)
    return int(any(result['failed'] for result in results.values()))


def _require_effect(arguments: argparse.Namespace) -> None:
    """
    Raises:
      UsageError: a flag has no effect without another one.
    """
    trained = arguments.run_dir or set(arguments.policy) - {RANDOM}
    needs = {
        'checkpoint': ('--run_dir', arguments.run_dir),
        'epsilon': ('a trained policy', trained or not arguments.policy),
        'video_episode': ('--video', arguments.video),
        'video_overlay': ('--video', arguments.video),
    }
    require_effect(vars(arguments), needs)


def _show(file: str, result: Mapping[str, Any]) -> None:
    print(f'{line(result)}\npolicy {result["policy"]["path"]}; written to {file}', flush=True)


def _film(arguments: argparse.Namespace) -> 'Film | None':
    """What to film.

    Raises:
      UsageError: no video can be written there.
    """
    if arguments.video is None:
        return None
    from pipelines.evaluation import video  # imports FFmpeg

    path = video.new_file(arguments.video)
    overlay = bool(arguments.video_overlay)
    episode, hang_seconds = arguments.video_episode or 0, arguments.hang_seconds
    return video.Film(path, episode, overlay, new=True, hang_seconds=hang_seconds)


if __name__ == '__main__':
    protect_output()
    sys.exit(main(sys.argv[1:]))
