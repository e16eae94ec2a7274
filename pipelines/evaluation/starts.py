"""Start points of human-start evaluation: recorded play in, a file of emulator states out.

A state is the sequence of actions that leads to it from the start of a game, without no-ops and
sticky actions; replaying it restores the state exactly. Nair et al. 2015 (section 5) took 100 such
points from a person's play.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from ale_py import roms

from agents.games import loaded, rom_id
from infra.sealed import parse_object, seal, unseal
from pipelines.errors import UsageError
from pipelines.storage.outputs import write_new

_KIND = 'start points'
MOST_STARTS = 100_000
"""In a file."""
ALL_ACTIONS = 18
"""Number of ALE's actions."""


@dataclasses.dataclass(frozen=True)
class Start:
    """A start point: ALE's action codes (0 .. 17) from the beginning of a game, one a step."""

    actions: bytes


@dataclasses.dataclass(frozen=True)
class StartFile:
    """Start points of one game.

    Attributes:
      game: name of the ROM.
      action_repeat: emulator frames of each action.
      source: who played, such as 'person' or a policy's path.
      starts: the points.
    """

    game: str
    action_repeat: int
    source: str
    starts: tuple[Start, ...]


def action_codes(game: str, full_action_space: bool) -> tuple[int, ...]:
    """ALE's code of each action of the game's action set, in the set's order."""
    if full_action_space:
        return tuple(range(ALL_ACTIONS))
    return tuple(int(action.value) for action in loaded(game).getMinimalActionSet())


def indices(start: Start, codes: tuple[int, ...]) -> np.ndarray:
    """The start's actions as indices int32 [steps] into the action set `codes`.

    Raises:
      ValueError: an action is not in the set.
    """
    table = np.full(ALL_ACTIONS, -1, np.int32)
    table[list(codes)] = np.arange(len(codes))
    found = table[np.frombuffer(start.actions, np.uint8)]
    if (found < 0).any():
        raise ValueError("a start point uses an action outside the policy's action set")
    return found


def write(path: pathlib.Path, file: StartFile) -> None:
    """Writes start points to a new file.

    Raises:
      UsageError: `path` exists or is not writable.
    """
    values = {
        'kind': _KIND,
        'game': file.game,
        'rom_md5': _rom_md5(file.game),
        'action_repeat': file.action_repeat,
        'source': file.source,
        'starts': [start.actions.hex() for start in file.starts],
    }
    write_new(str(path), json.dumps(seal(values)) + '\n')


def read(path: pathlib.Path, game: str, action_repeat: int) -> StartFile:
    """Reads start points for `game`.

    Raises:
      UsageError: the file is unreadable, damaged, or of another game or action repeat.
    """
    try:
        values = unseal(parse_object(path.read_bytes()))
        file = _decoded(values)
    except OSError as error:
        raise UsageError(
            f'--starts {path}: cannot be read ({error.strerror}). Fix: record start points with'
            ' `pipelines/record_starts.py`.'
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        problem = f'it lacks {error}' if isinstance(error, KeyError) else str(error)
        raise UsageError(
            f'--starts {path}: damaged, or not a file of start points ({problem}). Fix: record it'
            ' again with `pipelines/record_starts.py`.'
        ) from error
    if file.game != rom_id(game) or values['rom_md5'] != _rom_md5(file.game):
        raise UsageError(
            f'--starts {path}: start points of {file.game}, not of {rom_id(game)}. Fix: name a file'
            f' of {rom_id(game)}.'
        )
    if file.action_repeat != action_repeat:
        raise UsageError(
            f'--starts {path}: recorded with action repeat {file.action_repeat}, the policy has'
            f' {action_repeat}. Fix: record start points with {action_repeat}.'
        )
    return file


def _decoded(values: dict[str, Any]) -> StartFile:
    """Raises ValueError, KeyError or TypeError if a value is not what `write` wrote."""
    if values['kind'] != _KIND or not isinstance(values['game'], str):
        raise ValueError('other contents')
    starts = tuple(_start(text) for text in values['starts'])
    if not 0 < len(starts) <= MOST_STARTS:
        raise ValueError(f'{len(starts)} start points')
    return StartFile(values['game'], int(values['action_repeat']), str(values['source']), starts)


def _start(text: str) -> Start:
    actions = bytes.fromhex(text)
    if any(action >= ALL_ACTIONS for action in actions):
        raise ValueError('an action above 17')
    return Start(actions)


def _rom_md5(game: str) -> str:
    return hashlib.md5(pathlib.Path(roms.get_rom_path(game)).read_bytes()).hexdigest()


def drawn(games: Iterable[bytes], count: int, rng: np.random.Generator) -> tuple[Start, ...]:
    """Draws `count` start points uniformly from the steps of recorded games.

    Args:
      games: ALE's action codes of each game, one a step, from its beginning.
      count: at most the number of steps.
      rng: of the draw.

    Raises:
      UsageError: the games have fewer steps.
    """
    played = list(games)
    steps = [(game, step) for game, actions in enumerate(played) for step in range(len(actions))]
    if len(steps) < count:
        raise UsageError(
            f'--count {count}: only {len(steps)} steps were played. Fix: raise --games_played, or'
            ' lower --count.'
        )
    chosen = np.sort(rng.choice(len(steps), count, replace=False))
    return tuple(Start(played[steps[i][0]][: steps[i][1]]) for i in chosen)
