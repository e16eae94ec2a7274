"""Upload the local copy of an ended run: `.venv/bin/python pipelines/mirror.py --run_dir DIR`."""

import pathlib
import sys
from collections.abc import Sequence

if __name__ == '__main__':  # this checkout's packages, whatever PYTHONPATH and the environment hold
    sys.path[: not sys.flags.safe_path] = [str(pathlib.Path(__file__).resolve().parents[1])]

from infra.disk import read_json
from infra.flags import Parser, nonempty_path
from infra.output import protect_output
from pipelines.errors import UsageError, one_line_errors
from pipelines.storage.mirror import Mirror
from pipelines.storage.object_store import RemoteError
from pipelines.storage.remote_run import RemoteRun, TakenOverError
from pipelines.storage.run_directory import MARK_FILE, RunDirectory


def send_again(path: str) -> RemoteRun:
    """Uploads what the remote directory lacks of the local copy `path`, whose run has ended.

    Raises:
      UsageError: `path` is not a local copy, its run is active, or the remote directory is not
        writable or owned by another launcher.
    """
    with RunDirectory.open(path, resume=True) as directory:
        url = (read_json(directory.path / MARK_FILE) or {}).get('url')
        if not isinstance(url, str):
            raise UsageError(
                f'{path}: not the local copy of a remote run. Fix: name one as --run_dir.'
            )
        remote = RemoteRun(url)
        try:
            remote.reopen(directory.path)
            remote.mark()
            Mirror(remote, directory, print).copy(last=True)
        except (RemoteError, TakenOverError, OSError) as error:
            raise UsageError(str(error)) from error
        finally:
            remote.close()
    return remote


@one_line_errors('mirror.py')
def main(argv: Sequence[str]) -> int:
    """Uploads a local copy; returns the exit code."""
    parser = Parser(
        prog='mirror.py', description="Upload an ended run's local copy to its remote directory."
    )
    parser.add_argument(
        '--run_dir', type=nonempty_path, required=True, help='Local copy of the run.'
    )
    arguments = parser.parse_args(argv)
    remote = send_again(arguments.run_dir)
    print(f'{remote.url}: has everything in {remote.local}')
    return 0


if __name__ == '__main__':
    protect_output()
    sys.exit(main(sys.argv[1:]))
