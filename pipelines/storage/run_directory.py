"""The directory of one run: its layout, its lock and its numbered checkpoints.

In: the path that the user chose. Out: the paths of all files of the run. What they contain is not
known here.
"""

import contextlib
import datetime
import errno
import os
import pathlib
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO

from infra.disk import (
    LOCK_FILE,
    Generations,
    InUseError,
    lock,
    lock_holder,
    publish,
    remove,
    remove_leftovers,
    unfit_name,
)
from pipelines.errors import UsageError, unreadable, unwritable
from pipelines.experiment.config import CONFIG_FILE

CHECKPOINT_RUN_FILE = 'run.json'
"""File of a checkpoint with the run's counters; a checkpoint without it is incomplete."""

MARK_FILE = '.remote.json'
"""Marker in the local copy of a remote run: its URL and the launcher that wrote there last."""

SERVERS = pathlib.PurePath('servers')
SHARD_CHECKPOINTS = SERVERS / 'replay'
"""Where replay shards write, below the run directory; then moved to the checkpoint."""

BEST = 'best'
"""Directory of the best checkpoint, and its name as --checkpoint."""

_DIRECTORIES = frozenset(
    {BEST, 'checkpoints', 'events', 'logs', 'policy', 'policy_best', SERVERS.name}
)
_FILES = frozenset(
    {LOCK_FILE, 'episodes.jsonl', 'evaluations.jsonl', 'launches.jsonl', 'summary.json'}
)
_ANOTHER = 'choose another --run_dir'
_PATTERN = re.compile(r'\[.*\]|\\', re.DOTALL)
_STAGING_PREFIX = '.writing-'


def default_path(game: str, preset: str, now: datetime.datetime | None = None) -> pathlib.Path:
    """A new `runs/<game>-<preset>-<timestamp>`."""
    return dated(pathlib.Path('runs', f'{game.replace("/", "_")}-{preset}'), now=now)


def dated(path: pathlib.Path, now: datetime.datetime | None = None) -> pathlib.Path:
    """`<path>-<timestamp>`, with a number after the time if that exists."""
    stem = f'{path.name}-{now or datetime.datetime.now():%Y%m%d-%H%M%S}'
    candidate, number = path.with_name(stem), 2
    while candidate.exists():
        candidate, number = path.with_name(f'{stem}-{number}'), number + 1
    return candidate


def require_fit(path: pathlib.Path) -> None:
    """Checks that TensorFlow and Reverb accept a directory of this name.

    Raises:
      UsageError: they do not.
    """
    if reason := unfit_name(path):
        raise UsageError(f'{str(path)!r}: {reason}. Fix: choose another directory.')


def command(verb: str, run: str | os.PathLike[str], *flags: str) -> str:
    """The shell command `pipelines/<verb>.py` for a run, quoted for a message.

    Paths below the current directory are relative to it, as a user types them.
    """
    script = pathlib.Path(__file__).resolve().parents[2] / 'pipelines' / f'{verb}.py'
    words = [_from_here(sys.executable), _from_here(script), '--run_dir', _from_here(run), *flags]
    return f'`{shlex.join(words)}`'


def _from_here(path: str | os.PathLike[str]) -> str:
    with contextlib.suppress(OSError, ValueError):  # no current directory; not below it
        return str(pathlib.Path(path).relative_to(pathlib.Path.cwd()))
    return os.fspath(path)


def no_checkpoint(run: str | os.PathLike[str], best: bool) -> UsageError:
    """The error for a run, local or remote, without a checkpoint; it offers the `best` one."""
    offer = 'add --checkpoint best, or ' * best
    return UsageError(
        f'{run}: no checkpoint yet. Fix: {offer}train for longer, or with a smaller'
        ' --checkpoint_period_seconds.'
    )


def loading_hint(path: pathlib.Path) -> str:
    """A warning if TensorFlow cannot load a SavedModel from `path`, else empty."""
    if not _PATTERN.search(str(path)):
        return ''
    return (
        f'{path}: TensorFlow cannot load a SavedModel from a path with [...] or \\. Fix: copy it to'
        ' another directory.'
    )


