"""Standard output that never ends a process: it drops text that it cannot write.

In: the terminal, pipe or file of a process. Out: `sys.stdout` and `sys.stderr` that raise no error
if the terminal or reader is gone or the disk is full. They wait a bounded time for a reader that
pauses (Ctrl-S, a pager).
"""

import contextlib
import io
import os
import select
import stat
import sys
from typing import Any, TextIO

_PATIENCE_SECONDS = 2.0


class _Unfailing(io.FileIO):
    """A file whose writes never fail."""

    _patience = _PATIENCE_SECONDS

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast('B')
        size = len(rest)
        with contextlib.suppress(OSError):  # permanent (EIO, EPIPE) or temporary (a full disk)
            while rest:
                written = super().write(rest)
                if written is not None:
                    rest, self._patience = rest[written:], _PATIENCE_SECONDS
                elif not select.select((), (self,), (), self._patience)[1]:
                    self._patience = 0.0  # until the reader resumes
                    break
        return size


def _reopened(descriptor: int) -> int:
    """Another descriptor of the same file; writes to a terminal or pipe do not block.

    The given descriptor keeps its mode, because other processes such as the shell share it. It may
    later lead elsewhere: `pipelines/launch/evaluation_job.py` redirects that of worker processes.
    """
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        with contextlib.suppress(OSError):  # the reader is gone, or another user's terminal
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
            return os.open(f'/proc/self/fd/{descriptor}', flags)
    return os.dup(descriptor)


def protect_output() -> None:
    """Prevents prints from failing; not for commands whose purpose is their output."""
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115  (until the process ends)
            continue
        raw = _Unfailing(_reopened(stream.fileno()), 'w', closefd=False)
        protected = io.TextIOWrapper(
            raw if stream.write_through else io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors='backslashreplace',
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, protected)


def last_words(stream: TextIO, text: str) -> None:
    """Prints from a signal handler before `_exit`, even if it interrupted a print."""
    with contextlib.suppress(OSError, ValueError):  # the terminal is gone, or the stream closed
        os.write(stream.fileno(), text.encode(errors='backslashreplace'))
