"""A run to read from, wherever it is: its path in, a directory of this machine out."""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence

from infra.disk import is_remote


@contextlib.contextmanager
def readable(path: str, outputs: Sequence[str]) -> Iterator[pathlib.Path]:
    """The directory of a run to read from, whether its run is active or not.

    For a remote one: a copy of what evaluation and export need; those of `outputs`, files or
    directories, that are in it when the block is left go back to the remote place.

    Raises:
      UsageError: there is no such remote run, it has no checkpoint, or it cannot be written.
    """
    if not is_remote(path):
        yield pathlib.Path(path)
        return
    from pipelines.storage.remote_reading import borrowed  # imports Beam

    with borrowed(path, outputs) as local:
        yield local