class RunDirectory:
    """A run's directory, locked by this process from `open` until `close`.

    A context manager. If a new run ends in a `UsageError` before its first checkpoint, it removes
    the directory, so that the user can repeat the corrected command.
    """

    def __init__(
        self,
        path: pathlib.Path,
        lock: BinaryIO | None,
        created: pathlib.Path | None,
        new: bool = False,
    ):
        """Use `open`. `created`: topmost directory created for a new run, None if it existed."""
        self.path = path
        self._lock = lock
        self._created = created
        self._new = new
        self._discarded = False

    @classmethod
    def open(cls, path: str | os.PathLike[str], resume: bool = False) -> 'RunDirectory':
        """Creates the directory of a new run, or opens that of a run to resume.

        Raises:
          UsageError: the path is in use (with `resume`: holds no run, or a file where a directory
            belongs), is not writable, has an unsuitable name, or is locked by another process.
        """
        path = pathlib.Path(path).absolute()  # workers may have another current directory
        require_fit(path)
        remedy = '' if resume else _ANOTHER
        if resume:
            _require_run(path, ', or leave out --resume to start a new run')
            _require_layout(path)
        else:
            _require_unused(path)
        created = topmost_missing(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            held = lock(path, by_children=True)
        except InUseError as error:
            raise _in_use(path, str(error)) from None
        except OSError as error:
            remove_empty(path, created)
            raise unwritable(path, error, remedy) from error
        directory = cls(path, held, created, new=not resume)
        try:
            # Again under the lock: another process may have been first.
            if not resume:
                _require_unused(path)
            directory._make_layout()
        except OSError as error:
            directory.close()
            raise unwritable(path, error, remedy) from error
        except UsageError:
            directory.close()
            raise
        return directory

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> 'RunDirectory':
        """Opens a run's directory for reading, without a lock: its run may be active.

        Raises:
          UsageError: `path` holds no readable run, or has an unsuitable name.
        """
        path = pathlib.Path(path).absolute()
        require_fit(path)
        _require_run(path, '')
        return cls(path, lock=None, created=None)

    def holder(self) -> int | None:
        """Process ID of the directory's active run, None if there is none.

        Raises:
          UsageError: the lock file is not readable.
        """
        with _readable(self.path):
            return lock_holder(self.path)

    @property
    def config_file(self) -> pathlib.Path:
        return self.path / CONFIG_FILE

    @property
    def launches_file(self) -> pathlib.Path:
        return self.path / 'launches.jsonl'

    @property
    def summary_file(self) -> pathlib.Path:
        return self.path / 'summary.json'

    @property
    def episodes_file(self) -> pathlib.Path:
        return self.path / 'episodes.jsonl'

    @property
    def evaluations_file(self) -> pathlib.Path:
        return self.path / 'evaluations.jsonl'

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
    def best(self) -> pathlib.Path:
        """Checkpoint (parameters only) of the best evaluation of the run."""
        return self.path / BEST

    def checkpoint(self, number: int) -> pathlib.Path:
        """The checkpoint of this number, which may not exist."""
        return self._generations.path(number)

    @property
    def policy(self) -> pathlib.Path:
        return self.path / 'policy'

    @property
    def best_policy(self) -> pathlib.Path:
        return self.path / 'policy_best'

    @property
    def video(self) -> pathlib.Path:
        """The policy at play, filmed at the end of the run."""
        return self.path / 'video.mp4'

    @property
    def logs(self) -> pathlib.Path:
        return self.path / 'logs'

    def _make_layout(self) -> None:
        for directory in (self.events, self.logs):  # the others are created on first use
            directory.mkdir(exist_ok=True)
        for leftover in self.checkpoints.glob(f'{_STAGING_PREFIX}*'):
            shutil.rmtree(leftover)  # of a run killed while it wrote a checkpoint
        for leftover in self.checkpoints.glob('.replaced-*'):  # of the first versions
            shutil.rmtree(leftover)
        for directory in (self.path, self.checkpoints, self.path / SERVERS):
            remove_leftovers(directory)
        self.remove_shard_checkpoints()  # not moved in time

    def remove_shard_checkpoints(self) -> None:
        """Removes what replay shards wrote and no checkpoint took; no shard may be running."""
        shutil.rmtree(self.path / SHARD_CHECKPOINTS, ignore_errors=True)

    def latest_checkpoints(self) -> list[pathlib.Path]:
        """The complete checkpoints, newest first.

        Raises:
          UsageError: the directory is not readable.
        """
        with _readable(self.checkpoints):
            paths = self._generations.paths()
            return [path for path in paths if (path / CHECKPOINT_RUN_FILE).is_file()]

    def has_checkpoint(self) -> bool:
        """Returns whether a readable directory holds a complete checkpoint."""
        try:
            return bool(self.latest_checkpoints())
        except (UsageError, OSError):
            return False

    @property
    def _generations(self) -> Generations:
        return Generations(self.checkpoints, 'checkpoint')

    @contextlib.contextmanager
    def new_checkpoint(self) -> Iterator[pathlib.Path]:
        """Yields an empty directory for a checkpoint; the end of the block publishes it.

        Publishing renames it to `checkpoint-<number>`, one above the newest: use
        `latest_checkpoints()[0]` afterwards. An exception in the block removes it instead.

        Raises:
          FileNotFoundError: the block has not written `run.json`.
        """
        self.checkpoints.mkdir(exist_ok=True)
        published = self._generations.next()
        staging = published.with_name(f'{_STAGING_PREFIX}{published.name}')
        staging.mkdir()
        try:
            yield staging
            if not (staging / CHECKPOINT_RUN_FILE).is_file():
                raise FileNotFoundError(f'{staging}: {CHECKPOINT_RUN_FILE} is missing.')
            publish(staging, published)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    def prune(self, keep: int = 2) -> None:
        """Removes all but the `keep` newest complete checkpoints."""
        remove(self.latest_checkpoints()[keep:])

    def discard(self) -> None:
        """Makes `__exit__` remove the directory of a new run that has no checkpoint."""
        self._discarded = True

    def unwanted(self, error: BaseException | None) -> bool:
        """Whether leaving the block now, because of `error`, removes the directory."""
        discarded = self._discarded or isinstance(error, UsageError)
        return discarded and self._new and not self.latest_checkpoints()

    def close(self) -> None:
        """Unlocks the directory. Repeated calls do nothing."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> 'RunDirectory':
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.unwanted(error):
            # The lock last: others see an active run, or none.
            for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == LOCK_FILE):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            remove_empty(self.path, self._created)
        self.close()


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    """Raises OSError of the block as UsageError."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error


def _require_run(path: pathlib.Path, alternative: str) -> None:
    """Raises UsageError unless `path` holds a run; `alternative` is a second remedy."""
    with _readable(path):
        is_directory, is_run = path.is_dir(), (path / CONFIG_FILE).exists()
    if not is_directory:
        raise UsageError(f'{path}: no such run directory. Fix: check --run_dir{alternative}.')
    if not is_run:
        raise UsageError(
            f'{path}: holds no run ({CONFIG_FILE} is missing). Fix: name the directory of a run as'
            f' --run_dir{alternative}.'
        )


def _require_layout(path: pathlib.Path) -> None:
    """Raises UsageError if a file of a run to resume is a directory, or the other way round."""
    with _readable(path):
        entries = list(path.iterdir())
    for entry in entries:
        if entry.name in _DIRECTORIES and not entry.is_dir():
            raise unreadable(entry, NotADirectoryError(errno.ENOTDIR, ''))
        if entry.name in _FILES and not entry.is_file():
            raise unreadable(entry, IsADirectoryError(errno.EISDIR, ''))


def _require_unused(path: pathlib.Path) -> None:
    """Raises UsageError unless `path` is missing or an empty directory."""
    try:
        used = any(entry.name != LOCK_FILE for entry in path.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise unwritable(path, error, _ANOTHER) from error
    if used and (path / CONFIG_FILE).is_file():
        with _readable(path):
            holder = lock_holder(path)
        if holder not in (None, os.getpid()):
            raise _in_use(path, f'{path}: in use by process {holder}')
        raise UsageError(
            f'{path}: already holds a run. Fix: choose another --run_dir, or add --resume to resume'
            ' it.'
        )
    if used:
        raise UsageError(f'{path}: not an empty directory. Fix: choose another --run_dir.')


def _in_use(path: pathlib.Path, problem: str) -> UsageError:
    return UsageError(
        f'{problem}. Fix: wait until it ends, stop it with {command("stop", path)}, or choose'
        ' another --run_dir.'
    )


def topmost_missing(path: pathlib.Path) -> pathlib.Path | None:
    """The topmost directory that `mkdir` of `path` will create; None if `path` exists."""
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    return missing[-1] if missing else None


def remove_empty(path: pathlib.Path, topmost: pathlib.Path | None) -> None:
    """Removes the empty ones of `path` and its parents up to `topmost`."""
    while topmost is not None:
        with contextlib.suppress(OSError):
            path.rmdir()
        if path == topmost:
            return
        path = path.parent
