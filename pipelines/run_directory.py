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
from collections.abc import Iterator, Sequence
from types import TracebackType

from pipelines.errors import UsageError

CHECKPOINT_RUN_FILE = 'run.json'
"""File of a checkpoint with the run's own counters; a checkpoint without it is incomplete."""

_SCHEME = re.compile(r'[a-zA-Z][-a-zA-Z0-9+.]*://')
_CHECKPOINT_NAME = re.compile(r'checkpoint-(\d{8})')
_STAGING_PREFIX = '.writing-'
_DAMAGED_PREFIX = 'damaged-'
_REPLACED_PREFIX = '.replaced-'
_LOCK_FILE = '.lock'
_GIB = 2.0**30
_CGROUP = pathlib.Path('/sys/fs/cgroup')
_MEMINFO = pathlib.Path('/proc/meminfo')


def default_path(game: str, preset: str, now: datetime.datetime | None = None) -> pathlib.Path:
    """`runs/<game>-<preset>-<timestamp>`, with a number behind it when that exists already."""
    now = now or datetime.datetime.now()
    path = pathlib.Path('runs') / f'{game}-{preset}-{now:%Y%m%d-%H%M%S}'
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f'{path.name}-{number}'), number + 1
    return candidate


def is_remote(path: str) -> bool:
    """Whether `path` has a scheme, such as `gs://`, and so is no directory of this machine."""
    return _SCHEME.match(path) is not None


@contextlib.contextmanager
def readable(path: str, outputs: Sequence[str]) -> Iterator[pathlib.Path]:
    """The directory of a run to read from, whether a run goes on there or not.

    For a remote one: a copy of what evaluation and export need; those of `outputs`, files or
    directories, that are in it when the block is left go back to the remote place.

    Raises:
      UsageError: there is no such remote run, it has no checkpoint, or it cannot be written.
    """
    if not is_remote(path):
        yield pathlib.Path(path)
        return
    from pipelines.borrowed import borrowed  # imports Beam

    with borrowed(path, outputs) as local:
        yield local


def _existing_ancestor(path: pathlib.Path) -> pathlib.Path:
    """The nearest of `path` and its parents that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def require_disk(
    path: str | os.PathLike[str],
    needed_bytes: int,
    remedy: str = 'free some, or choose another --run_dir',
) -> None:
    """Checks that the file system of `path` (which need not exist yet) has `needed_bytes` free.

    Raises:
      UsageError: it has not.
    """
    free = shutil.disk_usage(_existing_ancestor(pathlib.Path(path))).free
    if free < needed_bytes:
        raise UsageError(
            f'{path}: {free / _GIB:.1f} GiB of disk free, the run needs'
            f' {needed_bytes / _GIB:.1f} GiB: {remedy}.'
        )


def available_memory() -> int:
    """Bytes that new processes can have: the machine's, or the container's when that is less."""
    text = _MEMINFO.read_text()
    match = re.search(r'^MemAvailable:\s+(\d+) kB', text, re.MULTILINE)
    machine = int(match.group(1)) * 1024 if match else 1 << 62
    try:
        limit = int((_CGROUP / 'memory.max').read_text())  # 'max' (no limit): a ValueError
        used = int((_CGROUP / 'memory.current').read_text())
        statistics = (_CGROUP / 'memory.stat').read_text()
    except (OSError, ValueError):
        return machine
    # The kernel gives this part of the page cache back before anything is refused.
    cache = re.search(r'^inactive_file (\d+)', statistics, re.MULTILINE)
    return min(machine, max(0, limit - used + (int(cache.group(1)) if cache else 0)))


def require_memory(
    needed_bytes: int,
    remedy: str = 'end other programs, or choose a smaller --replay_capacity, or fewer'
    ' --num_actors, --num_learners or --num_parameter_shards',
) -> None:
    """Checks that `needed_bytes` of memory are available.

    Raises:
      UsageError: they are not.
    """
    available = available_memory()
    if available < needed_bytes:
        raise UsageError(
            f'{available / _GIB:.1f} GiB of memory available, the run needs'
            f' {needed_bytes / _GIB:.1f} GiB: {remedy}.'
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
            written, or another process has it.
        """
        path = pathlib.Path(path).absolute()  # workers may have another current directory
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
          UsageError: `path` holds no run.
        """
        path = pathlib.Path(path).absolute()
        _require_run(path, '')
        return cls(path, lock=-1, created=None)

    def holder(self) -> int | None:
        """Process id of the run that goes on in the directory, None when none does."""
        try:
            descriptor = os.open(self.path / _LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.read(descriptor, 32).decode(errors='replace').strip()
            return int(text) if text.isdigit() else None
        finally:
            os.close(descriptor)
        return None

    @property
    def config_file(self) -> pathlib.Path:
        return self.path / 'config.json'

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
        for directory in (self.events, self.checkpoints, self.policy, self.logs):
            directory.mkdir(exist_ok=True)
        for leftover in self.checkpoints.glob(f'{_STAGING_PREFIX}*'):
            shutil.rmtree(leftover)  # a run killed while it wrote a checkpoint
        for leftover in self.checkpoints.glob(f'{_REPLACED_PREFIX}*'):
            shutil.rmtree(leftover)
        for leftover in self.path.glob(f'.{self.policy.name}.*'):
            shutil.rmtree(leftover)  # an export ended while it wrote

    def latest_checkpoints(self) -> list[pathlib.Path]:
        """The complete checkpoints, newest first."""
        return [path for _, path in sorted(self._numbered(), reverse=True)]

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
            for entry in self.path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            _remove_empty(self.path, self._created)
        self.close()


def _require_run(path: pathlib.Path, alternative: str) -> None:
    """Raises UsageError unless `path` holds a run; `alternative` is a second remedy."""
    if not path.is_dir():
        raise UsageError(f'{path}: no such run directory; name one as --run_dir{alternative}.')
    if not (path / 'config.json').is_file():
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
    descriptor = os.open(path / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
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
