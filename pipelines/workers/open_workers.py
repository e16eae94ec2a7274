"""The workers that are open in this process: kept from one part of an element to the next.

An element that checkpoints itself ends here and continues in any process. In this one its
continuation takes the open worker, with its games, network and connections, within milliseconds;
in another one it opens a new worker, which takes seconds. A worker whose continuation is elsewhere
is closed after a while.
"""

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

_IDLE_SECONDS = 60.0  # an engine hands out a continuation within some


class LeftBehindError(Exception):
    """Closes a worker whose element continues in another process: it has not ended."""


@dataclasses.dataclass(eq=False)
class Lease:
    """An open worker, used by one element at a time.

    Attributes:
      worker: as opened.
      stack: closes it.
      keep: whether it stays open at the end of the `with`, for a continuation.
      times_kept: so far.
    """

    worker: Any
    stack: contextlib.ExitStack
    keep: bool = False
    times_kept: int = 0


class OpenWorkers:
    """Leases workers by a key. Thread-safe."""

    def __init__(self, idle_seconds: float = _IDLE_SECONDS) -> None:
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._idle: dict[Hashable, Lease] = {}

    @contextlib.contextmanager
    def lease(
        self, key: Hashable, opened: Callable[[], contextlib.AbstractContextManager]
    ) -> Iterator[Lease]:
        """Yields the worker that was kept under `key`, otherwise a new one.

        Closes it at the end of the `with`, unless it is to be kept and no error was raised.
        """
        with self._lock:
            lease = self._idle.pop(key, None)
        if lease is None:
            stack = contextlib.ExitStack()
            lease = Lease(stack.enter_context(opened()), stack)
        lease.keep = False
        try:
            yield lease
        except BaseException:
            lease.stack.__exit__(*sys.exc_info())
            raise
        if lease.keep:
            self._keep(key, lease)
        else:
            lease.stack.close()

    def _keep(self, key: Hashable, lease: Lease) -> None:
        lease.times_kept += 1
        with self._lock:
            before = self._idle.get(key)
            self._idle[key] = lease
        if before is not None:  # of an element that the engine has run twice at a time
            _leave(before)
        timer = threading.Timer(self._idle_seconds, self._expire, (key, lease, lease.times_kept))
        timer.daemon = True
        timer.start()

    def _expire(self, key: Hashable, lease: Lease, times_kept: int) -> None:
        with self._lock:
            if self._idle.get(key) is not lease or lease.times_kept != times_kept:
                return
            del self._idle[key]
        _leave(lease)


def _leave(lease: Lease) -> None:
    error = LeftBehindError()
    with contextlib.suppress(LeftBehindError):
        lease.stack.__exit__(LeftBehindError, error, None)


OPEN_WORKERS = OpenWorkers()
"""Those of this process."""
