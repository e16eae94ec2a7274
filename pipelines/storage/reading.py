"""Opens a run for reading, wherever it is: its path in, a local directory out."""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence

from infra.disk import is_remote


@contextlib.contextmanager
def readable(path: str, outputs: Sequence[str]) -> Iterator[pathlib.Path]:
    """Yields a local directory with a run, active or not.

    For a remote run, a `temporary_copy`.

    Raises:
      UsageError: the remote run does not exist, has no checkpoint, or is not writable.
    """
    if not is_remote(path):
        yield pathlib.Path(path)
        return
    from pipelines.storage.remote_reading import temporary_copy  # imports Beam

    with temporary_copy(path, outputs) as local:
        yield local


@contextlib.contextmanager
def readable_records(path: str) -> Iterator[pathlib.Path]:
    """Yields a local directory with what a run, active or not, has recorded.

    For a remote run, a temporary copy without checkpoints, policies, logs and servers' files.

    Raises:
      UsageError: the remote run does not exist or is not readable.
    """
    if not is_remote(path):
        yield pathlib.Path(path)
        return
    from pipelines.storage.remote_reading import temporary_records  # imports Beam

    with temporary_records(path) as local:
        yield local
