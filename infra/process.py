"""Processes of a run: a supervised child, and a child that never outlives its parent.

In: an argument vector, extra environment variables and a log file. Out: a running process, whether
it is ready, its exit code, and the last lines it wrote. Standard library only, so importing this
module costs a server nothing.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LAUNCHER_VARIABLE = 'GORILA_LAUNCHER_PID'
"""Environment variable: process id of the launcher whose death must end this process."""

_ORPHAN_POLL_SECONDS = 1.0
_ORPHAN_GRACE_SECONDS = 5.0
_WAIT_POLL_SECONDS = 0.02
_KILL_SECONDS = 10.0  # the kernel may need a moment to free gigabytes
_LOG_TAIL_BYTES = 64 * 1024
_START_MARK = '=== '

_watching = threading.Lock()


def exit_with_parent(grace_seconds: float = _ORPHAN_GRACE_SECONDS) -> None:
    """Makes this process end within seconds of its parent's death, even by `kill -9`.

    A daemon thread polls the parent's process id. PR_SET_PDEATHSIG is not used: the kernel sends
    it when the *thread* that forked ends, and a supervisor may restart servers from a thread.
    The process gets SIGTERM first and SIGKILL `grace_seconds` later. Repeated calls do nothing.
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


def exit_with_launcher() -> None:
    """`exit_with_parent`, if a launcher started this process: a user may have, under `nohup`."""
    if LAUNCHER_VARIABLE in os.environ:
        exit_with_parent()


def is_alive(pid: int) -> bool:
    """Whether a process of this id exists (a zombie counts)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def announce_ready(ready_file: str | os.PathLike[str], port: int) -> None:
    """Writes `{"port": port, "pid": own id}` to `ready_file`: all of it or nothing."""
    target = Path(ready_file)
    temporary = target.with_name(f'.{target.name}.{os.getpid()}')
    temporary.write_text(json.dumps({'port': port, 'pid': os.getpid()}))
    temporary.replace(target)


def _end_when_orphaned(parent: int, launcher: int, grace_seconds: float) -> None:
    # The launcher is looked at too: it may have died before this process could ask for its
    # parent's id, and a shell or `nice` may stand between the two.
    while os.getppid() == parent and is_alive(launcher):
        time.sleep(_ORPHAN_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_seconds)
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class ProcessSpec:
    """What to start.

    Attributes:
      name: what messages call it, such as `parameter_shard_0`.
      argv: the command, the program first.
      log_file: its standard output and error are appended here.
      ready_file: written by the process (`announce_ready`) once it serves; None: it has none.
      environment: variables added to, or replacing, the parent's own.
      unset: variables of the parent the process must not see.
      nice: added to the parent's nice level; 0 leaves it.
      working_directory: None: the parent's.
    """

    name: str
    argv: Sequence[str]
    log_file: Path
    ready_file: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    unset: Sequence[str] = ()
    nice: int = 0
    working_directory: Path | None = None


class SupervisedProcess:
    """One child process in a session of its own: the terminal's Ctrl-C does not reach it.

    Safe to use from several threads. `start` may be called again once the process has ended.
    """

    def __init__(self, spec: ProcessSpec):
        self.spec = spec
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()  # guards the process id against being reaped meanwhile

    @property
    def pid(self) -> int | None:
        """Process id, None before the first start."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Starts the process.

        Raises:
          OSError: the program does not exist, or the log file cannot be written.
        """
        spec = self.spec
        spec.log_file.parent.mkdir(parents=True, exist_ok=True)
        if spec.ready_file is not None:
            spec.ready_file.parent.mkdir(parents=True, exist_ok=True)
            spec.ready_file.unlink(missing_ok=True)
        with spec.log_file.open('ab') as log:
            now = time.strftime('%Y-%m-%d %H:%M:%S')
            log.write(f'{_START_MARK}{now} {" ".join(spec.argv)}\n'.encode())
            log.flush()
            self._process = subprocess.Popen(
                list(spec.argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                cwd=spec.working_directory,
                start_new_session=True,
            )
        if spec.nice:
            # Before the child has threads; they inherit it. Lowering the level needs a privilege.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                level = os.getpriority(os.PRIO_PROCESS, 0) + spec.nice
                os.setpriority(os.PRIO_PROCESS, self._process.pid, level)

    def poll(self) -> int | None:
        """Exit code, negative for the signal that ended it; None while it runs or before `start`.

        Children that an ended process left behind in its session are killed here.
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
            # Not reaped yet, so its id, which names the group too, cannot belong to anyone else.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            return process.wait()

    def ready(self) -> dict | None:
        """Content of the ready file (`{'port': int, 'pid': int}`), None while there is none."""
        if self.spec.ready_file is None:
            return None
        try:
            return json.loads(self.spec.ready_file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def wait(self, timeout_seconds: float) -> int | None:
        """Waits for the end; exit code, None when it still runs after `timeout_seconds`."""
        deadline = time.monotonic() + timeout_seconds
        while (code := self.poll()) is None and self._process is not None:
            if time.monotonic() >= deadline:
                break
            time.sleep(_WAIT_POLL_SECONDS)
        return code

    def signal(self, number: int) -> None:
        """Sends a signal to the process, not its children; nothing happens when it has ended."""
        with self._lock:
            if self._process is not None and self.poll() is None:
                os.kill(self._process.pid, number)

    def terminate(self, grace_seconds: float = 5.0) -> int | None:
        """SIGTERM, then SIGKILL after the grace; returns the exit code. Nothing of it is left.

        Idempotent; None only when it was never started.
        """
        self.signal(signal.SIGTERM)
        if self.wait(grace_seconds) is None:
            self.signal(signal.SIGKILL)
        return self.wait(_KILL_SECONDS)

    def last_log_lines(self, count: int = 10) -> list[str]:
        """The last non-empty lines the process wrote since its last start, oldest first."""
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

    def describe_failure(self) -> str:
        """One paragraph for an error message: name, exit code, log file and its last lines."""
        lines = ''.join(f'\n  {line}' for line in self.last_log_lines())
        return f'{self.spec.name} {describe_exit(self.poll())}; {self.spec.log_file} ends:{lines}'

    def _environment(self) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if k not in self.spec.unset}
        environment[LAUNCHER_VARIABLE] = str(os.getpid())
        environment.update(self.spec.environment)
        return environment


def describe_exit(code: int | None) -> str:
    """`still runs`, `ended with exit code 2` or `was ended by SIGKILL`."""
    if code is None:
        return 'still runs'
    if code >= 0:
        return f'ended with exit code {code}'
    return f'was ended by {signal.Signals(-code).name}'
