"""Runs the evaluator of a run as a process: starts, restarts, its CPU time and its end.

Its scores come by a file (pipelines/monitoring/evaluations.py). A run neither fails nor waits
because of it.
"""

import contextlib
import logging
import pathlib
import signal
import sys
import time
from collections.abc import Callable

from infra.own_time import OwnTime
from infra.process import (
    ProcessSpec,
    SupervisedProcess,
    back_off_seconds,
    cpu_seconds,
    describe_exit,
)
from pipelines.evaluation.allowance import rate_of
from pipelines.experiment.config import ExperimentConfig
from pipelines.storage.run_directory import RunDirectory
from pipelines.storage.snapshots import ALIVE_FILE, WORK

_MAX_FAILURES = 5  # in a row, without an evaluation
_BACK_OFF_SECONDS = 10.0
_LONGEST_BACK_OFF_SECONDS = 300.0
_HUNG_SECONDS = 900.0  # its start takes minutes on a busy machine, since its priority is low
_END_SECONDS = 2.0
_NICE = 19
_LAUNCH_FILE = 'launch'  # dates the launch


class EvaluatorProcess:
    """The evaluator of a run; started when the first evaluation is due, restarted when it dies.

    Attributes:
      cpu_seconds: CPU time that it has used since the launch, restarts included.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        directory: RunDirectory,
        wall_seconds: float,
        tell: Callable[[str], None],
    ):
        """Starts nothing yet.

        Args:
          config, directory: of the run.
          wall_seconds: that the run has trained so far.
          tell: receives a line for each failure.
        """
        self._config, self._directory, self._tell = config, directory, tell
        self._since = _launch_time(directory) if config.run.evaluator_cpu_share else 0.0
        self._origin = self._since - wall_seconds
        self._rate = rate_of(config.run.evaluator_cpu_share)
        self._alive_file = directory.path / WORK / ALIVE_FILE
        self._own_time = OwnTime()
        self._first_start: float | None = None
        self._due, self._failures, self._number = 0.0, 0, 0
        self._process: SupervisedProcess | None = None  # the one that is running
        self._over = not self._rate
        self._sign: tuple[float, float] = (0.0, 0.0)  # last sign of life, and when it was new
        self.cpu_seconds = self._cpu_before = 0.0

    @property
    def pid(self) -> int | None:
        """Process ID while it is running and wanted, else None."""
        return None if self._process is None or self._over else self._process.pid

    def look(self, updates: int, evaluated: int, number: int) -> None:
        """Starts or restarts the evaluator if it is due.

        Args:
          updates: of the run.
          evaluated: updates of the last evaluation.
          number: of evaluations; a new one ends a series of failures.
        """
        if self._over:
            return
        try:
            self._look(updates, evaluated, number)
        except Exception as error:  # of any kind: the run must continue
            logging.exception('evaluator')
            self._give_up(f'unexpected {type(error).__name__}: {error}')

    def _look(self, updates: int, evaluated: int, number: int) -> None:
        now = self._own_time.look()
        if number > self._number:
            self._number, self._failures = number, 0
        if self._process is not None:
            self._watch(self._process, now)
        elif now >= self._due and updates - evaluated >= self._config.run.evaluation_period_updates:
            self._start(evaluated, now)

    def _start(self, evaluated: int, now: float) -> None:
        self._first_start = now if self._first_start is None else self._first_start
        self._cpu_before = self.cpu_seconds
        process = SupervisedProcess(self._spec(evaluated, now - self._first_start))
        process.start()
        self._process, self._sign = process, (self._sign[0], now)

    def _watch(self, process: SupervisedProcess, now: float) -> None:
        self._measure(process)
        if (code := process.poll()) is not None:
            self._process = None
            self._failed(now, f'{describe_exit(code)}{_in_brackets(process.last_error())}')
        elif self._silence(now) > _HUNG_SECONDS:
            self._tell(f'evaluator: no sign of life for {_HUNG_SECONDS:.0f} s, killed')
            process.signal(signal.SIGKILL)
            self._sign = self._sign[0], now

    def _silence(self, now: float) -> float:
        """Seconds since the last new sign of life."""
        with contextlib.suppress(OSError):
            if (sign := self._alive_file.stat().st_mtime) != self._sign[0]:
                self._sign = sign, now
        return now - self._sign[1]

    def _measure(self, process: SupervisedProcess) -> None:
        if process.pid is not None and (used := cpu_seconds(process.pid)) is not None:
            self.cpu_seconds = self._cpu_before + used

    def _failed(self, now: float, how: str) -> None:
        self._failures += 1
        if self._failures >= _MAX_FAILURES:
            self._give_up(f'failed {_MAX_FAILURES} times in a row (last: {how})')
            return
        delay = back_off_seconds(self._failures, _BACK_OFF_SECONDS, _LONGEST_BACK_OFF_SECONDS)
        self._due = now + delay
        self._tell(
            f'evaluator: {how}, failure {self._failures} in a row ({_MAX_FAILURES} end the'
            f' evaluations); log: {self._log_file}'
        )

    def _give_up(self, reason: str) -> None:
        self.stop()
        self._tell(
            f'evaluator: {reason}; training continues without evaluations; log: {self._log_file}'
        )

    def stop(self) -> None:
        """Asks the evaluator to end and does not wait; it is not started again."""
        self._over = True
        if self._process is not None:
            self._measure(self._process)
            self._process.signal(signal.SIGTERM)

    def close(self) -> None:
        """Ends the evaluator, within seconds."""
        self.stop()
        if self._process is not None:
            self._process.terminate(_END_SECONDS)
            self._process = None

    @property
    def _log_file(self) -> pathlib.Path:
        return self._directory.logs / 'evaluator.log'

    def _spec(self, evaluated: int, seconds: float) -> ProcessSpec:
        """The process, `seconds` after the first start; CPU time above the share is a debt."""
        debt = max(0.0, self.cpu_seconds - self._rate * seconds)
        return ProcessSpec(
            name='evaluator',
            argv=[
                sys.executable,
                '-m',
                'pipelines.evaluator',
                str(self._directory.path),
                f'--since={self._since!r}',
                f'--origin={self._origin:.3f}',
                f'--updates={evaluated}',
                f'--debt_seconds={debt:.3f}',
            ],
            log_file=self._log_file,
            environment={
                'TF_CPP_MIN_LOG_LEVEL': '2',
                'TF_NUM_INTRAOP_THREADS': '1',
                'TF_NUM_INTEROP_THREADS': '1',
                'CUDA_VISIBLE_DEVICES': '-1',  # accelerators are for learners
            },
            unset=('PYTHONDONTWRITEBYTECODE',),
            nice=_NICE,
        )


def _launch_time(directory: RunDirectory) -> float:
    """Now, in seconds since 1970, by the clock of the directory's file system.

    Snapshots are dated by it; that of a network's server may differ from this machine's.
    """
    file = directory.path / WORK / _LAUNCH_FILE
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b'\n')
        return file.stat().st_mtime
    except OSError:  # a full disk: reported by whoever writes results
        return time.time()


def _in_brackets(text: str) -> str:
    return f' ({text})' if text else ''
