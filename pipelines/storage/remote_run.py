"""A run whose directory is remote: whose it is, and the working copy on this machine.

In: the address given as `--run_dir`. Out: the local directory in which the run works (locks, atomic
renames and appended files need one), brought up to date; `mirror.py` copies its changes back.
A remote checkpoint is complete only with its `run.json`, which is sent last and deleted first.
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

from infra.disk import read_json, write_json
from infra.sealed import parse_object, unseal
from pipelines.errors import UsageError
from pipelines.events import finite
from pipelines.storage.object_store import Place, RemoteError, Stamp, require_answer, within
from pipelines.storage.run_directory import CHECKPOINT_RUN_FILE, RunDirectory, dated
from pipelines.storage.space import require_disk

CONFIG_FILE = 'config.json'
OWNER_FILE = 'owner.json'
MARK_FILE = '.remote.json'
"""In a working copy: of which remote place it is one, and which launcher wrote there last."""
PERIOD_SECONDS = 30.0
"""Between two passes of the mirror, each of which tells that the launcher is alive."""
RELEASE_SECONDS = 10.0
"""For the last thing to be done at a place that may be away."""

_OWNER_SECONDS = 300.0  # an owner that has not been heard of for so long is dead
_CHECKPOINTS = 'checkpoints'


class TakenOverError(Exception):
    """Another launcher has taken the remote run; one line that says which."""


class RemoteRun:
    """A run's place in the remote store, and its working copy here.

    It is this launcher's alone, as far as a store without locks allows: `owner.json` there names
    launcher and time, written anew by every pass of the mirror. `close` gives it free.

    Attributes:
      url: the address as the user gave it.
      place: the remote directory.
      local: the working copy's directory.
      sent: the files there, by name, with the stamp of the local file that was copied, None when
        they differ or were not compared.
    """

    def __init__(self, url: str, work_dir: str | None = None, flags: Sequence[str] = ()):
        """`work_dir`: the working copy's directory, None: below `runs/`; `flags`: Beam's.

        Raises:
          UsageError: Beam knows no such place, or no credentials are to be had for it.
        """
        self.url = url
        self.place = Place.at(url, flags)
        self.sent: dict[str, Stamp | None] = {}
        self._work_dir = work_dir
        self._id = ''
        self._beaten = 0.0

    def open(self, resume: bool, tell: Callable[[str], None]) -> pathlib.Path:
        """Claims the place and, to go on with a run, brings the working copy up to date.

        Returns the working copy's directory, which for a new run is not made yet.

        Raises:
          UsageError: the place cannot be read or written, holds a run already (or, to go on with,
            none), or another launcher has it.
        """
        self.local = _working_copy(self.place, self._work_dir, resume).absolute()
        _require_free(self.local)
        files = require_answer(self.place)
        if not resume and files.keys() - {OWNER_FILE}:
            raise UsageError(
                f'{self.url}: not empty; choose another --run_dir, or go on with the run there by'
                ' adding --resume.'
            )
        try:
            self._claim(files)
            if resume:
                self._bring_up_to_date(files, tell)
        except (RemoteError, TakenOverError) as error:
            raise UsageError(str(error)) from error
        except OSError as error:
            raise UsageError(f'{self.local}: cannot be written ({error}).') from error
        return self.local

    def reopen(self, local: pathlib.Path) -> None:
        """Claims the place for a working copy that is locked already and shall be sent there.

        Raises:
          UsageError: the place cannot be read or written, another launcher has it, or it has a
            newer checkpoint than the working copy.
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
                f'{self.url}: has {newest} updates, {local} only {here}: nothing copied.'
            )
        self._know_equal_checkpoints(there)

    def mark(self) -> None:
        """Notes in the working copy of what it is one. Call it when its lock is held.

        Raises:
          UsageError: it cannot be written.
        """
        try:
            self._mark(self.local)
        except OSError as error:
            raise UsageError(f'{self.local}: cannot be written ({error}).') from error

    def _mark(self, directory: pathlib.Path) -> None:
        write_json(directory / MARK_FILE, {'url': self.place.url, 'owner': self._id})

    def beat(self) -> None:
        """Says at the remote place, once in a period, that this launcher is alive.

        Raises:
          TakenOverError: another launcher has taken the place.
          RemoteError: it cannot be said.
        """
        if time.monotonic() - self._beaten < PERIOD_SECONDS:
            return
        owner = self._owner()
        if owner and owner.get('id') != self._id:
            raise TakenOverError(f'{self.url} was taken over by {_described(owner)}')
        self._write_owner()

    def close(self) -> None:
        """Gives the place free, within seconds; that of another launcher is left alone."""
        if not self._id:
            return
        with contextlib.suppress(RemoteError):
            within(RELEASE_SECONDS, self.url, self._release)
        self._id = ''

    def _release(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)  # of a fetch that a signal has ended
        if (self._owner() or {}).get('id') == self._id:
            self.place.delete([OWNER_FILE])

    def _owner(self) -> dict[str, Any] | None:
        """Who has the place; None when nobody has, or the file is none of ours."""
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
        """Takes the place with its `files`; from a dead launcher of this very copy at once.

        Raises:
          UsageError: another launcher has it.
          RemoteError: it cannot be read or written.
        """
        owner = self._owner()
        if owner and owner.get('id') != (read_json(self.local / MARK_FILE) or {}).get('owner'):
            age = _age(owner)
            if age < _OWNER_SECONDS:
                raise UsageError(
                    f'{self.url}: in use by {_described(owner)}, heard of {age:.0f} s ago; wait for'
                    f' its end (a dead one counts for {_OWNER_SECONDS:.0f} s), or choose another'
                    ' --run_dir.'
                )
        self._id = uuid.uuid4().hex
        self._write_owner()
        found = self._owner() or {}
        if found.get('id') != self._id:
            raise UsageError(
                f'{self.url}: {_described(found)} has just taken it; choose another --run_dir.'
            )
        self.sent = {name: None for name in files if name != OWNER_FILE}

    @property
    def _staging(self) -> pathlib.Path:
        """Where a run is fetched to before it is the working copy."""
        return self.local.with_name(f'.{self.local.name}.fetching')

    def _bring_up_to_date(self, files: Mapping[str, int], tell: Callable[[str], None]) -> None:
        """Fetches the run, unless the working copy has as new a checkpoint."""
        here = _local_updates(self.local)
        if CONFIG_FILE not in files:
            if here is None:
                raise UsageError(
                    f'{self.url}: holds no run ({CONFIG_FILE} is missing); name the place of a run'
                    ' as --run_dir, or leave out --resume to start a new run.'
                )
            tell(f'{self.url} holds no run yet: going on with the working copy {self.local}')
            return
        there = self._checkpoints_there(files)
        newest = _newest(there)
        if here is not None and here >= newest:
            self._know_equal_checkpoints(there)
            tell(
                f'going on with the working copy {self.local}: its newest checkpoint has'
                f' {max(here, 0)} updates, that of {self.url} {max(newest, 0)}'
            )
            return
        if _is_used(self.local):
            aside = dated(self.local.with_name(f'{self.local.name}-before'))
            self.local.rename(aside)
            tell(
                f'{self.local} has {max(here or 0, 0)} updates, {self.url} {newest}: the former is'
                f' kept as {aside}'
            )
        self._fetch_run(files, tell)

    def _checkpoints_there(self, files: Mapping[str, int]) -> dict[str, bytes | None]:
        """The `run.json` of each complete checkpoint among remote `files`, by the checkpoint."""
        return {name: self.place.read(run_file(name)) for name in complete_checkpoints(files)}

    def _know_equal_checkpoints(self, there: Mapping[str, bytes | None]) -> None:
        """Need not send what is there already: `run.json` names counters and sums of the files."""
        for name, content in there.items():
            path = self.local / _CHECKPOINTS / name
            if content is not None and _content(path / CHECKPOINT_RUN_FILE) == content:
                for file in files_below(path):
                    self.sent[file.relative_to(self.local).as_posix()] = stamp_of(file)

    def _fetch_run(self, files: Mapping[str, int], tell: Callable[[str], None]) -> None:
        """Copies the run into a new working copy, which is there only when it is whole."""
        complete = complete_checkpoints(files)
        wanted = {
            name: size
            for name, size in files.items()
            if name != OWNER_FILE and (checkpoint_of(name) in complete or not checkpoint_of(name))
        }
        total = sum(wanted.values())
        self.local.parent.mkdir(parents=True, exist_ok=True)
        require_disk(self.local, total, 'free some, or name another --work_dir')
        tell(f'fetching {len(wanted)} files, {total / 1e6:.1f} MB, from {self.url} to {self.local}')
        shutil.rmtree(self._staging, ignore_errors=True)  # of a fetch that was cut short
        for name, size in wanted.items():
            stamp = self.place.fetch(name, self._staging / name, self.beat)
            if stamp[0] != size:
                raise RemoteError(f'{self.url}/{name}: {stamp[0]} of {size} bytes came; try again.')
            self.sent[name] = stamp
        self._mark(self._staging)
        with contextlib.suppress(FileNotFoundError):
            self.local.rmdir()  # an empty one may be there
        self._staging.rename(self.local)


