"""Free disk and memory: the need of a run in, an error if it exceeds them."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from infra.disk import own_temporary_files
from infra.memory import available_memory
from pipelines.errors import UsageError

_GIB = 2.0**30


def _existing_ancestor(path: pathlib.Path) -> pathlib.Path:
    """The nearest of `path` and its parents that exists."""
    path = path.absolute()
    # Not `path.exists()`, which raises PermissionError.
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path


def free_disk(path: str | os.PathLike[str]) -> int:
    """Bytes free on the file system of `path`, which need not exist yet."""
    return shutil.disk_usage(_existing_ancestor(pathlib.Path(path))).free


def require_disk(
    path: str | os.PathLike[str],
    needed_bytes: int,
    remedy: str = 'free some, or choose another --run_dir',
) -> None:
    """Checks that `path`, which need not exist yet, can be written and has `needed_bytes` free.

    Raises:
      UsageError: it cannot, or has less.
    """
    try:
        tempfile.TemporaryFile(dir=_existing_ancestor(pathlib.Path(path))).close()
    except OSError as error:
        raise UsageError(
            f'{path}: cannot be written ({error.strerror}). Fix: choose another directory.'
        ) from error
    free = free_disk(path)
    if free < needed_bytes:
        raise UsageError(
            f'{path}: {free / _GIB:.1f} GiB of disk free, the run needs'
            f' {needed_bytes / _GIB:.1f} GiB. Fix: {remedy}.'
        )


def require_memory(
    needed_bytes: int,
    remedy: str = 'end other programs, or choose a smaller --replay_capacity, or fewer'
    ' --num_actors, --num_learners or --num_parameter_shards',
) -> None:
    """Checks that `needed_bytes` of memory are available.

    Raises:
      UsageError: there is less.
    """
    available = available_memory()
    if available < needed_bytes:
        raise UsageError(
            f'{available / _GIB:.1f} GiB of memory available, the run needs'
            f' {needed_bytes / _GIB:.1f} GiB. Fix: {remedy}.'
        )


@contextlib.contextmanager
def temporary_files() -> Iterator[None]:
    """`own_temporary_files`, with an error for the user.

    Raises:
      UsageError: no temporary directory can be created.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(own_temporary_files())
        except OSError as error:
            raise UsageError(
                f'no temporary directory can be made ({error}). Fix: set TMPDIR to a directory with'
                ' free space.'
            ) from error
        yield
