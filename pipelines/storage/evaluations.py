"""Files of evaluations: where results and progress are, and how they are read."""

import pathlib
from typing import Any

from infra.disk import read_json
from pipelines.events import count, finite

EVALUATION_FILE = 'evaluation.json'
"""The evaluation that ends a run; those asked for later have files of their own."""


def read_result(path: pathlib.Path) -> dict[str, Any] | None:
    """The result in the file `path`; None when it is missing, or another thing."""
    held = read_json(path) or {}
    named = isinstance(held.get('protocol'), str) and count(held.get('episodes')) is not None
    numbers = [finite(held.get(name)) for name in ('epsilon', 'mean', 'std')]
    return held if named and None not in numbers else None


def progress_file(output: pathlib.Path) -> pathlib.Path:
    """Where the games so far are, while those of the result in `output` are played."""
    return output.with_suffix('.partial.json')
