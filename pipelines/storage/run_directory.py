"""The directory of one run: its layout, its lock and its numbered checkpoints.

In: the path the user chose. Out: the paths that everyone else writes to, and whether disk and
memory suffice. What a checkpoint or a file contains is its writer's business, not this module's.
"""

import contextlib
import datetime
import errno
import fcntl
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from types import TracebackType

from infra.disk import is_remote, remove_leftovers, unfit_name
from pipelines.errors import UsageError

CHECKPOINT_RUN_FILE = 'run.json'
"""File of a checkpoint with the run's own counters; a checkpoint without it is incomplete."""

SERVERS = pathlib.PurePath('servers')
SHARD_CHECKPOINTS = SERVERS / 'replay'
"""Where each replay shard of a run writes, below the run's directory: moved to the checkpoint."""

_PATTERN = re.compile(r'\[.*\]|\\', re.DOTALL)
_CHECKPOINT_NAME = re.compile(r'checkpoint-(\d{8})')
_STAGING_PREFIX = '.writing-'
_DAMAGED_PREFIX = 'damaged-'
_REPLACED_PREFIX = '.replaced-'
_LOCK_FILE = '.lock'
_PROCESS_ID = re.compile(r'[1-9][0-9]{0,6}')  # Linux: below 2^22; 0 would be the own group


def default_path(game: str, preset: str, now: datetime.datetime | None = None) -> pathlib.Path:
    """A new `runs/<game>-<preset>-<timestamp>`."""
    return dated(pathlib.Path('runs', f'{game}-{preset}'), now=now)


def dated(path: pathlib.Path, now: datetime.datetime | None = None) -> pathlib.Path:
    """`<path>-<timestamp>`, with a number behind the time when that exists already."""
    stem = f'{path.name}-{now or datetime.datetime.now():%Y%m%d-%H%M%S}'
    candidate, number = path.with_name(stem), 2
    while candidate.exists():
        candidate, number = path.with_name(f'{stem}-{number}'), number + 1
    return candidate


def require_fit(path: pathlib.Path) -> None:
    """Checks that TensorFlow and Reverb can work in a directory of this name.

    Raises:
      UsageError: they cannot.
    """
    if reason := unfit_name(path):
        raise UsageError(f'{str(path)!r}: {reason}; choose another directory.')


