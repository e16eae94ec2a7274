"""Opens a run for reading, wherever it is: its path in, a local directory out."""

import argparse
import contextlib
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from infra.disk import is_remote

_CHECKPOINT = re.compile(r'newest|best|\d{1,8}')


def _checkpoint(text: str) -> str:
    if not _CHECKPOINT.fullmatch(text):
        raise argparse.ArgumentTypeError(f'{text!r} is not newest, best or a number')
    return text


CHECKPOINT_FLAG: Mapping[str, Any] = {
    'default': 'newest',
    'type': _checkpoint,
    'help': "Of the run: 'newest' (default), 'best' (by the run's own evaluations) or a number.",
}
"""Arguments of `add_argument` for the flag that chooses the checkpoint of a run."""


@contextlib.contextmanager
def readable(
    path: str, outputs: Sequence[str], checkpoint: str = 'newest'
) -> Iterator[pathlib.Path]:
    """Yields a local directory with a run, active or not.

    For a remote run, a `temporary_copy` with `checkpoint`: 'newest', 'best' or a number.

    Raises:
      UsageError: the remote run does not exist, has no such checkpoint, or is not writable.
    """
    if not is_remote(path):
        yield pathlib.Path(path)
        return
    from pipelines.storage.remote_reading import temporary_copy  # imports Beam

    with temporary_copy(path, outputs, checkpoint) as local:
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
