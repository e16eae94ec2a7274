"""Recorder of start points: a policy's play or a person's in, a file for `--protocol human` out.

python pipelines/record_starts.py --run_dir runs/my-run --output starts/pong.json
python pipelines/record_starts.py --policy random --game pong --output starts/pong.json
"""

import argparse
import dataclasses
import functools
import pathlib
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence

if __name__ == '__main__':  # this checkout's packages, whatever PYTHONPATH and the environment hold
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: imports would print a traceback
    sys.path[: not sys.flags.safe_path] = [str(pathlib.Path(__file__).resolve().parents[1])]

import numpy as np

from agents.games import GameError, rom_id
from infra.flags import Parser, integer, nonempty_path
from infra.output import protect_output
from pipelines.errors import UsageError, one_line_errors, require_effect
from pipelines.evaluation import starts
from pipelines.evaluation.entrants import Entrant, Request, entrants
from pipelines.evaluation.play import Game, Step, play
from pipelines.evaluation.policies import RANDOM, of_chance
from pipelines.experiment.protocols import PROTOCOLS, Protocol
from pipelines.launch.interrupts import stoppable
from pipelines.storage.outputs import require_new
from pipelines.storage.reading import CHECKPOINT_FLAG
from pipelines.storage.space import temporary_files

# Nair et al. 2015, section 5: a game of up to thirty minutes, from its very beginning, since a
# start point is a sequence of actions.
_RULES = Protocol('recording', epsilon=0.05, max_frames=108_000, max_noops=0)
_RANGES: Mapping[str, tuple[int, int]] = {
    'count': (1, starts.MOST_STARTS),
    'games_played': (1, 10_000),  # all of them are held in memory
    'epsilon': (0, 1),
    'seed': (0, 2**63 - 1),
}
_DESCRIPTION = """Records start points for `evaluate.py --protocol human --starts FILE`.

  record_starts.py --run_dir runs/a --output starts/pong.json           from a run's policy
  record_starts.py --policy random --game pong --output starts/pong.json
  record_starts.py --person --game pong --output starts/pong.json       from your own play

Points are drawn uniformly from all steps of the games. A person plays with arrows or WASD and
space; Escape ends the session.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments."""
    parser = Parser(
        prog='record_starts.py',
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    player = parser.add_mutually_exclusive_group(required=True)
    player.add_argument('--run_dir', type=nonempty_path, help='Run whose policy plays.')
    player.add_argument(
        '--policy', type=nonempty_path, help="Directory of a SavedModel, or 'random'."
    )
    player.add_argument('--person', action='store_true', help='You play, in a window.')
    parser.add_argument(
        '--game', help='Game of --policy or --person. Default: that of the run or SavedModel.'
    )
    parser.add_argument('--checkpoint', **{**CHECKPOINT_FLAG, 'default': None})
    parser.add_argument('--count', type=integer, default=100, help='Start points. Default: 100.')
    parser.add_argument(
        '--games_played', type=integer, default=10, help='Games to play. Default: 10.'
    )
    parser.add_argument(
        '--epsilon',
        type=float,
        help='Probability of a random action of a trained policy. Default: 0.05. With 0 all games'
        ' of a deterministic policy are equal.',
    )
    parser.add_argument('--seed', type=integer, default=1, help='Of play and draw. Default: 1.')
    parser.add_argument(
        '--output', type=nonempty_path, required=True, help='New file for the start points.'
    )
    return parser.parse_args(argv)


@one_line_errors('record_starts.py', OSError, GameError)
@stoppable('record_starts.py', 'No start points are written.')
def main(argv: Sequence[str]) -> int:
    """Records start points; returns the exit code."""
    arguments = parse(argv)
    _require_valid(arguments)
    require_new(arguments.output)
    with temporary_files():
        file = record(arguments)
    starts.write(pathlib.Path(arguments.output), file)
    print(f'{arguments.output}: {len(file.starts)} start points of {file.game}')
    return 0


def _require_valid(arguments: argparse.Namespace) -> None:
    """
    Raises:
      UsageError: a value is out of range, or without effect.
    """
    trained = arguments.run_dir or (arguments.policy not in (None, RANDOM))
    needs = {
        'checkpoint': ('--run_dir', arguments.run_dir),
        'epsilon': ('a trained policy', trained),
    }
    require_effect(vars(arguments), needs)
    for name, (least, most) in _RANGES.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:
            raise UsageError(
                f'--{name} {value}: must be from {least} to {most}. Fix: correct the value.'
            )


def record(arguments: argparse.Namespace) -> starts.StartFile:
    """Plays games and draws start points from them.

    Raises:
      UsageError: the policy cannot play, or too few steps were played.
    """
    entrant = _person(arguments) if arguments.person else _policy(arguments)
    environment = entrant.policy.environment
    codes = starts.action_codes(environment.game, environment.full_action_space)
    games = [_game(entrant, arguments, number) for number in range(arguments.games_played)]
    by = _by_person(games, codes) if arguments.person else _by_policy(entrant, games)
    # Equal games would give equal points.
    played = dict.fromkeys(bytes(codes[action] for action in taken) for taken in by)
    rng = np.random.default_rng(arguments.seed)
    points = starts.drawn(played, arguments.count, rng)
    source = 'person' if arguments.person else entrant.policy.path
    return starts.StartFile(rom_id(environment.game), environment.action_repeat, source, points)


def _person(arguments: argparse.Namespace) -> Entrant:
    if arguments.game is None:
        raise UsageError('--person: no game is named. Fix: add --game.')
    return Entrant(of_chance(arguments.game, False), _RULES, arguments.seed)


def _policy(arguments: argparse.Namespace) -> Entrant:
    """The policy that plays.

    Raises:
      UsageError: it cannot be used.
    """
    if arguments.policy == RANDOM and arguments.game is None:
        raise UsageError('--policy random: no game is named. Fix: add --game.')
    request = Request(
        run_dirs=[arguments.run_dir] if arguments.run_dir else [],
        checkpoint=arguments.checkpoint or 'newest',
        policies=[arguments.policy] if arguments.policy else [],
        games=[arguments.game] if arguments.game else [],
        protocol=PROTOCOLS['noop'].name,
    )
    (entrant,) = entrants(request, _notify)
    return entrant


def _game(entrant: Entrant, arguments: argparse.Namespace, number: int) -> Game:
    epsilon = _RULES.epsilon if arguments.epsilon is None else arguments.epsilon
    if entrant.policy.kind == RANDOM:
        epsilon = 1.0
    rules = dataclasses.replace(_RULES, epsilon=epsilon)
    return Game(0, number, arguments.seed, entrant.policy.environment, rules)


def _by_policy(entrant: Entrant, games: Sequence[Game]) -> Iterator[list[int]]:
    """Yields the actions of each game."""
    player = entrant.policy.player()
    for game in games:
        taken: list[int] = []
        score = play(game, player(), functools.partial(_note, taken))
        yield _told(game, taken, score.value)


def _note(taken: list[int], step: Step) -> None:
    taken.append(step.action)


def _by_person(games: Sequence[Game], codes: Sequence[int]) -> Iterator[list[int]]:
    """Yields the actions of each game."""
    from pipelines.evaluation.person import play_in_window  # imports pygame

    # In this order the window is closed after the last game.
    for (taken, score), game in zip(play_in_window(games, codes), games):
        yield _told(game, taken, score)


def _told(game: Game, taken: list[int], score: float) -> list[int]:
    _notify(f'game {game.episode}: {len(taken)} steps, score {score:g}')
    return taken


def _notify(text: str) -> None:
    print(f'record_starts.py: {text}', file=sys.stderr, flush=True)


if __name__ == '__main__':
    protect_output()
    sys.exit(main(sys.argv[1:]))