def output_path(path: str) -> pathlib.Path:
    """What `--output` names, made absolute; its parent directory is made.

    Raises:
      UsageError: it is not a name on this machine, or no fit one.
      OSError: its parent cannot be made.
    """
    if is_remote(path):
        raise UsageError(f'--output {path}: name a place on this machine.')
    output = pathlib.Path(path).absolute()
    require_fit(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def loading_hint(path: pathlib.Path) -> str:
    """What to know of a SavedModel at `path` before it is loaded; empty: nothing."""
    if not _PATTERN.search(str(path)):
        return ''
    return (
        f'{path}: TensorFlow loads no SavedModel from a path with [...] or \\; copy it to another'
        ' place to load it'
    )


class RunDirectory:
    """A run's directory, held by this process alone from `open` until `close`.

    A context manager. When a new run ends in a `UsageError` before its first checkpoint, the
    directory is removed again: the user mends the mistake and gives the same command.
    """

    def __init__(
        self, path: pathlib.Path, lock: int, created: pathlib.Path | None, new: bool = False
    ):
        """Use `open`. `created`: topmost directory made for a new run, None when there was one."""
        self.path = path
        self._lock = lock
        self._created = created
        self._new = new
        self._discarded = False

    @classmethod
    def open(cls, path: str | os.PathLike[str], resume: bool = False) -> 'RunDirectory':
        """Makes the directory of a new run, or takes over that of a run to go on with.

        Raises:
          UsageError: the path is used already (or, with `resume`, holds no run), cannot be
            written, is of no fit name, or another process has it.
        """
        path = pathlib.Path(path).absolute()  # workers may have another current directory
        require_fit(path)
        if resume:
            _require_run(path, ', or leave out --resume to start a new run')
        else:
            _require_unused(path)
        created = _topmost_missing(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
        except OSError as error:
            _remove_empty(path, created)
            raise _unwritable(path, error) from error
        directory = cls(path, lock, created, new=not resume)
        try:
            # Looked at again under the lock: another process may have come first.
            if not resume:
                _require_unused(path)
            directory._make_layout()
        except OSError as error:
            directory.close()
            raise _unwritable(path, error) from error
        except UsageError:
            directory.close()
            raise
        return directory

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> 'RunDirectory':
        """A run's directory to read from; its run may be going on, so no lock is taken.

        Raises:
          UsageError: `path` holds no run that may be read, or is of no fit name.
        """
        path = pathlib.Path(path).absolute()
        require_fit(path)
        _require_run(path, '')
        return cls(path, lock=-1, created=None)

    def holder(self) -> int | None:
        """Process id of the run that goes on in the directory, None when none does.

        Raises:
          UsageError: this may not be read.
        """
        try:
            with _permitted(self.path):
                descriptor = os.open(self.path / _LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.read(descriptor, 32).decode(errors='replace').strip()
            return int(text) if _PROCESS_ID.fullmatch(text) else None
        finally:
            os.close(descriptor)
        return None

    @property
    def config_file(self) -> pathlib.Path:
        return self.path / 'config.json'

    @property
    def resumptions_file(self) -> pathlib.Path:
        return self.path / 'resumptions.jsonl'

    @property
    def summary_file(self) -> pathlib.Path:
        return self.path / 'summary.json'

    @property
    def episodes_file(self) -> pathlib.Path:
        return self.path / 'episodes.jsonl'

    @property
    def learning_curve_file(self) -> pathlib.Path:
        return self.path / 'learning_curve.png'

    @property
    def events(self) -> pathlib.Path:
        return self.path / 'events'

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / 'checkpoints'

    @property
    def policy(self) -> pathlib.Path:
        return self.path / 'policy'

    @property
    def logs(self) -> pathlib.Path:
        return self.path / 'logs'

    def _make_layout(self) -> None:
        for directory in (self.events, self.logs):  # the others when there is something in them
            directory.mkdir(exist_ok=True)
        for leftover in self.checkpoints.glob(f'{_STAGING_PREFIX}*'):
            shutil.rmtree(leftover)  # a run killed while it wrote a checkpoint
        for leftover in self.checkpoints.glob(f'{_REPLACED_PREFIX}*'):
            shutil.rmtree(leftover)
        remove_leftovers(self.path)
        if (servers := self.path / SERVERS).is_dir():
            remove_leftovers(servers)
        shutil.rmtree(self.path / SHARD_CHECKPOINTS, ignore_errors=True)  # not moved in time

    def latest_checkpoints(self) -> list[pathlib.Path]:
        """The complete checkpoints, newest first.

        Raises:
          UsageError: they may not be read.
        """
        with _permitted(self.checkpoints):
            return [path for _, path in sorted(self._numbered(), reverse=True)]

    def has_checkpoint(self) -> bool:
        """Returns whether a readable directory holds a complete checkpoint."""
        try:
            return bool(self.latest_checkpoints())
        except (UsageError, OSError):
            return False

    def _numbered(self) -> Iterator[tuple[int, pathlib.Path]]:
        for path in self.checkpoints.iterdir() if self.checkpoints.is_dir() else ():
            match = _CHECKPOINT_NAME.fullmatch(path.name)
            if match and (path / CHECKPOINT_RUN_FILE).is_file():
                yield int(match.group(1)), path

    @contextlib.contextmanager
    def new_checkpoint(self) -> Iterator[pathlib.Path]:
        """An empty directory to write a checkpoint into; leaving the block publishes it.

        Published means renamed to `checkpoint-<number>`, one above the newest. The writer must put
        `run.json` into it. An exception in the block removes what was written and publishes
        nothing. The path yielded is gone afterwards: take `latest_checkpoints()[0]`.

        Raises:
          FileNotFoundError: the block has written no `run.json`.
        """
        self.checkpoints.mkdir(exist_ok=True)
        taken = [int(name) for name in re.findall(r'checkpoint-(\d{8})', self._checkpoint_names())]
        name = f'checkpoint-{max(taken, default=0) + 1:08d}'
        staging = self.checkpoints / f'{_STAGING_PREFIX}{name}'
        staging.mkdir()
        try:
            yield staging
            if not (staging / CHECKPOINT_RUN_FILE).is_file():
                raise FileNotFoundError(f'{staging}: {CHECKPOINT_RUN_FILE} is missing.')
            _sync_directory(staging)
            staging.rename(self.checkpoints / name)
            _sync_directory(self.checkpoints)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    def _checkpoint_names(self) -> str:
        return '\n'.join(path.name for path in self.checkpoints.iterdir())

    def set_aside(self, checkpoint: pathlib.Path) -> pathlib.Path:
        """Renames a damaged checkpoint so that it is neither restored nor counted by `prune`."""
        aside = checkpoint.with_name(_DAMAGED_PREFIX + checkpoint.name)
        while aside.exists():  # somebody put the same checkpoint back
            aside = aside.with_name(_DAMAGED_PREFIX + aside.name)
        checkpoint.rename(aside)
        return aside

    def prune(self, keep: int = 2) -> None:
        """Removes all but the `keep` newest complete checkpoints."""
        for path in self.latest_checkpoints()[keep:]:
            # Renamed first, so that a removal cut short leaves no half checkpoint behind.
            doomed = path.with_name(_REPLACED_PREFIX + path.name)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def discard(self) -> None:
        """Removes, when the directory is closed, all that a new run without a checkpoint left."""
        self._discarded = True

    def unwanted(self, error: BaseException | None) -> bool:
        """Whether closing the directory now, because of `error`, removes all of it."""
        discarded = self._discarded or isinstance(error, UsageError)
        return discarded and self._new and not self.latest_checkpoints()

    def close(self) -> None:
        """Gives the directory free for another process. Repeated calls do nothing."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> 'RunDirectory':
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.unwanted(error):
            # The lock last: who looks at it sees a run that goes on, or nothing of it.
            for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == _LOCK_FILE):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            _remove_empty(self.path, self._created)
        self.close()


@contextlib.contextmanager
def _permitted(path: pathlib.Path) -> Iterator[None]:
    """Raises UsageError where what is read of `path` belongs to another user."""
    try:
        yield
    except PermissionError as error:
        raise UsageError(f'{path}: may not be read ({error.strerror}).') from error


def _require_run(path: pathlib.Path, alternative: str) -> None:
    """Raises UsageError unless `path` holds a run; `alternative` is a second remedy."""
    with _permitted(path):
        is_directory, is_run = path.is_dir(), (path / 'config.json').is_file()
    if not is_directory:
        raise UsageError(f'{path}: no such run directory; name one as --run_dir{alternative}.')
    if not is_run:
        raise UsageError(
            f'{path}: holds no run (config.json is missing); name the directory of a run as'
            f' --run_dir{alternative}.'
        )


def _require_unused(path: pathlib.Path) -> None:
    """Raises UsageError unless `path` is missing or an empty directory."""
    try:
        used = any(entry.name != _LOCK_FILE for entry in path.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unwritable(path, error) from error
    if used and (path / 'config.json').is_file():
        raise UsageError(
            f'{path}: already used by a run; choose another --run_dir, or go on with that run by'
            ' adding --resume.'
        )
    if used:
        raise UsageError(f'{path}: not an empty directory; choose another --run_dir.')


def _unwritable(path: pathlib.Path, error: OSError) -> UsageError:
    return UsageError(
        f'{path}: cannot be written ({os.strerror(error.errno or errno.EIO)}); choose another'
        ' --run_dir.'
    )


def _topmost_missing(path: pathlib.Path) -> pathlib.Path | None:
    """The topmost directory that making `path` will make; None when `path` exists."""
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    return missing[-1] if missing else None


def _remove_empty(path: pathlib.Path, topmost: pathlib.Path | None) -> None:
    """Removes `path` and its parents up to `topmost`, as far as they are empty."""
    while topmost is not None:
        with contextlib.suppress(OSError):
            path.rmdir()
        if path == topmost:
            return
        path = path.parent


def _lock(path: pathlib.Path) -> int:
    """Takes the directory's lock; the kernel gives it free when this process ends, however.

    Raises:
      UsageError: another process has it.
      OSError: the lock file cannot be written.
    """
    descriptor = os.open(path / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 32).decode(errors='replace').strip() or 'unknown'
        os.close(descriptor)
        raise UsageError(
            f'{path}: in use by a run that is still going on (process {holder}); wait for its end'
            ' or choose another --run_dir.'
        ) from error
    except OSError:
        os.close(descriptor)
        raise
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f'{os.getpid()}\n'.encode(), 0)
    return descriptor


def _sync_directory(path: pathlib.Path) -> None:
    """Makes the directory's entries survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
