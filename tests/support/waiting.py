"""Bounded waits for what another process does."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path


def eventually(condition: Callable[[], bool], timeout_seconds: float = 15.0) -> bool:
    """Whether `condition` came true within the bound."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only its entry waits to be collected."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return True


def pause(pid: int) -> None:
    """Makes a process hang until SIGCONT; every thread of it has stopped when this returns."""
    os.kill(pid, signal.SIGSTOP)
    assert eventually(lambda: _states(pid) == {'T'}), _states(pid)


def _states(pid: int) -> set[str]:
    states = set()
    for thread in Path(f'/proc/{pid}/task').glob('*/stat'):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            states.add(thread.read_text().rpartition(')')[2].split()[0])
    return states
