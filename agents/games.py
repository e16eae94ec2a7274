"""Names of Atari games: a user's spelling in, the name of ALE's ROM out.

This module does not import TensorFlow, so that a launcher checks a name quickly.
"""

import contextlib
import difflib
import functools
import io
import os
import threading

import gymnasium
from ale_py import ALEInterface, LoggerMode, roms

_ENTRY_POINT = 'ale_py.env:AtariEnv'
_LOCK = threading.Lock()
_CHOOSE = 'choose one of those that `python pipelines/suite.py --list_games` lists'


class GameError(ValueError):
    """The game is unknown or unplayable in this installation; the message gives the remedy."""


def game_names() -> tuple[str, ...]:
    """Playable games in snake_case (`space_invaders`), sorted."""
    return tuple(sorted(name for name in roms.get_all_rom_ids() if not _obstacle(name)))


def rom_id(game: str) -> str:
    """Finds the ROM of `game`, such as `SpaceInvaders`, `space-invaders` or `ALE/SpaceInvaders-v5`.

    Raises:
      GameError: the game is unknown or unplayable.
    """
    if not game.strip():
        raise GameError(f'{game!r}: no name. Fix: name a game, such as pong.')
    name = _rom_of_id(game) or _known().get(_letters(game))
    if name is None:
        raise GameError(f'unknown game {game!r}{_nearest(_letters(game))}. Fix: {_CHOOSE}.')
    if reason := _obstacle(name):
        raise GameError(f'game {game!r} cannot be played ({reason}). Fix: {_CHOOSE}.')
    return name


def loaded(game: str) -> ALEInterface:
    """A new emulator of a game, to read its properties.

    Raises:
      GameError: as `rom_id`.
    """
    ALEInterface.setLoggerMode(LoggerMode.Error)
    emulator = ALEInterface()
    emulator.loadROM(roms.get_rom_path(rom_id(game)))
    return emulator


def not_taken_over(game: str) -> str:
    """Names the settings of a gymnasium id that this project ignores; empty for a plain name."""
    if _rom_of_id(game) is None:
        return ''
    settings = gymnasium.envs.registry[game].kwargs
    return (
        f'{game}: plays {settings["game"]} by the flags of this project; not taken over are'
        f' sticky actions {settings["repeat_action_probability"]} and frameskip'
        f' {settings["frameskip"]}. Fix: see --sticky_action_probability, --action_repeat.'
    )


def _rom_of_id(game: str) -> str | None:
    """The ROM of one of gymnasium's Atari environments, such as `PongNoFrameskip-v4`."""
    spec = gymnasium.envs.registry.get(game)  # filled by the import of ale_py
    return spec.kwargs['game'] if spec is not None and spec.entry_point == _ENTRY_POINT else None


def _obstacle(name: str) -> str:
    """Why the ROM is unplayable, empty if it is playable.

    ALE ends a process that loads an unplayable ROM.
    """
    with _LOCK:
        return _obstacle_in(name, os.environ.get('ALE_ROMS_DIR'))


@functools.cache
def _obstacle_in(name: str, _roms_dir: str | None) -> str:
    # Redirects the output of all threads, one at a time and once for each ROM.
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # each call prints about ALE_ROMS_DIR
            supported = ALEInterface.isSupportedROM(roms.get_rom_path(name))
    except OSError as error:  # ALE_ROMS_DIR lacks the ROM, or holds a different file
        return str(error)
    return '' if supported else 'ALE has no rules of it for one player'


def _nearest(wanted: str) -> str:
    """A question that names the games most like `wanted`, in brackets; empty if there is none."""
    names = {_letters(name): name for name in game_names()}
    nearest = [names[match] for match in difflib.get_close_matches(wanted, names, cutoff=0.5)]
    if not nearest:  # an id of another gymnasium version, such as `PongDeterministic-v4`
        nearest = sorted((names[n] for n in names if n in wanted), key=len)[-1:]
    return f' (did you mean {" or ".join(nearest)}?)' if nearest else ''


def _known() -> dict[str, str]:
    """Every ROM of ALE, playable or not, keyed by the letters and digits of its name."""
    return {_letters(name): name for name in roms.get_all_rom_ids()}


def _letters(name: str) -> str:
    return ''.join(character for character in name.lower() if character.isalnum())