def _working_copy(place: Place, work_dir: str | None, resume: bool) -> pathlib.Path:
    """The directory in which a remote run works here.

    Raises:
      UsageError: `work_dir` has something else in it.
    """
    if work_dir is not None:
        path = pathlib.Path(work_dir)
        if resume and _is_used(path) and not _is_copy(path, place):
            raise UsageError(
                f'--work_dir {work_dir}: not a working copy of {place.url}; choose another.'
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
    """Raises UsageError when a run goes on in the working copy."""
    try:
        holder = RunDirectory.existing(local).holder()
    except UsageError:
        return  # no run is there
    if holder is not None:
        raise UsageError(
            f'{local}: in use by a run that is still going on (process {holder}); wait for its end'
            ' or choose another --run_dir.'
        )


def _local_updates(local: pathlib.Path) -> int | None:
    """Updates of the newest checkpoint that can be read, -1 without one; None: there is no run."""
    try:
        directory = RunDirectory.existing(local)
    except UsageError:
        return None
    from pipelines.storage.checkpoints import readable_counters  # imports TensorFlow

    try:
        return int(readable_counters(directory)['updates'])
    except UsageError:
        return -1


def _updates(content: bytes | None) -> int:
    """Updates by a checkpoint's `run.json`, -1 when it is damaged."""
    with contextlib.suppress(ValueError):
        updates = unseal(parse_object(content or b'')).get('updates')
        return updates if type(updates) is int else -1
    return -1


def _newest(checkpoints: Mapping[str, bytes | None]) -> int:
    """Updates of the newest checkpoint by their `run.json`, -1 when there is none."""
    return max((_updates(content) for content in checkpoints.values()), default=-1)


def checkpoint_of(name: str) -> str:
    """The checkpoint that a file belongs to, empty when to none."""
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


def _age(owner: Mapping[str, Any]) -> float:
    """Seconds since the owner was heard of; the clocks of two machines may differ a little."""
    when = finite(owner.get('time'))
    return 0.0 if when is None else max(0.0, time.time() - when)


def _described(owner: Mapping[str, Any]) -> str:
    return (
        f'process {owner.get("process")} on {owner.get("host")} with the working copy'
        f' {owner.get("directory")}'
    )
