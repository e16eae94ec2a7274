"""End a run from elsewhere: `python pipelines/stop.py --run_dir DIR`.

What Ctrl-C in the run's terminal does: the workers end, Dataflow's jobs and others' with them, a
checkpoint and the summary are written. Waits for that.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence

from pipelines.errors import UsageError
from pipelines.run_directory import RunDirectory, is_remote

_POLL_SECONDS = 0.5
_TELL_SECONDS = 10.0
_STOP_SECONDS = 400.0
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
            f' ({error.strerror}); stop it on its own machine.'
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


def main(argv: Sequence[str]) -> int:
    """Stops a run; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='stop.py', description='End a run: workers, last checkpoint, summary.'
    )
    parser.add_argument('--run_dir', required=True, help='directory of the run, on its machine')
    parser.add_argument(
        '--timeout_seconds',
        type=float,
        default=_STOP_SECONDS,
        help=f'how long to wait for its end [{_STOP_SECONDS:g}]',
    )
    arguments = parser.parse_args(argv)
    try:
        if is_remote(arguments.run_dir):
            raise UsageError(
                f"{arguments.run_dir}: the run's process is signalled, so its local working copy is"
                f' needed, on its machine; {arguments.run_dir.rstrip("/")}/owner.json names both.'
            )
        ended = stop(RunDirectory.existing(arguments.run_dir), arguments.timeout_seconds)
    except UsageError as error:
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
    print(f'ended; `run.py --run_dir {arguments.run_dir} --resume` goes on')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
