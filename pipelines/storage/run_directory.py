"""The directory of one run: its layout, its lock and its numbered checkpoints.

In: the path the user chose. Out: the paths that everyone else writes to, and whether disk and
memory suffice. What a checkpoint or a file contains is its writer's business, not this module's.
"""

import contextlib
import datetime
import errno
import os
import pathlib
import re
import shlex
import shutil
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO

from infra.disk import (
    LOCK_FILE,
    Generations,
    InUseError,
    is_remote,
    lock,
    lock_holder,
    publish,
    remove,
    remove_leftovers,
    unfit_name,
)
from pipelines.errors import UsageError

CHECKPOINT_RUN_FILE = 'run.json'
"""File of a checkpoint with the run's own counters; a checkpoint without it is incomplete."""

SERVERS = pathlib.PurePath('servers')
SHARD_CHECKPOINTS = SERVERS / 'replay'
"""Where each replay shard of a run writes, below the run's directory: moved to the checkpoint."""

_PATTERN = re.compile(r'\[.*\]|\\', re.DOTALL)
_STAGING_PREFIX = '.writing-'


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
        raise UsageError(f'--output {path}: not on this machine. Fix: name a local path.')
    output = pathlib.Path(path).absolute()
    require_fit(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def command(verb: str, path: pathlib.Path) -> str:
    """The shell command `pipelines/<verb>.py` for the run in `path`, quoted for a message."""
    return f'`python pipelines/{verb}.py --run_dir {shlex.quote(str(path))}`'


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
        self,
        path: pathlib.Path,
        lock: BinaryIO | None,
        created: pathlib.Path | None,
        new: bool = False,
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
            held = lock(path)
        except InUseError as error:
            raise UsageError(
                f'{error}, whose run is active. Fix: wait for its end, or choose another --run_dir.'
            ) from None
        except OSError as error:
            _remove_empty(path, created)
            raise _unwritable(path, error) from error
        directory = cls(path, held, created, new=not resume)
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
        return cls(path, lock=None, created=None)

    def holder(self) -> int | None:
        """Process id of the run that goes on in the directory, None when none does.

        Raises:
          UsageError: this may not be read.
        """
        with _permitted(self.path):
            return lock_holder(self.path)

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
        for directory in (self.path, self.checkpoints, self.path / SERVERS):
            remove_leftovers(directory)
        shutil.rmtree(self.path / SHARD_CHECKPOINTS, ignore_errors=True)  # not moved in time

    def latest_checkpoints(self) -> list[pathlib.Path]:
        """The complete checkpoints, newest first.

        Raises:
          UsageError: they may not be read.
        """
        with _permitted(self.checkpoints):
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
        """An empty directory to write a checkpoint into; leaving the block publishes it.

        Published means renamed to `checkpoint-<number>`, one above the newest. The writer must put
        `run.json` into it. An exception in the block removes what was written and publishes
        nothing. The path yielded is gone afterwards: take `latest_checkpoints()[0]`.

        Raises:
          FileNotFoundError: the block has written no `run.json`.
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
        """Removes, when the directory is closed, all that a new run without a checkpoint left."""
        self._discarded = True

    def unwanted(self, error: BaseException | None) -> bool:
        """Whether closing the directory now, because of `error`, removes all of it."""
        discarded = self._discarded or isinstance(error, UsageError)
        return discarded and self._new and not self.latest_checkpoints()

    def close(self) -> None:
        """Gives the directory free for another process. Repeated calls do nothing."""
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
            # The lock last: who looks at it sees a run that goes on, or nothing of it.
            for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == LOCK_FILE):
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
        used = any(entry.name != LOCK_FILE for entry in path.iterdir())
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
