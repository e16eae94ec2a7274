"""Stop a run from another terminal: `.venv/bin/python pipelines/stop.py --run_dir DIR`.

Like Ctrl-C in the run's terminal: workers and engine jobs end, a checkpoint and the summary are
written. Waits until the run has ended.
"""

import os
import pathlib
import signal
import sys
import time
from collections.abc import Sequence

if __name__ == '__main__':  # this checkout's packages, whatever PYTHONPATH and the environment hold
    sys.path[: not sys.flags.safe_path] = [str(pathlib.Path(__file__).resolve().parents[1])]

from infra.disk import is_remote
from infra.flags import Parser, nonempty_path, positive_number
from infra.output import protect_output
from pipelines.errors import UsageError, one_line_errors
from pipelines.storage.resuming import resuming
from pipelines.storage.run_directory import RunDirectory

_POLL_SECONDS = 0.5
_NOTIFY_SECONDS = 10.0
STOP_SECONDS = 400.0
"""Above what the launcher allows for the workers and the last checkpoint."""


def stop(directory: RunDirectory, timeout_seconds: float) -> bool:
    """Asks the run in `directory` to end; returns whether it did in time.

    Raises:
      UsageError: no run is active there, or its process cannot be signalled.
    """
    process = directory.holder()
    if process is None:
        remedy = resuming(directory) or 'name the directory of an active run'
        raise UsageError(f'{directory.path}: the run has already ended. Fix: {remedy}.')
    try:
        os.kill(process, signal.SIGINT)
    except (ProcessLookupError, PermissionError) as error:
        raise UsageError(
            f"{directory.path}: cannot signal the run's process {process} ({error.strerror})."
            ' Fix: if it was killed, what it had started ends within a minute; else stop it on the'
            ' machine where it runs, as its user.'
        ) from error
    print(f'stopping the run (process {process}) ...', flush=True)
    start = notified = time.monotonic()
    while directory.holder() == process:
        now = time.monotonic()
        if now - start > timeout_seconds:
            return False
        if now - notified > _NOTIFY_SECONDS:
            notified = now
            print(f'still stopping after {now - start:.0f} s', flush=True)
        time.sleep(_POLL_SECONDS)
    return True


def _outcome(directory: RunDirectory) -> str:
    """What an ended run left, and how to resume it."""
    if not directory.config_file.exists():
        return f'{directory.path}: ended before its first frame; nothing is kept'
    if not directory.latest_checkpoints():
        return f'{directory.path}: ended without a checkpoint; logs: {directory.logs}'
    return f'ended; {resuming(directory)}'


@one_line_errors('stop.py', OSError)
def main(argv: Sequence[str]) -> int:
    """Stops a run; returns the exit code."""
    parser = Parser(
        prog='stop.py',
        description='Stop a run: end its workers, write a last checkpoint and the summary.',
    )
    parser.add_argument(
        '--run_dir', type=nonempty_path, required=True, help='Run directory on this machine.'
    )
    parser.add_argument(
        '--timeout_seconds',
        type=positive_number,
        default=STOP_SECONDS,
        help=f'Seconds to wait for the end of the run. Default: {STOP_SECONDS:g}.',
    )
    arguments = parser.parse_args(argv)
    if is_remote(arguments.run_dir):
        raise UsageError(
            f'{arguments.run_dir}: cannot signal a remote run. Fix: name its local copy, on its'
            f' machine; {arguments.run_dir.rstrip("/")}/owner.json has both.'
        )
    directory = RunDirectory.existing(arguments.run_dir)
    ended = stop(directory, arguments.timeout_seconds)
    if not ended:
        print(
            f'stop.py: {arguments.run_dir}: not ended within {arguments.timeout_seconds:g} s. Fix:'
            ' wait, or repeat the command to kill the run; what it did since its last checkpoint is'
            ' then lost.',
            file=sys.stderr,
        )
        return 1
    print(_outcome(directory))
    return 0


if __name__ == '__main__':
    protect_output()
    sys.exit(main(sys.argv[1:]))
