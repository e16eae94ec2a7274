"""Files of evaluations: their names, and how to read a result."""

import pathlib
from typing import Any

from infra.disk import read_json
from pipelines.events import count, finite

EVALUATION_FILE = 'evaluation.json'
"""The evaluation at the end of a run; later ones have other names."""


def read_result(path: pathlib.Path) -> dict[str, Any] | None:
    """The result in the file `path`, None if it is missing or invalid."""
    held = read_json(path) or {}
    named = isinstance(held.get('protocol'), str) and count(held.get('episodes')) is not None
    numbers = [finite(held.get(name)) for name in ('epsilon', 'mean', 'std')]
    return held if named and None not in numbers else None


def progress_file(output: pathlib.Path) -> pathlib.Path:
    """The file that holds the games so far while those for `output` are played."""
    return output.with_suffix('.partial.json')
