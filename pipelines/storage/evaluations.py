"""Files of evaluations: their names, how a result is written and read."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from agents.config import EnvironmentConfig
from infra.disk import is_remote, read_json
from pipelines.errors import UsageError
from pipelines.events import count, finite
from pipelines.storage import outputs

if TYPE_CHECKING:
    from pipelines.storage.object_store import Place

_T = TypeVar('_T')

EVALUATION_FILE = 'evaluation.json'
"""The evaluation at the end of a run; later ones have other names."""


def read_result(path: pathlib.Path) -> dict[str, Any] | None:
    """The result in the file `path`, None if it is missing or invalid."""
    held = read_json(path) or {}
    named = isinstance(held.get('protocol'), str) and count(held.get('episodes')) is not None
    numbers = [finite(held.get(name)) for name in ('epsilon', 'mean', 'std')]
    return held if named and None not in numbers else None


def line(result: Mapping[str, Any]) -> str:
    """The score of a result on one line, with its error and the rules that it was taken under."""
    error, played = result['standard_error'], result['episodes']
    parts = [
        f'{result["game"]}: mean return {result["mean"]:.1f}',
        *([] if error is None else [f'standard error {error:.1f}']),
        f'over {played} game{"s" * (played != 1)}',
        *([f'{result["failed"]} failed'] if result['failed'] else []),
    ]
    return f'{", ".join(parts)} ({rules(result)})'


def rules(result: Mapping[str, Any]) -> str:
    """The rules that a score was taken under: `protocol noop, epsilon 0.05, ...`."""
    changed = ', '.join(f'{name} {value}' for name, value in result['deviations'].items())
    unit = EnvironmentConfig(game=str(result.get('game', ''))).unit
    return (
        f'protocol {result["protocol"]}, epsilon {result["epsilon"]:g}, at most'
        f' {result["max_frames"]:,} {unit}{"; deviations: " * bool(changed)}{changed}'
    )


def progress_file(output: pathlib.Path) -> pathlib.Path:
    """The file that holds the number of games so far while those for `output` are played."""
    return output.with_suffix('.partial.json')


def require_new(path: str) -> None:
    """Checks that a result can be written to `path`, local or remote; creates nothing.

    The result at the end of a run may exist: `write` keeps it under another name.

    Raises:
      UsageError: the file exists, cannot be written, or its name is unsuitable.
    """
    file = pathlib.Path(path)
    if is_remote(path):
        if _remote(path, lambda place, name: place.read(name)) is not None:
            raise outputs.existing(path)
    elif file.name == EVALUATION_FILE and file.is_file():
        outputs.writable(path)
    else:
        outputs.require_new(path)


def write(path: str, result: Mapping[str, Any]) -> None:
    """Writes a result to `path`, local or remote; keeps an `EVALUATION_FILE` of before.

    Raises:
      OSError: the `EVALUATION_FILE` cannot be kept.
      UsageError: the file cannot be written, or has appeared meanwhile.
    """
    content = (json.dumps(dict(result), indent=2, allow_nan=False) + '\n').encode()
    if is_remote(path):
        _remote(path, lambda place, name: place.write(name, content))
        return
    if pathlib.Path(path).name == EVALUATION_FILE:
        rename_old(pathlib.Path(path))
    outputs.write_new(path, content)


def rename_old(file: pathlib.Path) -> None:
    """Names the result in `file`, if there is one, by its updates: newer ones follow.

    Raises:
      OSError: it cannot be renamed.
    """
    if file.exists():
        before = read_result(file)
        name = f'evaluation-{before.get("updates")}-updates' if before else 'damaged-evaluation'
        file.replace(_free(file.with_name(f'{name}.json')))


def _remote(path: str, act: Callable[['Place', str], _T]) -> _T:
    """Calls `act` with the remote directory and the name in it.

    Raises:
      UsageError: the remote place refuses.
    """
    from pipelines.storage.object_store import Place, RemoteError  # imports Beam

    folder, _, name = path.rpartition('/')
    try:
        return act(Place.at(folder), name)
    except RemoteError as error:
        raise UsageError(str(error)) from error


def _free(path: pathlib.Path) -> pathlib.Path:
    """The path, with a number if it exists."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_stem(f'{path.stem}-{number}'), number + 1
    return candidate
