"""New files that a user names: a flag's path in, a file that never replaces another one out."""

import pathlib

from infra.disk import beside, is_remote, put_new, write_atomically
from pipelines.errors import UsageError, unwritable
from pipelines.storage.run_directory import require_fit

_BLOCK_BYTES = 4096  # of a file system; a full disk has none


def require_new(path: str, flag: str = '--output') -> None:
    """Checks that a new file can be written to the local `path`; creates nothing.

    Raises:
      UsageError: it is remote, exists or cannot be written, or its name is unsuitable.
    """
    file = writable(path, flag)
    if file.is_dir():
        raise UsageError(f'{flag} {path}: a directory. Fix: name a new file in it.')
    if file.exists():
        raise existing(path, flag)


def existing(path: str, flag: str = '--output') -> UsageError:
    """The error for a file that exists."""
    return UsageError(
        f'{flag} {path}: already exists and is not overwritten. Fix: name a new file.'
    )


def writable(path: str, flag: str = '--output') -> pathlib.Path:
    """The absolute path of a local file, checked to be writable; creates nothing.

    Raises:
      UsageError: it is remote, its name is unsuitable, or the nearest directory above it that
        exists takes no file of its name, or no block of content.
    """
    if is_remote(path):
        raise UsageError(f'{flag} {path}: not on this machine. Fix: name a local path.')
    file = pathlib.Path(path).absolute()
    if not file.name:
        raise UsageError(f'{flag} {path}: names no file. Fix: name a new file.')
    require_fit(file)
    try:
        directory = file.parent
        while not directory.exists():
            directory = directory.parent
        probe = beside(directory / file.name)  # as `write_atomically` names it
        probe.touch(exist_ok=False)
        try:
            probe.write_bytes(bytes(_BLOCK_BYTES))
        finally:
            probe.unlink()
    except OSError as error:
        raise unwritable(path, error, f'name another file as {flag}') from error
    return file


def write_new(path: str, content: str | bytes) -> None:
    """Writes a new file to the local `path` of `--output`; creates its directory.

    Raises:
      UsageError: it exists, such as that of another command of this moment, or cannot be written.
    """
    try:
        file = writable(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = beside(file)
        try:
            write_atomically(temporary, content)
            put_new(temporary, file)
        except FileExistsError:
            raise existing(path) from None
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error, 'name another file as --output') from error
