"""Redraws the learning curve during the run: a function in, periodic calls in a thread out."""

import logging
import threading
import time
from collections.abc import Callable

_PERIOD_SECONDS = 120.0
_PAUSE_PER_SECOND = 100.0  # of drawing, which thus takes 1 % of the time at most
_CLOSE_SECONDS = 30.0  # usually seconds; longer on a full or hung disk


class Drawing:
    """Calls `draw` periodically in a thread until the block ends.

    The pause is `period_seconds`, or 100 times the duration of the last call if that is longer.
    Errors are logged; the first is also reported.
    """

    def __init__(
        self,
        draw: Callable[[], None],
        notify: Callable[[str], None],
        period_seconds: float = _PERIOD_SECONDS,
        close_seconds: float = _CLOSE_SECONDS,
    ):
        """`notify` is called from the thread; `__exit__` takes `close_seconds` at most."""
        self._draw, self._notify = draw, notify
        self._period, self._close_seconds = period_seconds, close_seconds
        self._failed = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name='drawing', daemon=True)

    def __enter__(self) -> 'Drawing':
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(self._close_seconds)

    def _run(self) -> None:
        pause = self._period
        while not self._closed.wait(pause):
            start = time.monotonic()
            self._try()
            pause = max(self._period, _PAUSE_PER_SECOND * (time.monotonic() - start))

    def _try(self) -> None:
        try:
            self._draw()
        except Exception as error:  # of any kind: the run must continue
            logging.warning('not drawn', exc_info=error)
            if not self._failed:
                self._failed = True
                reason = (str(error) or type(error).__name__).splitlines()[0]
                self._notify(f'learning curve: not drawn, retrying later ({reason})')
