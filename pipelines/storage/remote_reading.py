"""A temporary copy of a remote run, for evaluation, export and reports.

In: the URL. Out: a local directory; results written there are uploaded.
"""

import contextlib
import pathlib
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from infra.disk import scratch
from infra.parameter_server import checkpoint as parameter_checkpoint
from infra.parameter_server.checkpoint import DamagedCheckpointError
from pipelines.errors import UsageError
from pipelines.experiment.config import CONFIG_FILE
from pipelines.storage.checkpoints import PARAMETERS
from pipelines.storage.object_store import MissingError, Place, RemoteError, require_answer
from pipelines.storage.remote_run import (
    checkpoint_of,
    complete_checkpoints,
    files_below,
)
from pipelines.storage.run_directory import BEST, CHECKPOINT_RUN_FILE, no_checkpoint

_TRIES = 3  # a checkpoint may be pruned, and the best replaced, while it is read
_REPLACED_SECONDS = 5.0  # for the upload of the best to end
_NEEDED = (PARAMETERS, CHECKPOINT_RUN_FILE)  # of a checkpoint
_RECORDS = re.compile(r'[^/]+\.(json|jsonl|mp4)|events/[^/]+')


@contextlib.contextmanager
def temporary_copy(run_dir: str, outputs: Sequence[str], checkpoint: str) -> Iterator[pathlib.Path]:
    """Yields a local directory with a remote run's configuration and parameters.

    Args:
      run_dir: its URL.
      outputs: files or directories that the block may write there; they are uploaded at its end.
      checkpoint: 'newest' (with those before it, should it be damaged), 'best' or a number.

    Raises:
      UsageError: the remote run does not exist, has no such checkpoint, or is not writable.
    """
    place = Place.at(run_dir)
    with scratch() as directory:
        local = directory / place.name
        try:
            _fetch_parameters(place, local, checkpoint)
            yield local
            _send_outputs(place, local, outputs)
        except RemoteError as error:
            raise UsageError(str(error)) from error


@contextlib.contextmanager
def temporary_records(run_dir: str) -> Iterator[pathlib.Path]:
    """Yields a local directory with a remote run's configuration, results, events and video.

    Raises:
      UsageError: the remote run does not exist or is not readable.
    """
    place = Place.at(run_dir)
    with scratch() as directory:
        local = directory / place.name
        try:
            files = require_answer(place)
            _require_run(place, files)
            for name in filter(_RECORDS.fullmatch, files):
                with contextlib.suppress(MissingError):  # the run is active and has replaced it
                    place.fetch(name, local / name, _nothing)
        except RemoteError as error:
            raise UsageError(str(error)) from error
        yield local


def _require_run(place: Place, files: Iterable[str]) -> None:
    """Raises UsageError unless the remote files are those of a run."""
    if CONFIG_FILE not in files:
        raise UsageError(
            f'{place.url}: holds no run ({CONFIG_FILE} is missing). Fix: check the URL.'
        )


def _fetch_parameters(place: Place, local: pathlib.Path, checkpoint: str) -> None:
    for tries_left in reversed(range(_TRIES)):
        files = require_answer(place)
        _require_run(place, files)
        wanted = _wanted(place, files, checkpoint)
        try:
            place.fetch(CONFIG_FILE, local / CONFIG_FILE, _nothing)
            # run.json last: a checkpoint that is pruned meanwhile stays incomplete.
            for name in sorted(wanted, key=lambda name: name.endswith(f'/{CHECKPOINT_RUN_FILE}')):
                place.fetch(name, local / name, _nothing)
        except MissingError:
            if not tries_left:
                raise
            continue
        if checkpoint != BEST or not tries_left or _is_whole(local / BEST):
            return
        time.sleep(_REPLACED_SECONDS)


def _is_whole(best: pathlib.Path) -> bool:
    """Whether the files of the best belong together; the mirror replaces them one by one."""
    try:
        parameter_checkpoint.validate(str(best / PARAMETERS))
    except DamagedCheckpointError:
        return False
    return True


def _wanted(place: Place, files: Mapping[str, int], checkpoint: str) -> list[str]:
    """The files of `checkpoint` that evaluation and export read.

    Raises:
      UsageError: there is no such checkpoint.
    """
    chosen = complete = complete_checkpoints(files)
    if checkpoint == BEST:
        wanted = [name for name in files if name.startswith(f'{BEST}/')]
    else:
        if checkpoint != 'newest':
            chosen = {name for name in complete if int(name.rpartition('-')[2]) == int(checkpoint)}
        of_chosen = [name for name in files if checkpoint_of(name) in chosen]
        wanted = [name for name in of_chosen if name.split('/')[2] in _NEEDED]
    if not wanted and checkpoint == 'newest':
        raise no_checkpoint(place.url, any(name.startswith(f'{BEST}/') for name in files))
    if not wanted:
        raise UsageError(
            f'{place.url}: no checkpoint {checkpoint} (there are:'
            f' {", ".join(sorted(complete)) or "none"}). Fix: name one of them, or omit'
            ' --checkpoint.'
        )
    return wanted


def _send_outputs(place: Place, local: pathlib.Path, outputs: Sequence[str]) -> None:
    for output in outputs:
        path = local / output
        files = [path] if path.is_file() else sorted(files_below(path))
        names = [file.relative_to(local).as_posix() for file in files]
        for file, name in zip(files, names):
            place.send(file, name, _nothing)
        if names:
            before = [name for name in place.files() if name.startswith(f'{output}/')]
            place.delete([name for name in before if name not in names])


def _nothing() -> None:
    pass
