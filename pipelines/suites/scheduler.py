"""Runs of a suite as processes of run.py, so many at once: a plan in, finished directories out.

A failed run is tried once more, after the others. A process is in a session of its own: Ctrl-C
reaches it only from here, once.
"""

import contextlib
import dataclasses
import math
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Sequence

from infra.disk import lock_holder
from infra.process import ProcessSpec, SupervisedProcess, describe_exit
from pipelines.suites import standing
from pipelines.suites.directory import SuiteDirectory
from pipelines.suites.plan import Run
from pipelines.suites.standing import END_SECONDS, Figures, Stage

WAITING, RUNNING, DONE, FAILED, STOPPED = 'waiting', 'running', 'done', 'failed', 'stopped'

_ATTEMPTS = 2
_LOG_LINES = 100
_PROBLEM = 'run.py: '
_ENDED_BY = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_RUN_FLAGS = {Stage.NEW: (), Stage.HALF: ('--resume',)}


@dataclasses.dataclass
class Entry:
    """A run and how far it is.

    Attributes:
      state: one of the constants of this module.
      attempts: how often this suite process has started it.
      started: when the last attempt was, by the monotonic clock.
      seconds: that the last attempt has taken.
      frames_before: that it began with.
      reason: why it failed.
      process: of the attempt, if it is running.
    """

    run: Run
    path: pathlib.Path
    log: pathlib.Path
    state: str = WAITING
    figures: Figures = dataclasses.field(default_factory=Figures)
    attempts: int = 0
    started: float = 0.0
    seconds: float = 0.0
    frames_before: int = 0
    reason: str = ''
    process: SupervisedProcess | None = None


