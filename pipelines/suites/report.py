"""The report of a suite, written by pipelines/report.py in a process of its own.

In: the directories of finished runs. Out: one HTML page. Its failure does not fail the suite.
"""

import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence

from infra.process import ProcessSpec, SupervisedProcess

_WRITE_SECONDS = 900.0
_NICE = 10  # yields to training


class Report:
    """Writes the page again and again, one process at a time. A context manager."""

    def __init__(self, page: pathlib.Path, log: pathlib.Path, notify: Callable[[str], None]):
        """`notify` receives a line if the page cannot be written."""
        self._page, self._log, self._notify = page, log, notify
        self._process: SupervisedProcess | None = None
        self._started = 0.0
        self._runs: tuple[pathlib.Path, ...] = ()
        self._wanted: tuple[pathlib.Path, ...] = ()

    @property
    def active(self) -> bool:
        """Whether the page is being written, or has to be."""
        return self._process is not None or self._wanted != self._runs

    def request(self, runs: Sequence[pathlib.Path]) -> None:
        """Asks for a page of these finished runs, unless it exists."""
        self._wanted = tuple(runs)

    def poll(self) -> None:
        """Notes whether a process has ended, and starts the next."""
        if self._process is not None:
            code = self._process.poll()
            if code is None and time.monotonic() > self._started + _WRITE_SECONDS:
                code = self._process.terminate()
            if code is None:
                return
            if code != 0:
                self._complain(self._process)
            self._process = None
        if self._wanted != self._runs:
            self._start()

    def __enter__(self) -> 'Report':
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            self._process.terminate()

    def _argv(self) -> list[str]:
        return [*map(str, self._wanted), f'--output={self._page}']

    def _start(self) -> None:
        argv = [sys.executable, '-m', 'pipelines.report', *self._argv()]
        process = SupervisedProcess(ProcessSpec('report', argv, self._log, nice=_NICE))
        self._runs, self._started = self._wanted, time.monotonic()
        try:
            process.start()
            self._process = process
        except OSError as error:
            self._notify(f'report: not started ({error})')

    def _complain(self, process: SupervisedProcess) -> None:
        last = ''.join(process.last_log_lines(1))
        self._notify(
            f'report: not written ({last}). Fix: see {self._log}, then run `python'
            f' pipelines/report.py {shlex.join(self._argv())}`.'
        )
