"""Hangs: a worker's signs of progress in, the end of its process out when they stop.

A call that never returns, such as an environment's step, cannot be interrupted from Python, so the
process ends: the engine or the launcher starts its workers again. Its log says where it stood. A
call that keeps Python from running at all is noticed by engine and launcher, which hear nothing.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator

from infra.own_time import OwnTime

_LOOK_SECONDS = 1.0
_EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h


class _Watch:
    """The watched blocks of this process, one a thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[int, tuple[str, float]] = {}  # by thread: name and bound
        self._progress: dict[int, int] = {}  # by thread: number of signs
        self._started = False

    def add(self, name: str, bound_seconds: float) -> None:
        with self._lock:
            self._blocks[threading.get_ident()] = name, bound_seconds
            self.sign()  # an engine's thread may have run an earlier part of this element
            if not self._started:
                self._started = True
                threading.Thread(target=self._run, name='hangs', daemon=True).start()

    def remove(self) -> None:
        with self._lock:
            self._blocks.pop(threading.get_ident(), None)

    def sign(self) -> None:
        thread = threading.get_ident()
        self._progress[thread] = self._progress.get(thread, 0) + 1

    def _run(self) -> None:
        own_time = OwnTime()  # a process that was stopped for a while does not hang
        seen: dict[int, tuple[object, float]] = {}
        while True:
            now = own_time.look()
            with self._lock:
                blocks = dict(self._blocks)
            seen = {thread: held for thread, held in seen.items() if thread in blocks}
            for thread, block in blocks.items():
                state = block, self._progress.get(thread)
                if thread not in seen or seen[thread][0] != state:
                    seen[thread] = state, now
                elif now - seen[thread][1] > block[1]:
                    _end(*block, thread)
            time.sleep(_LOOK_SECONDS)


_WATCH = _Watch()


@contextlib.contextmanager
def watched(name: str, bound_seconds: float) -> Iterator[None]:
    """Ends this process if the thread in the block makes no `progress` for `bound_seconds`."""
    _WATCH.add(name, bound_seconds)
    try:
        yield
    finally:
        _WATCH.remove()


def progress() -> None:
    """Notes that the calling thread has come further; costs less than a microsecond."""
    _WATCH.sign()


def _end(name: str, bound_seconds: float, thread: int) -> None:
    """Says where the thread stands and ends the process."""
    frame = sys._current_frames().get(thread)
    stack = ''.join(traceback.format_stack(frame)) if frame else 'its thread has ended\n'
    print(
        f'{stack}{name}: no step and no update for {bound_seconds:g} s (--hang_seconds); the log'
        ' says above this line where it stands; its process ends so that it is started again',
        file=sys.stderr,
        flush=True,
    )
    os._exit(_EXIT_CODE)
