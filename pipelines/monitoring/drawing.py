"""Draws the learning curve again and again: a function in, calls of it in a thread out."""

import logging
import threading
import time
from collections.abc import Callable

_PERIOD_SECONDS = 120.0
_PAUSE_PER_SECOND = 100.0  # of drawing, so that it takes 1 % of the time at most
_CLOSE_SECONDS = 30.0  # a drawing takes seconds; a full disk or a hung one may take longer


class Drawing:
    """Calls `draw` now and then while the block is running; a context manager.

    Between two calls are `period_seconds`, or 100 times what the last one took, if that is longer.
    An error ends nothing; the first is shown.
    """

    def __init__(
        self,
        draw: Callable[[], None],
        tell: Callable[[str], None],
        period_seconds: float = _PERIOD_SECONDS,
        close_seconds: float = _CLOSE_SECONDS,
    ):
        """`tell` is called from the thread; leaving the block takes `close_seconds` at most."""
        self._draw, self._tell = draw, tell
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
        except Exception as error:  # of any kind: a picture is not worth the run
            logging.warning('not drawn', exc_info=error)
            if not self._failed:
                self._failed = True
                reason = (str(error) or type(error).__name__).splitlines()[0]
                self._tell(f'learning curve: not drawn, to be tried again ({reason})')