class Scheduler:
    """Starts and watches the runs. Call `poll` about every second; a context manager.

    Attributes:
      entries: one for each run, in the order of the plan.
      notify: receives lines for the user.
      stopping: whether the user has requested the end; nothing starts any more.
    """

    def __init__(
        self,
        directory: SuiteDirectory,
        runs: Sequence[Run],
        parallel: int,
        notify: Callable[[str], None],
    ):
        """Reads how far each run is."""
        self._directory = directory
        self._parallel = parallel
        self.notify = notify
        self._opened = time.monotonic()
        self._deadline = math.inf  # for the runs to end, once the user has asked for it
        self.stopping = False
        self.entries = [Entry(run, directory.run(run), directory.log(run)) for run in runs]
        for entry in self.entries:
            entry.figures = standing.recorded(entry.path, entry.figures)
            if self._stage(entry) is Stage.DONE and self._holder(entry) is None:
                entry.state = DONE

    @property
    def active(self) -> bool:
        """Whether a run is running, or waits and will be started."""
        states = {entry.state for entry in self.entries}
        return RUNNING in states or (WAITING in states and not self.stopping)

    def of(self, state: str) -> list[Entry]:
        """The entries in a state."""
        return [entry for entry in self.entries if entry.state == state]

    def poll(self) -> None:
        """Notes which runs have ended, reads what the others print, and starts new ones."""
        late = time.monotonic() > self._deadline
        for entry in self.of(RUNNING):
            process = entry.process
            assert process is not None
            lines = process.last_log_lines(_LOG_LINES)
            entry.figures = standing.printed(lines, entry.figures)
            entry.seconds = time.monotonic() - entry.started
            code = process.terminate() if late else process.poll()
            if code is not None:
                self._ended(entry, process, code)
        waiting = [] if self.stopping else self.of(WAITING)
        held = [entry for entry in waiting if self._held(entry)]
        free = self._parallel - len(self.of(RUNNING)) - len(held)
        # Those that failed last.
        for entry in sorted(waiting, key=lambda entry: entry.attempts):
            if free > 0 and entry not in held and entry.state == WAITING:
                free -= self._try(entry)

    def interrupt(self) -> None:
        """Asks the active runs to end with a checkpoint; a second call, to end at once."""
        self.stopping = True
        self._deadline = min(self._deadline, time.monotonic() + END_SECONDS)
        for entry in self.of(RUNNING):
            assert entry.process is not None
            entry.process.signal(signal.SIGINT)

    def __enter__(self) -> 'Scheduler':
        return self

    def __exit__(self, *exception: object) -> None:
        """Kills what is still running, after an error of the suite itself."""
        for entry in self.of(RUNNING):
            assert entry.process is not None
            entry.process.terminate()

    def _held(self, entry: Entry) -> bool:
        """Whether to wait, since a process of another suite or user is in the run's directory."""
        holder = self._holder(entry)
        if holder is None:
            return False
        if time.monotonic() > max(self._opened, entry.started + entry.seconds) + END_SECONDS:
            entry.attempts = _ATTEMPTS
            self._fail(entry, f'its directory is in use by process {holder}')
            return False
        text = f'process {holder} and what it has started end'
        entry.figures = dataclasses.replace(entry.figures, phase=text)
        return True

    def _try(self, entry: Entry) -> bool:
        """Starts the next attempt; returns whether it is running."""
        entry.attempts += 1
        try:
            stage = self._stage(entry)
            if stage is Stage.DONE:  # by the process that held it
                entry.figures = standing.recorded(entry.path, entry.figures)
                entry.state = DONE
                return False
            if stage is Stage.NEW:
                self._directory.clear(entry.run)
            entry.process = SupervisedProcess(self._spec(entry, stage))
            entry.process.start()
        except OSError as error:
            self._fail(entry, f'not started ({error})')
            return False
        entry.state, entry.reason = RUNNING, ''
        entry.started, entry.frames_before = time.monotonic(), entry.figures.frames or 0
        entry.figures = dataclasses.replace(entry.figures, phase='starting')
        return True

    def _spec(self, entry: Entry, stage: Stage) -> ProcessSpec:
        """The process that trains and evaluates a run, or does what is left of that."""
        argv = [f'--run_dir={entry.path}', *entry.run.argv, *_RUN_FLAGS[stage]]
        return ProcessSpec(
            name=entry.run.name,
            argv=[sys.executable, '-m', 'pipelines.run', *argv],
            log_file=entry.log,
            unset=('PYTHONDONTWRITEBYTECODE',),  # imports of TensorFlow take twice as long
        )

    def _ended(self, entry: Entry, process: SupervisedProcess, code: int) -> None:
        entry.process = None
        entry.figures = standing.recorded(entry.path, entry.figures)
        if self._stage(entry) is Stage.DONE:
            entry.state = DONE
        elif self.stopping:
            entry.state = STOPPED
        elif code - 128 in _ENDED_BY or -code in _ENDED_BY:
            entry.attempts = _ATTEMPTS  # a user stopped this run
            self._fail(entry, f'stopped by {signal.Signals(abs(code) % 128).name}')
        else:
            self._fail(entry, _reason(process, code))

    def _fail(self, entry: Entry, reason: str) -> None:
        again = entry.attempts < _ATTEMPTS
        entry.state, entry.reason = (WAITING if again else FAILED), reason
        then = 'tried once more later' if again else f'log: {entry.log}'
        self.notify(f'{entry.run.name}: failed: {reason}; {then}')

    def _stage(self, entry: Entry) -> Stage:
        return standing.stage(entry.path, entry.run.max_frames)

    def _holder(self, entry: Entry) -> int | None:
        """ID of the process that holds the directory of a waiting run, dead or alive."""
        with contextlib.suppress(OSError):
            return lock_holder(entry.path)
        return None


def _reason(process: SupervisedProcess, code: int) -> str:
    """Why a run failed: what run.py said last about it, else how it ended."""
    for line in reversed(process.last_log_lines(_LOG_LINES)):
        _, found, text = line.partition(_PROBLEM)
        if found and '--resume continues' not in text:
            return text
    error = process.last_error()
    return describe_exit(code) + (f' ({error})' if error else '')
