"""New files that a user names: a flag's path in, a file that never replaces another one out."""

import pathlib
import tempfile

from infra.disk import is_remote, write_atomically
from pipelines.errors import UsageError, unwritable
from pipelines.storage.run_directory import output_path, require_fit


def require_new(path: str, flag: str = '--output') -> None:
    """Checks that a new file can be written to the local `path`; creates nothing.

    Raises:
      UsageError: it is remote, exists or cannot be written, or its name is unsuitable.
    """
    if is_remote(path):
        raise UsageError(f'{flag} {path}: not on this machine. Fix: name a local path.')
    file = pathlib.Path(path).absolute()
    require_fit(file)
    require_writable(file, flag)
    if file.exists():
        raise existing(path, flag)


def existing(path: str, flag: str = '--output') -> UsageError:
    """The error for a file that exists."""
    return UsageError(
        f'{flag} {path}: already exists and is not overwritten. Fix: name a new file.'
    )


def require_writable(file: pathlib.Path, flag: str = '--output') -> None:
    """Raises UsageError unless the nearest directory above `file` that exists can be written."""
    try:
        directory = file.parent
        while not directory.exists():
            directory = directory.parent
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise unwritable(file, error, f'name another file as {flag}') from error


def write_new(path: str, content: str | bytes) -> None:
    """Writes a new file to the local `path` of `--output`; creates its directory.

    Raises:
      UsageError: it exists, such as that of another command of this moment, or cannot be written.
    """
    try:
        file = output_path(path)
        try:
            file.touch(exist_ok=False)
        except FileExistsError:
            raise existing(path) from None
        try:
            write_atomically(file, content)
        except BaseException:
            file.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise unwritable(path, error, 'name another file as --output') from error
