"""Work within a bound: a function in, what it returns out, or an error if it stands still.

A step of an environment that never returns cannot be interrupted from Python. So the work has a
thread, which is left alone if it hangs. A call that keeps Python from running at all escapes that.
"""

import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable
from typing import Generic, TypeVar

from infra.own_time import OwnTime
from pipelines.evaluation.play import CancelledError

_LOOK_SECONDS = 1.0
_END_SECONDS = 2.0
_LIBRARY = sysconfig.get_path('stdlib')
_PACKAGES = 'site-packages'  # are below it

Result = TypeVar('Result')
Asked = Callable[[], bool]
"""Asked by the work at every step, which shows that it goes on; returns whether to stop."""


class HungError(Exception):
    """Work stood still for too long."""


def within(
    hang_seconds: float, work: Callable[[Asked], Result], cancelled: Asked = lambda: False
) -> Result:
    """Calls `work` in a thread; leaves it alone if it stands still.

    Args:
      hang_seconds: allowed until the work first asks whether to stop, and between two such
        questions; pauses of this process do not count.
      work: called once; its result, or its error, is that of this call.
      cancelled: whether to stop; asked in both threads.

    Raises:
      HungError: the work took longer between two questions.
      CancelledError: `cancelled()` returned True; work that does not stop within 2 s is left alone.
      RuntimeError: the work raised what is no `Exception`, such as SystemExit.
    """
    thread = _Working(work, cancelled)
    try:
        thread.start()
        _await(thread, hang_seconds, cancelled)
    except HungError:
        thread.left = True
        raise
    except BaseException:  # a signal, in the main thread
        thread.left = True
        thread.ended.wait(_END_SECONDS)
        raise
    return thread.result()


def _await(thread: '_Working', hang_seconds: float, cancelled: Asked) -> None:
    """Waits for the end of the work.

    Raises:
      HungError, CancelledError: see `within`.
    """
    own_time = OwnTime()
    questions, since = 0, 0.0
    while True:
        if thread.ended.wait(_LOOK_SECONDS):
            return
        now = own_time.look()
        if thread.questions != questions:
            questions, since = thread.questions, now
        if cancelled() and now - since > _END_SECONDS:
            raise CancelledError
        if now - since > hang_seconds:
            raise HungError(f'no step for {hang_seconds:g} s (--hang_seconds), at {thread.place()}')


class _Working(threading.Thread, Generic[Result]):
    """Works.

    Attributes:
      ended: set at the end. A signal that interrupts `join` may let it take a thread that works
        for one that has ended (CPython 3.11).
      questions: asked so far.
      left: whether the result is no longer awaited, which ends the work at its next question.
    """

    def __init__(self, work: Callable[[Asked], Result], cancelled: Asked):
        super().__init__(name='within', daemon=True)
        self._work, self._cancelled = work, cancelled
        self._results: list[Result] = []
        self._error: BaseException | None = None
        self.ended = threading.Event()
        self.questions = 0
        self.left = False

    def run(self) -> None:
        """Keeps the result, or the error."""
        try:
            self._results.append(self._work(self._asked))
        except BaseException as error:  # raised again in the thread that waits
            self._error = error
        finally:
            self.ended.set()

    def _asked(self) -> bool:
        self.questions += 1
        return self.left or self._cancelled()

    def result(self) -> Result:
        """The result of work that has ended; raises its error."""
        error, self._error = self._error, None  # whose traceback holds this thread
        if error is None:
            return self._results.pop()
        try:
            if isinstance(error, Exception):
                raise error
            raise RuntimeError(f'raised {error!r}') from error
        finally:
            del error

    def place(self) -> str:
        """File and line where the work stands, as far as it is not in Python's library."""
        assert self.ident is not None
        frame = sys._current_frames().get(self.ident)
        places = [(each.filename, each.lineno) for each in traceback.extract_stack(frame)]
        own = [place for place in places if not _in_library(place[0])]
        file, line = (own or places)[-1]
        return f'{file}:{line}'


def _in_library(file: str) -> bool:
    return file.startswith((_LIBRARY, '<')) and _PACKAGES not in file
