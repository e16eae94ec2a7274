"""Directories of servers: held by one process, and written so that a power cut loses nothing."""

import fcntl
import os
import pathlib
from typing import BinaryIO

_LOCK_FILE = '.lock'


def hold(directory: str | os.PathLike[str]) -> BinaryIO:
    """Makes a directory and takes it for this process, until its end or the answer's `close`.

    Raises:
      OSError: it cannot be made or written, or another process has it.
    """
    path = pathlib.Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / _LOCK_FILE).open('ab')
    except OSError as error:
        raise OSError(f'{path}: no directory that can be written ({error.strerror})') from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise OSError(
            f'{path} is in use by another process; give each shard a directory of its own'
        ) from None
    return lock


def sync(directory: str | os.PathLike[str]) -> None:
    """Makes a directory's files, and its entries, survive a power cut; not what is below it.

    Raises:
      OSError: it cannot be read.
    """
    path = pathlib.Path(directory)
    for entry in (*(file for file in path.iterdir() if file.is_file()), path, path.parent):
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
