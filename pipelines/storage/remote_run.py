"""A run whose directory is remote: its owner, and its local copy.

In: the URL given as `--run_dir`. Out: the local copy, brought up to date, in which the run works
(it needs locks, atomic renames and appended files); `mirror.py` uploads its changes. A remote
checkpoint is complete only with its `run.json`, which is sent last and deleted first.
"""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from infra.disk import InUseError, lock, read_json, write_json
from infra.sealed import parse_object, unseal
from pipelines.errors import UsageError, unwritable
from pipelines.events import finite
from pipelines.experiment.config import CONFIG_FILE
from pipelines.storage.object_store import Place, RemoteError, Stamp, require_answer, within
from pipelines.storage.run_directory import (
    CHECKPOINT_RUN_FILE,
    MARK_FILE,
    RunDirectory,
    command,
    dated,
)
from pipelines.storage.space import require_disk

OWNER_FILE = 'owner.json'
PERIOD_SECONDS = 30.0
"""Between two passes of the mirror, each of which renews the claim."""
RELEASE_SECONDS = 10.0
"""For a last operation on a directory that may be unreachable."""

_OWNER_SECONDS = 300.0  # a claim that is not renewed for so long has expired
_CHECKPOINTS = 'checkpoints'


class TakenOverError(Exception):
    """Another launcher has claimed the remote run; the message names it."""


