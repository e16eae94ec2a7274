"""Files and directories: locked by one process, written safely against kills and power cuts.

In: a path and its new content. Out: readers see the old or the new content, complete; checksums.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import os
import pathlib
import re
import shutil
import tempfile
import time
import uuid
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from infra.sealed import parse_object

LOCK_FILE = '.lock'
DAMAGED = 'damaged-'
"""Begins the name of a directory that was set aside."""

_PROCESS_ID = re.compile(r'[1-9][0-9]{0,6}')  # Linux: below 2^22; 0 would be the own group
_SCRATCH = 'gorila-scratch-'
_LOCK_SECONDS = 0.5  # tries to lock a directory
_ORPHAN_SECONDS = 75.0  # tries longer while what a killed process has started ends
_SCRATCH_SECONDS = 60.0  # a younger one may be about to be held
_CONTROL_CHARACTER = re.compile(r'[\x00-\x1f\x7f]')
_UNIQUE_DIGITS = 12
_BESIDE = re.compile(rf'\.(.+)\.[0-9a-f]{{{_UNIQUE_DIGITS}}}')
_READ_BYTES = 1 << 22
_shared_locks: weakref.WeakSet[BinaryIO] = weakref.WeakSet()
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD and the flag of renameat2(2)
_NEW, _BEFORE = 'new', 'before'  # in the scratch of a replacement


def unfit_name(path: str | os.PathLike[str]) -> str:
    """Why runs and servers cannot use a directory of this name, empty if they can."""
    name = os.fspath(path)
    if _CONTROL_CHARACTER.search(name):
        return 'its name has a control character'
    # TensorFlow and Reverb encode names so.
    return '' if os.fsencode(name) == name.encode(errors='replace') else 'its name is not UTF-8'


@contextlib.contextmanager
def by_descriptor(directory: str | os.PathLike[str]) -> Iterator[str]:
    """Gives a directory a path of plain characters, since TensorFlow reads no `[a]` or `\\`.

    Raises:
      OSError: the directory does not exist or is not accessible.
    """
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f'/proc/self/fd/{descriptor}'
    finally:
        os.close(descriptor)


class InUseError(OSError):
    """Another process has locked the directory."""


def lock(directory: pathlib.Path, by_children: bool = False) -> BinaryIO:
    """Locks a directory until the returned file is closed or this process ends.

    The lock file holds the process ID, if the disk has room.

    Args:
      directory: where the lock file is.
      by_children: whether processes share their lock with their children, which still write if one
        is killed: it then stays locked until those that inherit `shared_locks()` have ended.
        Waits for those up to 75 s.

    Raises:
      InUseError: another process has locked it.
      OSError: it is not writable.
    """
    file = (directory / LOCK_FILE).open('a+b', buffering=0)
    began, killed = time.monotonic(), False
    while not _locked(file, fcntl.LOCK_EX):
        holder = lock_holder(directory)
        killed |= holder is not None and not pathlib.Path(f'/proc/{holder}').exists()
        patience = _ORPHAN_SECONDS if killed and by_children else _LOCK_SECONDS
        if time.monotonic() > began + patience:
            file.close()
            by = 'another process' if holder is None else f'process {holder}'
            by += ', which is not running here, or by what it has started' * killed
            raise InUseError(f'{directory}: in use by {by}')
        time.sleep(_LOCK_SECONDS / 10)  # `lock_holder` may have held it for a moment
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(f'{os.getpid()}\n'.encode())
    if by_children:
        _shared_locks.add(file)
    return file


def shared_locks() -> list[int]:
    """Descriptors of the locks that this process shares with its children (`pass_fds`)."""
    return [file.fileno() for file in _shared_locks if not file.closed]


def lock_holder(directory: pathlib.Path) -> int | None:
    """The ID of the process that has locked a directory, None for none or an unknown one.

    One that was killed holds it as long as its children do (see `lock`).

    Raises:
      PermissionError: the lock file is not readable.
    """
    try:
        file = (directory / LOCK_FILE).open('rb')
    except FileNotFoundError:
        return None
    with file:
        if _locked(file, fcntl.LOCK_SH):
            return None
        text = file.read(32).decode(errors='replace').strip()
    return int(text) if _PROCESS_ID.fullmatch(text) else None


def _locked(file: BinaryIO | int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def hold(directory: str | os.PathLike[str]) -> BinaryIO:
    """Makes a directory and locks it; see `lock`.

    Raises:
      OSError: it cannot be made or written, or another process has locked it.
    """
    path = pathlib.Path(directory)
    if reason := unfit_name(path):
        raise OSError(f'{str(path)!r}: {reason}')
    try:
        path.mkdir(parents=True, exist_ok=True)
        return lock(path)
    except InUseError as error:
        raise OSError(f'{error}. Fix: give each shard a directory of its own.') from None
    except OSError as error:
        raise OSError(f'{path}: no directory that can be written ({error.strerror})') from error


@dataclasses.dataclass(frozen=True)
class Generations:
    """Numbered directories `<stem>-<number>` in `parent`; the highest number is the newest.

    A parent that does not exist holds none. Any other that cannot be listed raises OSError.
    """

    parent: pathlib.Path
    stem: str

    def paths(self) -> list[pathlib.Path]:
        """The directories, newest first."""
        entries = self._entries('')
        return sorted(entries, key=lambda path: self._number(path.name), reverse=True)

    def next(self) -> pathlib.Path:
        """The path of a new one, numbered above all others, those set aside included."""
        taken = (self._number(path.name) for path in self._entries('(.*-)?'))
        return self.path(max(taken, default=0) + 1)

    def path(self, number: int) -> pathlib.Path:
        """The path of the directory `number`, which may not exist."""
        return self.parent / f'{self.stem}-{number:08d}'

    def _entries(self, prefix: str) -> list[pathlib.Path]:
        name = re.compile(rf'{prefix}{self.stem}-\d+')
        try:
            return [path for path in self.parent.iterdir() if name.fullmatch(path.name)]
        except FileNotFoundError:
            return []

    def _number(self, name: str) -> int:
        return int(name.rpartition('-')[2])


def set_aside(path: pathlib.Path) -> pathlib.Path:
    """Renames a damaged directory so that it is ignored; returns the new path."""
    aside = path.with_name(f'{DAMAGED}{path.name}')
    while aside.exists():  # a user has put it back
        aside = aside.with_name(f'{DAMAGED}{aside.name}')
    path.rename(aside)
    return aside


def remove(paths: Iterable[pathlib.Path]) -> None:
    """Removes directories as far as possible.

    Renames each first, so that no incomplete one keeps its name.
    """
    for path in paths:
        with contextlib.suppress(OSError):
            shutil.rmtree(path.rename(beside(path)))


@contextlib.contextmanager
def scratch() -> Iterator[pathlib.Path]:
    """Yields a locked temporary directory; removes those of this user's killed processes.

    Raises:
      OSError: the directory cannot be created.
    """
    for left in pathlib.Path(tempfile.gettempdir()).glob(f'{_SCRATCH}*'):
        with contextlib.suppress(OSError):  # in use, or gone
            status = left.lstat()
            age = time.time() - status.st_mtime
            if status.st_uid == os.getuid() and age > _SCRATCH_SECONDS:
                with hold(left):
                    shutil.rmtree(left)
    # Children may write there until they end.
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, ignore_cleanup_errors=True) as name:
        with hold(name):
            yield pathlib.Path(name)


@contextlib.contextmanager
def own_temporary_files() -> Iterator[pathlib.Path]:
    """Yields a `scratch` that holds all temporary files of this process and its children.

    Libraries in a killed child leave temporary files behind, which are removed with it.

    Raises:
      OSError: the directory cannot be created.
    """
    before, directory_before = os.environ.get('TMPDIR'), tempfile.tempdir
    with scratch() as directory:
        os.environ['TMPDIR'] = tempfile.tempdir = str(directory)
        try:
            yield directory
        finally:
            tempfile.tempdir = directory_before
            del os.environ['TMPDIR']
            if before is not None:
                os.environ['TMPDIR'] = before


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


def publish(path: pathlib.Path, name: pathlib.Path) -> None:
    """Renames a complete directory to `name`; it survives a power cut from then on.

    Raises:
      OSError: a file cannot be synchronised, or `name` exists.
    """
    sync(path)
    path.rename(name)
    sync(name)


def beside(path: pathlib.Path) -> pathlib.Path:
    """A new name in the same directory; `tempfile` would create files for the owner only."""
    return path.with_name(f'.{path.name}.{uuid.uuid4().hex[:_UNIQUE_DIGITS]}')


def remove_leftovers(directory: pathlib.Path, *names: str) -> None:
    """Removes what killed processes left of `beside` in `directory`: of `names`, or of all.

    Completes a `replaced_directory` that was killed between its two renames; leaves one that
    another process fills.

    Raises:
      OSError: an entry cannot be removed.
    """
    for path in directory.iterdir() if directory.is_dir() else ():
        left = _BESIDE.fullmatch(path.name)
        if left and (not names or left[1] in names):
            with contextlib.suppress(FileNotFoundError):  # whoever filled it is done
                if not _is_filled(path):
                    _remove_leftover(path, path.with_name(left[1]))


def _remove_leftover(path: pathlib.Path, name: pathlib.Path) -> None:
    if (path / _BEFORE).is_dir() and not name.exists():
        (path / _NEW).rename(name)
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_filled(scratch: pathlib.Path) -> bool:
    """Whether a process holds what `_hold_scratch` returns."""
    descriptor = os.open(scratch, os.O_RDONLY)
    try:
        return not _locked(descriptor, fcntl.LOCK_EX)
    except OSError:  # some network file systems cannot tell
        return False
    finally:
        os.close(descriptor)


def _hold_scratch(scratch: pathlib.Path) -> int:
    """A descriptor that keeps `remove_leftovers` away until it is closed."""
    descriptor = os.open(scratch, os.O_RDONLY)
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # `_is_filled` may hold it for a moment
    return descriptor


def put_new(temporary: pathlib.Path, path: pathlib.Path) -> None:
    """Moves a complete file to `path` in one step, which replaces nothing.

    Raises:
      FileExistsError: `path` exists; `temporary` is unchanged.
      OSError: the directory is not writable.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        path.touch(exist_ok=False)
        temporary.replace(path)
    else:
        temporary.unlink()


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Replaces the file `path` atomically: readers see the old or the new content, complete.

    The mode follows the umask; the group follows a setgid directory.

    Raises:
      OSError: the directory is not writable, or the disk is full; the old file is unchanged.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = beside(path)
    try:
        with temporary.open('xb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def digests(directory: str | os.PathLike[str]) -> dict[str, list[int]]:
    """[bytes, CRC-32] of every file below `directory`, by its relative path.

    Returns an empty dict if the directory does not exist.
    """
    root = pathlib.Path(directory)
    return {
        str(file.relative_to(root)): [file.stat().st_size, _checksum(file)]
        for file in sorted(root.rglob('*'))
        if file.is_file()
    }


def differences(before: Mapping[str, list[int]], after: Mapping[str, list[int]]) -> dict[str, str]:
    """How files differ from their `digests` before, by relative path; empty if they do not."""
    return {
        name: 'its content has changed' if name in after else 'it is missing'
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }


def _checksum(path: pathlib.Path) -> int:
    """CRC-32 of a file; a gigabyte takes about a second."""
    checksum = 0
    with path.open('rb') as file:
        while block := file.read(_READ_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes `value` as JSON with `write_atomically`, keys in their order.

    Raises:
      ValueError: a number in `value` is not finite, which JSON does not allow.
      OSError: see `write_atomically`.
    """
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + '\n')


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """The JSON object in the file `path`, None if it is missing, unreadable or invalid."""
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError):
        return None


def read_json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The JSON objects in the lines of the file `path`; skips damaged ones, such as one cut off.

    Empty if there is no such file.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(parse_object(line))
    return rows


@contextlib.contextmanager
def replaced_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty directory to fill, which replaces `path` at the end of the block.

    Modes are as with `write_atomically`. An exception in the block leaves `path` unchanged.

    Raises:
      OSError: the parent directory is not writable.
    """
    scratch = beside(path)
    scratch.mkdir()
    held = _hold_scratch(scratch)
    try:
        filled, before = scratch / _NEW, scratch / _BEFORE
        filled.mkdir()
        yield filled
        for directory in filter(pathlib.Path.is_dir, filled.rglob('*')):
            shutil.copymode(filled, directory)  # TensorFlow creates them with 0755, not the umask
        if not (path.exists() and _exchanged(filled, path)):
            if path.exists():
                path.rename(before)
            filled.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(held)


def _exchanged(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Swaps two directories in one step that no kill divides; False where that is unknown (NFS)."""
    rename = getattr(ctypes.CDLL(None), 'renameat2', None)  # glibc from 2.28
    paths = _HERE, os.fsencode(one), _HERE, os.fsencode(other)
    return rename is not None and rename(*paths, _RENAME_EXCHANGE) == 0


_SCHEME = re.compile(r'[a-zA-Z][-a-zA-Z0-9+.]*://')


def is_remote(path: str) -> bool:
    """Whether `path` has a scheme such as `gs://`, so that it is not a local directory."""
    return _SCHEME.match(path) is not None
