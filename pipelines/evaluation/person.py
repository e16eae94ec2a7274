"""A person's play: the keyboard in, the actions of the games out, shown in a window."""

import itertools
import os
from collections.abc import Iterator, Sequence

import ale_py
import numpy as np
import pygame

from pipelines.errors import UsageError
from pipelines.evaluation.play import FRAMES_PER_SECOND, Emulator, Game

_SCALE = 4  # of the emulator's screen
_DISPLAYS = ('DISPLAY', 'WAYLAND_DISPLAY', 'SDL_VIDEODRIVER')
_KEYS = {
    'UP': (pygame.K_UP, pygame.K_w),
    'DOWN': (pygame.K_DOWN, pygame.K_s),
    'LEFT': (pygame.K_LEFT, pygame.K_a),
    'RIGHT': (pygame.K_RIGHT, pygame.K_d),
    'FIRE': (pygame.K_SPACE,),
}
_ORDER = ('UP', 'DOWN', 'RIGHT', 'LEFT', 'FIRE')  # of ALE's names, such as UPRIGHTFIRE


def action_of(held: frozenset[int], actions: Sequence[str]) -> int:
    """The index in `actions` (ALE's names) of what the held keys ask for.

    Where the game lacks a combination, as many of its keys as it has, FIRE before directions.
    """
    parts = [name for name in _ORDER if held.intersection(_KEYS[name])]
    for size in range(len(parts), 0, -1):
        for chosen in itertools.combinations(reversed(parts), size):
            name = ''.join(part for part in _ORDER if part in chosen)
            if name in actions:
                return actions.index(name)
    return actions.index('NOOP')


def play_in_window(
    games: Sequence[Game], codes: Sequence[int]
) -> Iterator[tuple[list[int], float]]:
    """Lets a person play, with arrows or WASD and space; Escape or closing the window ends it.

    Args:
      games: to play, one after another.
      codes: ALE's code of each action of the action set.

    Yields:
      Indices of the actions of each game, the unfinished one included, and its score.

    Raises:
      UsageError: there is no display.
    """
    if not any(map(os.environ.get, _DISPLAYS)):
        raise _no_display('none of DISPLAY and WAYLAND_DISPLAY is set')
    names = [ale_py.Action(code).name for code in codes]
    try:
        pygame.display.init()
        window = _Window()
        for game in games:
            taken, score = window.play(game, names)
            yield taken, score
            if window.closed:
                return
    except pygame.error as error:
        raise _no_display(str(error)) from error
    finally:
        pygame.display.quit()


def _no_display(reason: str) -> UsageError:
    return UsageError(
        f'--person: no window can be opened ({reason}). Fix: run it on a machine with a screen, or'
        ' record the play of a --policy.'
    )


class _Window:
    """Shows games and reads the keyboard.

    Attributes:
      closed: whether the person has ended the session.
    """

    def __init__(self) -> None:
        self.closed = False
        self._held: set[int] = set()
        self._clock = pygame.time.Clock()

    def play(self, game: Game, names: Sequence[str]) -> tuple[list[int], float]:
        """Plays a game in real time; returns its actions and score."""
        taken: list[int] = []
        score = 0.0
        with Emulator(game, colour=True) as screen:
            height, width, _ = screen.observation.shape
            surface = pygame.display.set_mode((width * _SCALE, height * _SCALE))
            while not (screen.ended or self.closed):
                self._show(surface, screen.observation)
                pygame.display.set_caption(f'{game.environment.game}: {score:g}')
                self._read_keys()
                taken.append(action_of(frozenset(self._held), names))
                score += screen.step(taken[-1])
                self._clock.tick(FRAMES_PER_SECOND / game.environment.action_repeat)
        return taken, score

    def _show(self, surface: pygame.Surface, picture: np.ndarray) -> None:
        enlarged = picture.repeat(_SCALE, 0).repeat(_SCALE, 1)
        pygame.surfarray.blit_array(surface, enlarged.swapaxes(0, 1))
        pygame.display.flip()

    def _read_keys(self) -> None:
        for event in pygame.event.get():
            if event.type == pygame.QUIT:
                self.closed = True
            elif event.type == pygame.KEYDOWN:
                self._held.add(event.key)
                self.closed = self.closed or event.key == pygame.K_ESCAPE
            elif event.type == pygame.KEYUP:
                self._held.discard(event.key)