class RemoteRun:
    """A run's remote directory and its local copy.

    One launcher owns it, as far as a store without locks allows: `owner.json` in it names launcher
    and time, and every pass of the mirror renews it. `close` releases the claim.

    Attributes:
      url: as the user gave it.
      place: the remote directory.
      local: the local copy.
      sent: the remote files by name, with the stamp of the equal local file; None: they differ or
        were not compared.
    """

    def __init__(self, url: str, work_dir: str | None = None, flags: Sequence[str] = ()):
        """`work_dir`: the local copy, None: below `runs/`; `flags`: Beam's.

        Raises:
          UsageError: Beam has no file system for it, or there are no credentials.
        """
        self.url = url
        self.place = Place.at(url, flags)
        self.sent: dict[str, Stamp | None] = {}
        self._work_dir = work_dir
        self._id = ''
        self._beaten = 0.0

    def open(self, resume: bool, notify: Callable[[str], None]) -> pathlib.Path:
        """Claims the remote directory and, with `resume`, brings the local copy up to date.

        Returns the path of the local copy, which does not exist yet for a new run.

        Raises:
          UsageError: the remote directory is not readable and writable, holds a run (with `resume`:
            holds none), or another launcher owns it.
        """
        self.local = _local_copy(self.place, self._work_dir, resume).absolute()
        _require_free(self.local)
        files = require_answer(self.place)
        if not resume and files.keys() - {OWNER_FILE}:
            raise UsageError(
                f'{self.url}: not empty. Fix: choose another --run_dir, or add --resume to resume'
                ' the run there.'
            )
        try:
            self._claim(files)
            if resume:
                self._bring_up_to_date(files, notify)
        except (RemoteError, TakenOverError) as error:
            raise UsageError(str(error)) from error
        except OSError as error:
            raise unwritable(self.local, error, 'name another --work_dir') from error
        return self.local

    def reopen(self, local: pathlib.Path) -> None:
        """Claims the remote directory for a local copy that is already locked.

        Raises:
          UsageError: the remote directory is not readable and writable, another launcher owns it,
            or its newest checkpoint is newer than that of the local copy.
        """
        self.local = local
        files = require_answer(self.place)
        try:
            self._claim(files)
            there = self._checkpoints_there(files)
        except RemoteError as error:
            raise UsageError(str(error)) from error
        here, newest = _local_updates(local) or 0, _newest(there)
        if newest > here:
            raise UsageError(
                f'{self.url}: has {newest} updates, {local} only {here}; nothing copied.'
                f' Fix: resume the run with {command("run", self.url, "--resume")}.'
            )
        self._mark_uploaded(there)

    def mark(self) -> None:
        """Writes the marker into the local copy, which must be locked.

        Raises:
          UsageError: the local copy is not writable.
        """
        try:
            self._mark(self.local)
        except OSError as error:
            raise unwritable(self.local, error, 'name another --work_dir') from error

    def _mark(self, directory: pathlib.Path) -> None:
        write_json(directory / MARK_FILE, {'url': self.place.url, 'owner': self._id})

    def beat(self) -> None:
        """Renews the claim once per period.

        Raises:
          TakenOverError: another launcher has claimed the run.
          RemoteError: the claim cannot be written.
        """
        if time.monotonic() - self._beaten < PERIOD_SECONDS:
            return
        owner = self._owner()
        if owner and owner.get('id') != self._id:
            raise TakenOverError(f'{self.url}: claimed by {_describe(owner)}')
        self._write_owner()

    def close(self) -> None:
        """Releases the claim, within seconds; leaves that of another launcher."""
        if not self._id:
            return
        with contextlib.suppress(RemoteError):
            within(RELEASE_SECONDS, self.url, self._release)
        self._id = ''

    def _release(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)  # of a download that a signal ended
        if (self._owner() or {}).get('id') == self._id:
            self.place.delete([OWNER_FILE])

    def _owner(self) -> dict[str, Any] | None:
        """The content of `owner.json`, None if it is missing or invalid."""
        content = self.place.read(OWNER_FILE)
        with contextlib.suppress(ValueError):
            return parse_object(content or b'')
        return None

    def _write_owner(self) -> None:
        owner = {
            'id': self._id,
            'host': socket.gethostname(),
            'process': os.getpid(),
            'directory': str(self.local.absolute()),
            'time': time.time(),
        }
        self.place.write(OWNER_FILE, json.dumps(owner, indent=2).encode())
        self._beaten = time.monotonic()

    def _claim(self, files: Mapping[str, int]) -> None:
        """Claims the directory, which holds `files`.

        The claim of a crashed launcher of the same local copy is taken over without waiting.

        Raises:
          UsageError: another launcher owns it.
          RemoteError: it is not readable and writable.
        """
        owner = self._owner()
        if owner and owner.get('id') != (read_json(self.local / MARK_FILE) or {}).get('owner'):
            age = age_of(owner)
            if age < _OWNER_SECONDS:
                raise UsageError(
                    f'{self.url}: in use by {_describe(owner)} (last heartbeat {age:.0f} s ago).'
                    ' Fix: wait until it ends, or choose another --run_dir; the claim of a crashed'
                    f' launcher expires after {_OWNER_SECONDS:.0f} s.'
                )
        self._id = uuid.uuid4().hex
        self._write_owner()
        found = self._owner() or {}
        if found.get('id') != self._id:
            raise UsageError(
                f'{self.url}: just claimed by {_describe(found)}. Fix: choose another --run_dir.'
            )
        self.sent = {name: None for name in files if name != OWNER_FILE}

    @property
    def _staging(self) -> pathlib.Path:
        """Where a run is downloaded; becomes the local copy when complete."""
        return self.local.with_name(f'.{self.local.name}.fetching')

    def _bring_up_to_date(self, files: Mapping[str, int], notify: Callable[[str], None]) -> None:
        """Downloads the run, unless the local copy is as new."""
        here = _local_updates(self.local)
        if CONFIG_FILE not in files:
            if here is None:
                raise UsageError(
                    f'{self.url}: holds no run ({CONFIG_FILE} is missing). Fix: name a run as'
                    ' --run_dir, or leave out --resume to start a new run.'
                )
            notify(f'{self.url} holds no run yet: resuming from the local copy {self.local}')
            return
        there = self._checkpoints_there(files)
        newest = _newest(there)
        if here is not None and here >= newest:
            self._mark_uploaded(there)
            notify(
                f'resuming from the local copy {self.local}: {max(here, 0)} updates;'
                f' {self.url} has {max(newest, 0)}'
            )
            return
        if _is_used(self.local):
            aside = dated(self.local.with_name(f'{self.local.name}-before'))
            self.local.rename(aside)
            notify(
                f'{self.local} has {max(here or 0, 0)} updates, {self.url} {newest}: renamed the'
                f' former to {aside}'
            )
        self._fetch_run(files, notify)

    def _checkpoints_there(self, files: Mapping[str, int]) -> dict[str, bytes | None]:
        """The `run.json` of each complete checkpoint among remote `files`, by checkpoint."""
        return {name: self.place.read(run_file(name)) for name in complete_checkpoints(files)}

    def _mark_uploaded(self, there: Mapping[str, bytes | None]) -> None:
        """Marks checkpoints that are already uploaded, so they are not sent again.

        Equal `run.json` means equal files: it holds their checksums.
        """
        for name, content in there.items():
            path = self.local / _CHECKPOINTS / name
            if content is not None and _content(path / CHECKPOINT_RUN_FILE) == content:
                for file in files_below(path):
                    self.sent[file.relative_to(self.local).as_posix()] = stamp_of(file)

    def _fetch_run(self, files: Mapping[str, int], notify: Callable[[str], None]) -> None:
        """Downloads the run into a new local copy, which appears only when complete."""
        complete = complete_checkpoints(files)
        wanted = {
            name: size
            for name, size in files.items()
            if name != OWNER_FILE and (checkpoint_of(name) in complete or not checkpoint_of(name))
        }
        total = sum(wanted.values())
        self.local.parent.mkdir(parents=True, exist_ok=True)
        require_disk(self.local, total, 'free some, or name another --work_dir')
        notify(
            f'fetching {len(wanted)} files, {total / 1e6:.1f} MB, from {self.url} to {self.local}'
        )
        shutil.rmtree(self._staging, ignore_errors=True)  # of an interrupted download
        for name, size in wanted.items():
            stamp = self.place.fetch(name, self._staging / name, self.beat)
            if stamp[0] != size:
                raise RemoteError(
                    f'{self.url}/{name}: got {stamp[0]} of {size} bytes. Fix: try again.'
                )
            self.sent[name] = stamp
        self._mark(self._staging)
        with contextlib.suppress(FileNotFoundError):
            self.local.rmdir()  # it may be an empty directory
        self._staging.rename(self.local)


