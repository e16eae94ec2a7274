"""An evaluation game within a bound: its rules and a policy in, its score or an error out.

A step of an environment that never returns cannot be interrupted from Python. So a game has a
thread of its own, which is left alone if it hangs.
"""

import sys
import threading
import traceback
from collections.abc import Callable

from infra.own_time import OwnTime
from pipelines.evaluation.play import Act, CancelledError, Game, Score, play

_LOOK_SECONDS = 1.0
_END_SECONDS = 2.0


class HungError(Exception):
    """A game took too long for a step, or to begin."""


def play_within(
    hang_seconds: float, game: Game, act: Act, cancelled: Callable[[], bool] = lambda: False
) -> Score:
    """Plays a game, each step of which takes `hang_seconds` at most, and so does its begin.

    Args:
      hang_seconds: without pauses of this process.
      game, act, cancelled: as for `play`; `act` and `cancelled` are called in another thread.

    Raises:
      HungError: a step took longer; the thread that plays is left alone.
      CancelledError: `cancelled()` returned True; a thread that hangs is left alone.
      Exception: of any kind, whatever `play` raises.
    """
    playing = _Playing(game, act, cancelled)
    playing.start()
    own_time = OwnTime()  # a process that was stopped for a while does not hang
    steps, since = 0, 0.0
    while True:
        playing.join(_LOOK_SECONDS)
        if not playing.is_alive():
            return playing.result()
        now = own_time.look()
        if playing.steps != steps:
            steps, since = playing.steps, now
        if cancelled() and now - since > _END_SECONDS:
            raise CancelledError
        if now - since > hang_seconds:
            playing.left = True
            raise HungError(
                f'no step for {hang_seconds:g} s (--hang_seconds), at {playing.place()}'
            )


class _Playing(threading.Thread):
    """Plays a game.

    Attributes:
      steps: begun so far.
      left: whether nobody waits for the result any more; set by the thread that started this one.
    """

    def __init__(self, game: Game, act: Act, cancelled: Callable[[], bool]):
        super().__init__(name=f'game {game.episode}', daemon=True)
        self._game, self._act, self._cancelled = game, act, cancelled
        self._score: Score | None = None
        self._error: BaseException | None = None
        self.steps = 0
        self.left = False

    def run(self) -> None:
        """Keeps the score, or the error."""
        try:
            self._score = play(self._game, self._act, cancelled=self._asked)
        except BaseException as error:  # raised again in the thread that waits
            self._error = error

    def _asked(self) -> bool:
        self.steps += 1
        return self.left or self._cancelled()

    def result(self) -> Score:
        """The score of a game that has ended; raises its error."""
        if self._error is not None:
            raise self._error
        assert self._score is not None
        return self._score

    def place(self) -> str:
        """File and line where the game stands."""
        frame = sys._current_frames().get(self.ident or 0)
        if frame is None:
            return 'its end'
        (last,) = traceback.extract_stack(frame, limit=1)
        return f'{last.filename}:{last.lineno}'
