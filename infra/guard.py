"""Guards loops against unexpected errors: an act in, its error as one line and a log entry out."""

import logging
import os
import traceback
from collections import Counter
from collections.abc import Callable

_MOST_IN_A_ROW = 20  # takes 4 s in the loop that watches servers, 10 s in the one for a run
_LONGEST_REASON = 200
_LOGGER = logging.getLogger(__name__)


class UnforeseenError(Exception):
    """An act failed too often in a row with unexpected errors."""


class Guard:
    """Calls acts; reports and logs an unexpected error once for each place in the code."""

    def __init__(self, tell: Callable[[str], None], foreseen: tuple[type[Exception], ...] = ()):
        """
        Args:
          tell: receives one line for each new error.
          foreseen: errors that the caller handles; `attempt` raises them.
        """
        self._tell, self._foreseen = tell, foreseen
        self._told: set[tuple[type[Exception], str]] = set()
        self._in_a_row: Counter[Callable[[], object]] = Counter()

    def attempt(self, act: Callable[[], object], at_any_rate: bool = False) -> None:
        """Calls `act` and reports an unexpected error instead of raising it.

        Args:
          act: called once.
          at_any_rate: whether to raise no error at all, foreseen or repeated.

        Raises:
          UnforeseenError: this act failed for the 20th time in a row.
        """
        try:
            act()
        except Exception as error:
            if isinstance(error, self._foreseen) and not at_any_rate:
                self._told.add(_kind(error))  # the caller reports it
                raise
            self._in_a_row[act] += 1
            self._note(error)
            if self._in_a_row[act] >= _MOST_IN_A_ROW and not at_any_rate:
                raise UnforeseenError(
                    f'{_described(error)}, {_MOST_IN_A_ROW} times in a row; the log has the'
                    ' traceback'
                ) from error
        else:
            del self._in_a_row[act]

    def _note(self, error: Exception) -> None:
        if _kind(error) in self._told:
            return
        self._told.add(_kind(error))
        _LOGGER.error('unexpected', exc_info=error)
        self._tell(f'launcher: {_described(error)}; going on, the log has the traceback')


def _kind(error: Exception) -> tuple[type[Exception], str]:
    """Equal for errors of one cause: one place in the code, or one reason of the system."""
    if isinstance(error, OSError) and error.errno is not None:
        return type(error), os.strerror(error.errno)
    return type(error), _place(error)


def _place(error: Exception) -> str:
    """File and line where the error was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f'{os.path.basename(frame.filename)}:{frame.lineno}'


def _described(error: Exception) -> str:
    reason = ' '.join(str(error).split())[:_LONGEST_REASON]
    return f'{type(error).__name__}: {reason or "no reason"} ({_place(error)})'