def _local_copy(place: Place, work_dir: str | None, resume: bool) -> pathlib.Path:
    """The path of a remote run's local copy.

    Raises:
      UsageError: `work_dir` holds something else.
    """
    if work_dir is not None:
        path = pathlib.Path(work_dir)
        if resume and _is_used(path) and not _is_copy(path, place):
            raise UsageError(
                f'--work_dir {work_dir}: not a copy of {place.url}. Fix: choose another.'
            )
        return path
    path, number = pathlib.Path('runs') / place.name, 2
    while _is_used(path) and not (resume and _is_copy(path, place)):
        path, number = path.with_name(f'{place.name}-{number}'), number + 1
    return path


def _is_used(path: pathlib.Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _is_copy(path: pathlib.Path, place: Place) -> bool:
    return (read_json(path / MARK_FILE) or {}).get('url') == place.url


def _require_free(local: pathlib.Path) -> None:
    """Raises UsageError if a run is active in the local copy."""
    try:
        RunDirectory.existing(local)
    except UsageError:
        return  # no run is there
    try:
        lock(local, by_children=True).close()
    except InUseError as error:
        remedy = 'wait until it ends, or choose another --run_dir'
        raise UsageError(f'{error}. Fix: {remedy}.') from None
    except OSError as error:
        raise unwritable(local, error) from error


def _local_updates(local: pathlib.Path) -> int | None:
    """Updates of the newest readable checkpoint, -1 if there is none; None: no run."""
    try:
        directory = RunDirectory.existing(local)
    except UsageError:
        return None
    from pipelines.storage.checkpoints import readable_counters  # imports TensorFlow

    try:
        return int(readable_counters(directory)['updates'])
    except UsageError:
        return -1


def updates_in(content: bytes | None) -> int:
    """Updates in the content of a `run.json`, -1 if it is damaged."""
    with contextlib.suppress(ValueError):
        updates = unseal(parse_object(content or b'')).get('updates')
        return updates if type(updates) is int else -1
    return -1


def _newest(checkpoints: Mapping[str, bytes | None]) -> int:
    """Updates of the newest checkpoint, given each `run.json`; -1 if there is none."""
    return max((updates_in(content) for content in checkpoints.values()), default=-1)


def checkpoint_of(name: str) -> str:
    """The checkpoint to which a file belongs, empty if to none."""
    parts = name.split('/')
    return parts[1] if parts[0] == _CHECKPOINTS and len(parts) > 2 else ''


def run_file(checkpoint: str) -> str:
    return f'{_CHECKPOINTS}/{checkpoint}/{CHECKPOINT_RUN_FILE}'


def complete_checkpoints(files: Mapping[str, int]) -> set[str]:
    """The complete checkpoints among remote files."""
    return {checkpoint_of(name) for name in files if name == run_file(checkpoint_of(name))}


def files_below(path: pathlib.Path) -> Iterator[pathlib.Path]:
    for folder, _, names in os.walk(path):
        for name in names:
            yield pathlib.Path(folder, name)


def stamp_of(file: pathlib.Path) -> Stamp:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _content(file: pathlib.Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def age_of(owner: Mapping[str, Any]) -> float:
    """Seconds since the last heartbeat; the clocks of two machines may differ a little."""
    when = finite(owner.get('time'))
    return 0.0 if when is None else max(0.0, time.time() - when)


def _describe(owner: Mapping[str, Any]) -> str:
    return (
        f'process {owner.get("process")} on {owner.get("host")} with the local copy'
        f' {owner.get("directory")}'
    )
