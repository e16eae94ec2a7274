"""End a run from elsewhere: `python pipelines/stop.py --run_dir DIR`.

What Ctrl-C in the run's terminal does: the workers end, Dataflow's jobs and others' with them, a
checkpoint and the summary are written. Waits for that.
"""

import os
import pathlib
import shlex
import signal
import sys
import time
from collections.abc import Sequence

if __name__ == '__main__':  # this checkout's packages, whatever PYTHONPATH and the environment hold
    sys.path[: not sys.flags.safe_path] = [str(pathlib.Path(__file__).resolve().parents[1])]

from infra.disk import is_remote, read_json
from infra.flags import Parser, nonempty_path, positive_number
from infra.output import protect_output
from pipelines.errors import UsageError
from pipelines.storage.run_directory import RunDirectory

_POLL_SECONDS = 0.5
_TELL_SECONDS = 10.0
STOP_SECONDS = 400.0
"""More than the launcher gives the workers and the last checkpoint."""


def stop(directory: RunDirectory, timeout_seconds: float) -> bool:
    """Asks the run in `directory` to end; whether it did so in time.

    Raises:
      UsageError: none goes on there, or its process cannot be signalled.
    """
    process = directory.holder()
    if process is None:
        raise UsageError(f'{directory.path}: no run goes on there.')
    try:
        os.kill(process, signal.SIGINT)
    except (ProcessLookupError, PermissionError) as error:
        raise UsageError(
            f'{directory.path}: its run is process {process}, which is not here or not yours'
            f' ({error.strerror}); stop it on its own machine, as its user.'
        ) from error
    print(f'stopping the run of process {process} ...', flush=True)
    start = time.monotonic()
    told = start
    while directory.holder() == process:
        now = time.monotonic()
        if now - start > timeout_seconds:
            return False
        if now - told > _TELL_SECONDS:
            told = now
            print(f'still stopping after {now - start:.0f} s', flush=True)
        time.sleep(_POLL_SECONDS)
    return True


def _outcome(directory: RunDirectory) -> str:
    """What an ended run has left, and how to go on with it."""
    if not directory.config_file.exists():
        return f'{directory.path}: ended before its first frame; nothing of it is kept'
    if not directory.latest_checkpoints():
        return f'{directory.path}: ended without a checkpoint; its logs are in {directory.logs}'
    resume = f'`run.py --run_dir {shlex.quote(str(directory.path))} --resume`'
    if (read_json(directory.summary_file) or {}).get('exit_reason') == 'max_frames':
        return f'ended at its budget; {resume} with a larger --max_frames goes on'
    return f'ended; {resume} goes on'


def main(argv: Sequence[str]) -> int:
    """Stops a run; returns the exit code."""
    parser = Parser(prog='stop.py', description='End a run: workers, last checkpoint, summary.')
    parser.add_argument(
        '--run_dir', type=nonempty_path, required=True, help='directory of the run, on its machine'
    )
    parser.add_argument(
        '--timeout_seconds',
        type=positive_number,
        default=STOP_SECONDS,
        help=f'how long to wait for its end [{STOP_SECONDS:g}]',
    )
    arguments = parser.parse_args(argv)
    try:
        if is_remote(arguments.run_dir):
            raise UsageError(
                f"{arguments.run_dir}: the run's process is signalled, so its local working copy is"
                f' needed, on its machine; {arguments.run_dir.rstrip("/")}/owner.json names both.'
            )
        directory = RunDirectory.existing(arguments.run_dir)
        ended = stop(directory, arguments.timeout_seconds)
    except (UsageError, OSError) as error:  # a run that may not be read
        print(f'stop.py: {error}', file=sys.stderr)
        return 2
    if not ended:
        print(
            f'stop.py: {arguments.run_dir} has not ended within {arguments.timeout_seconds:g} s;'
            ' the same command again stops it at once, which loses what came after its last'
            ' checkpoint.',
            file=sys.stderr,
        )
        return 1
    print(_outcome(directory))
    return 0


if __name__ == '__main__':
    protect_output()
    sys.exit(main(sys.argv[1:]))
