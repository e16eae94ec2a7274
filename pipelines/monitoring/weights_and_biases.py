"""Figures of a run in, a run of Weights & Biases out, which may be offline (`WANDB_MODE=offline`).

A process of its own talks to the library, which may hang, fail, or block the exit of its process:
none of this reaches the launcher. `python -m pipelines.monitoring.weights_and_biases DIRECTORY`
reads JSON lines from standard input: first the arguments of `wandb.init`, then rows.
"""

import contextlib
import importlib.util
import json
import logging
import os
import pathlib
import queue
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO

from infra.process import exit_with_parent, own_code
from pipelines.errors import UsageError

CLOSE_SECONDS = 60.0
"""How long the end of a run waits for what is not sent yet."""
_MOST_WAITING = 10_000  # rows, some hours of scalars
_FLAG = '--wandb_project'
_STEP = 'frames'
_ENDED = 'ended by '  # begins the log's line with the reason
_UNFIT = '/\\#?%:'  # characters that wandb refuses


def require_ready(project: str) -> None:
    """Checks that a run can be logged, without a connection.

    Raises:
      UsageError: the name is unfit, the package is missing, or the user is not logged in.
    """
    if not 0 < len(project) <= 128 or set(project) & set(_UNFIT):
        raise UsageError(
            f'{_FLAG} {project!r}: not a name of a project. Fix: use 1 to 128 characters, none of'
            f' {_UNFIT}'
        )
    spec = importlib.util.find_spec('wandb')
    if spec is None or spec.origin is None:  # without origin: a directory of that name
        raise UsageError(
            f'{_FLAG}: the package wandb is not installed. Fix: run `{sys.executable} -m pip'
            ' install -r requirements-wandb.txt`, or omit the flag.'
        )
    if not _is_offline() and not _has_key():
        raise UsageError(
            f'{_FLAG}: not logged in to Weights & Biases. Fix: run `wandb login`, or set'
            ' WANDB_MODE=offline.'
        )


def _is_offline() -> bool:
    return os.environ.get('WANDB_MODE', 'online') != 'online'


def _has_key() -> bool:
    import wandb

    return bool(wandb.api.api_key)


def identity(project: str, launches: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The project and the ID of a run's run there; a resume continues that of earlier launches.

    `launches` are the lines of `launches.jsonl`.
    """
    for row in launches:
        known = row.get('wandb')
        if isinstance(known, Mapping) and known.get('project') == project and 'id' in known:
            return dict(known)
    return {'project': project, 'id': secrets.token_hex(8)}


class WandbWriter:
    """Sends figures to one run; never blocks and never raises. Use it in a `with`."""

    def __init__(
        self,
        directory: pathlib.Path,
        log_file: pathlib.Path,
        settings: Mapping[str, Any],
        notify: Callable[[str], None],
    ):
        """Starts the process.

        Args:
          directory: of the run, in which wandb writes its `wandb/`.
          log_file: receives what wandb prints.
          settings: arguments of `wandb.init`, with `project` and `id`.
          notify: receives one line if wandb fails; may be called from any thread.
        """
        self._directory, self._log_file, self._notify = directory, log_file, notify
        self._lines: queue.Queue[str | None] = queue.Queue(_MOST_WAITING)
        self._failed = False
        with log_file.open('ab') as log:
            self._log_start = log.tell()  # an earlier launch's lines come before
            self._process = subprocess.Popen(
                [sys.executable, '-m', __name__, str(directory)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **own_code(os.environ.get('PYTHONPATH', ''))},
                text=True,
            )
        self._thread = threading.Thread(target=self._send, name='wandb', daemon=True)
        self._thread.start()
        self._put(settings)

    def __enter__(self) -> 'WandbWriter':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, scalars: Mapping[str, float | None]) -> None:
        """Logs the scalars that are not None at `step` frames."""
        known = {tag: value for tag, value in scalars.items() if value is not None}
        self._put({'log': {_STEP: step, **known}})

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Sets the run's summary."""
        self._put({'summary': summary})

    def close(self) -> None:
        """Sends what waits, for a bounded time. Repeated calls do nothing."""
        if self._process.poll() is None:
            with contextlib.suppress(queue.Full):
                self._lines.put(None, timeout=CLOSE_SECONDS)
            try:
                self._process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                self._fail(f'not everything was sent within {CLOSE_SECONDS:g} s')
        if self._process.returncode:
            self._fail(self._reason())

    def _put(self, row: Mapping[str, Any]) -> None:
        if self._failed:
            return
        if self._process.poll() is not None:
            self._fail(self._reason())
            return
        with contextlib.suppress(queue.Full):  # its server is away: later rows are dropped
            self._lines.put_nowait(json.dumps(row) + '\n')

    def _fail(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            self._notify(
                f'Weights & Biases: {reason}; the run continues without. Fix: see'
                f' {self._log_file}; `wandb sync` sends what is in {self._directory / "wandb"}.'
            )

    def _reason(self) -> str:
        """Why the process ended: threads of the library may log after it has said so."""
        log = self._log_file.read_bytes()[self._log_start :].decode(errors='replace')
        lines = log.splitlines() or ['ended']
        said = [line.removeprefix(_ENDED) for line in lines if line.startswith(_ENDED)]
        return (said or lines)[-1].strip()

    def _send(self) -> None:
        stream = self._process.stdin
        assert stream is not None
        with contextlib.suppress(OSError), stream:  # the process has ended
            for line in iter(self._lines.get, None):
                stream.write(line)
                stream.flush()


def _rows(lines: TextIO) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, lines)


def _log(directory: str, rows: Iterator[dict[str, Any]]) -> None:
    """Logs rows to a run of wandb; the first row holds the run's settings."""
    import wandb

    settings = wandb.Settings(console='off', disable_git=True, silent=True, symlink=False)
    # Joins the run of an earlier launch; offline, `wandb sync` does.
    resume: Any = None if _is_offline() else 'allow'
    run = wandb.init(dir=directory, settings=settings, resume=resume, **next(rows))
    run.define_metric(_STEP)
    run.define_metric('*', step_metric=_STEP)
    for row in rows:
        if 'log' in row:
            run.log(row['log'])
        else:
            run.summary.update(row['summary'])
    run.finish()


def main() -> None:
    """Logs standard input until it ends; the launcher's signals are not for this process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    exit_with_parent()
    logging.basicConfig(level=logging.WARNING)
    try:
        _log(sys.argv[1], _rows(sys.stdin))
    except BaseException as error:  # of any kind: the log holds the reason
        logging.exception('not logged')
        print(f'\n{_ENDED}{type(error).__name__}: {" ".join(str(error).split())}', flush=True)
        os._exit(1)  # wandb's own hooks at the exit may wait for ever


if __name__ == '__main__':
    main()
