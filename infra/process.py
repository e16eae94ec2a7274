"""Processes of a run: a supervised child, and a child that never outlives its parent.

In: an argument vector, environment variables and a log file. Out: a running process, its readiness,
its exit code and its last lines. Uses the standard library only, so that servers import it quickly.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from infra.disk import shared_locks, write_atomically
from infra.sealed import parse_object

LAUNCHER_VARIABLE = 'GORILA_LAUNCHER_PID'
"""Environment variable with the process ID of the launcher whose death ends this process."""

_ORPHAN_POLL_SECONDS = 1.0
_ORPHAN_GRACE_SECONDS = 5.0
_WAIT_POLL_SECONDS = 0.02
_LAST_PORT = 65_535
_KILL_SECONDS = 10.0  # the kernel may need a moment to free gigabytes
_LOG_TAIL_BYTES = 64 * 1024
_ERROR_LINES = 200  # searched for the error, since other threads and workers may write after it
_ROOT = Path(__file__).resolve().parents[1]
_START_MARK = '=== '
_ERROR_LINE = re.compile(
    r'([\w.]+(Error|Exception|Exit)|Fatal .*|Killed|\S*python[\d.]*: .*'
    r'|worker process .* return code -\d+)(:|$)'  # a worker killed by a signal writes no error
)
_HANG_LINE = re.compile(r'\w+ \d+: no step and no update for ')
_ENGINE_ERROR = 'grpc.'  # the engine's, which follows from the end of a worker's process

_watching = threading.Lock()


def await_release() -> bool:
    """Waits for `SupervisedProcess.release`; returns false if the parent has ended before it."""
    return bool(sys.stdin.buffer.readline())


def exit_with_parent(grace_seconds: float = _ORPHAN_GRACE_SECONDS) -> None:
    """Makes this process end within seconds of its parent's death, even by `kill -9`.

    A daemon thread polls the parent's process ID. PR_SET_PDEATHSIG does not work here: the kernel
    sends it when the *thread* that forked ends, and a supervisor may restart servers from a thread.
    The process receives SIGTERM first and SIGKILL `grace_seconds` later. Repeated calls have no
    effect.
    """
    if not _watching.acquire(blocking=False):
        return
    parent = os.getppid()
    launcher = int(os.environ.get(LAUNCHER_VARIABLE, parent))
    threading.Thread(
        target=_end_when_orphaned,
        args=(parent, launcher, grace_seconds),
        name='exit_with_parent',
        daemon=True,
    ).start()


def exit_with_launcher(grace_seconds: float = _ORPHAN_GRACE_SECONDS) -> None:
    """Calls `exit_with_parent` if a launcher started this process, not a user (under `nohup`)."""
    if LAUNCHER_VARIABLE in os.environ:
        exit_with_parent(grace_seconds)


def end_signals() -> tuple[signal.Signals, ...]:
    """Signals that request an orderly end: SIGTERM, and SIGHUP of a lost terminal.

    Excludes SIGHUP under `nohup`, which makes processes ignore it.
    """
    heard = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGHUP) if heard else (signal.SIGTERM,)


def is_alive(pid: int) -> bool:
    """Whether a process with this ID exists (a zombie counts)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def cpu_seconds(pid: int) -> float | None:
    """CPU seconds of a process and its ended children; None if there is no such process."""
    try:
        fields = Path(f'/proc/{pid}/stat').read_text(errors='replace').rpartition(')')[2].split()
    except OSError:
        return None
    # utime, stime, cutime and cstime: fields 14 to 17 of proc(5), the third is the first here.
    return sum(map(int, fields[11:15])) / os.sysconf('SC_CLK_TCK')


def descendants(pid: int) -> list[int]:
    """IDs of the processes that a process has started, and of those that they have."""
    parents: dict[int, int] = {}
    for file in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):  # gone
            stat = file.read_text(errors='replace')  # a name may be cut within a character
            parents[int(file.parent.name)] = int(stat.rpartition(')')[2].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


def back_off_seconds(failures: int, first: float, longest: float) -> float:
    """Delay before the next start after so many failures in a row: doubles up to `longest`."""
    return min(longest, first * 2.0 ** min(failures - 1, 30))


def announce_ready(ready_file: str | os.PathLike[str], port: int) -> None:
    """Writes `{"port": port, "pid": own ID}` to `ready_file` atomically."""
    write_atomically(Path(ready_file), json.dumps({'port': port, 'pid': os.getpid()}))


def _end_when_orphaned(parent: int, launcher: int, grace_seconds: float) -> None:
    # Polls the launcher too. It may have died before this process read its parent's ID, and a shell
    # or `nice` may be the parent.
    while os.getppid() == parent and is_alive(launcher):
        time.sleep(_ORPHAN_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_seconds)
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class ProcessSpec:
    """A process to start.

    Attributes:
      name: used in messages, such as `parameter_server_0`.
      argv: the command, program first.
      log_file: receives standard output and error, appended.
      ready_file: written by the process when it is ready (`announce_ready`); None for no such file.
      environment: variables that extend or replace the parent's.
      unset: the parent's variables to remove.
      nice: added to the parent's nice level.
      held: whether the process waits for `release` (see `await_release`).
    """

    name: str
    argv: Sequence[str]
    log_file: Path
    ready_file: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    unset: Sequence[str] = ()
    nice: int = 0
    held: bool = False


class SupervisedProcess:
    """One child process in its own session, which the terminal's Ctrl-C does not reach.

    Thread-safe. `start` may be called again after the process has ended.
    """

    def __init__(self, spec: ProcessSpec):
        self.spec = spec
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()  # prevents reaping while the process ID is in use

    @property
    def pid(self) -> int | None:
        """Process ID, None before the first start."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Starts the process.

        Raises:
          OSError: the program does not exist, or the log file is not writable.
        """
        spec = self.spec
        spec.log_file.parent.mkdir(parents=True, exist_ok=True)
        if spec.ready_file is not None:
            spec.ready_file.parent.mkdir(parents=True, exist_ok=True)
            spec.ready_file.unlink(missing_ok=True)
        with spec.log_file.open('ab', buffering=0) as log:
            now = time.strftime('%Y-%m-%d %H:%M:%S')
            with contextlib.suppress(OSError):  # a full disk
                log.write(f'{_START_MARK}{now} {" ".join(spec.argv)}\n'.encode())
            self._process = subprocess.Popen(
                list(spec.argv),
                stdin=subprocess.PIPE if spec.held else subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
                pass_fds=shared_locks(),
            )
        if spec.nice:
            # Set before the child has threads, which inherit it. Lowering it needs a privilege.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                level = os.getpriority(os.PRIO_PROCESS, 0) + spec.nice
                os.setpriority(os.PRIO_PROCESS, self._process.pid, level)

    def release(self) -> None:
        """Ends the wait of a process that is `held`; no effect once it has ended."""
        with self._lock:
            pipe = self._process and self._process.stdin
            if pipe and not pipe.closed:
                with contextlib.suppress(OSError), pipe:
                    pipe.write(b'\n')

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while the process is running or before `start`.

        Kills the remaining processes in the session of an ended process.
        """
        with self._lock:
            process = self._process
            if process is None:
                return None
            if process.returncode is not None:
                return process.returncode
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return None
            # The process is not reaped yet, so no other group can have its ID.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            if process.stdin is not None:
                process.stdin.close()
            return process.wait()

    def ready(self) -> dict | None:
        """Content of the ready file (`{'port': int, 'pid': int}`), None before it is written."""
        if self.spec.ready_file is None:
            return None
        with contextlib.suppress(OSError, ValueError):
            told = parse_object(self.spec.ready_file.read_bytes())
            if type(told.get('port')) is int and 0 < told['port'] <= _LAST_PORT:
                return told
        return None

    def wait(self, timeout_seconds: float) -> int | None:
        """Waits for the end; returns the exit code, or None if still running after the time-out."""
        deadline = time.monotonic() + timeout_seconds
        while (code := self.poll()) is None and self._process is not None:
            if time.monotonic() >= deadline:
                break
            time.sleep(_WAIT_POLL_SECONDS)
        return code

    def signal(self, number: int) -> None:
        """Sends a signal to the process, not its children, unless it has ended."""
        with self._lock:
            if self._process is not None and self.poll() is None:
                os.kill(self._process.pid, number)

    def terminate(self, grace_seconds: float = 5.0) -> int | None:
        """Sends SIGTERM, then SIGKILL after the grace, and returns the exit code.

        The children of the process end too. Repeated calls have no effect. Returns None if the
        process was never started.
        """
        self.signal(signal.SIGTERM)
        if self.wait(grace_seconds) is None:
            self.signal(signal.SIGKILL)
        return self.wait(_KILL_SECONDS)

    def last_log_lines(self, count: int = 10) -> list[str]:
        """The last non-empty lines of the log since the last start, oldest first."""
        try:
            with self.spec.log_file.open('rb') as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - _LOG_TAIL_BYTES))
                text = log.read().decode(errors='replace')
        except FileNotFoundError:
            return []
        lines = [line.rstrip() for line in text.splitlines()]
        starts = [i for i, line in enumerate(lines) if line.startswith(_START_MARK)]
        written = lines[starts[-1] + 1 :] if starts else lines
        return [line for line in written if line][-count:]

    def last_error(self) -> str:
        """The last line since the start that names an error, or the hang before it; else ''.

        A process that was killed could not say why: what its children wrote names no reason.
        """
        if self.poll() == -signal.SIGKILL:
            return ''
        lines = self.last_log_lines(_ERROR_LINES)[::-1]
        error = next(filter(_ERROR_LINE.match, lines), '')
        hang = next(filter(_HANG_LINE.match, lines), '')
        return hang if hang and (not error or error.startswith(_ENGINE_ERROR)) else error

    def describe_failure(self) -> str:
        """Describes a failure for a message: name, exit code, error and last lines of the log."""
        last, error = self.last_log_lines(), self.last_error()
        before = f' ({error})' if error and error not in last else ''
        lines = ''.join(f'\n  {line}' for line in last)
        how = describe_exit(self.poll())
        return f'{self.spec.name} {how}{before}; {self.spec.log_file} ends:{lines}'

    def _environment(self) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if k not in self.spec.unset}
        environment[LAUNCHER_VARIABLE] = str(os.getpid())
        environment.update(own_code(environment.get('PYTHONPATH', '')))
        environment.update(self.spec.environment)
        return environment


def own_code(python_path: str) -> dict[str, str]:
    """Environment variables that make Python and its child processes import this project's code.

    They exclude the current directory, both for `-m` and as an empty entry of PYTHONPATH, so that
    modules of the same names there are not imported.
    """
    entries = [str(_ROOT), *filter(None, python_path.split(os.pathsep))]
    return {'PYTHONPATH': os.pathsep.join(entries), 'PYTHONSAFEPATH': '1'}


def describe_exit(code: int | None) -> str:
    """`still runs`, `ended with exit code 2` or `was ended by SIGKILL`."""
    if code is None:
        return 'still runs'
    if code >= 0:
        return f'ended with exit code {code}'
    return f'was ended by {signal.Signals(-code).name}'
