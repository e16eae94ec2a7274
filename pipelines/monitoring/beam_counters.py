"""What Beam has counted of a run's workers: the files that its jobs leave in, totals out."""

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from infra.disk import read_json
from pipelines.events import count, finite

SUFFIX = 'metrics.json'
"""Ends the name of a file with the committed metrics of a job, by kind of worker and name."""

UNWRITTEN = 'unwritten_rows'
"""Takes the place of a kind of worker: rows of statistics that could not be written, by owner."""
REASONS = 'reasons'
"""Among these: why, as texts."""

_FOLDS: Mapping[str, Callable[[Iterable[int]], int]] = {
    'count': sum,
    'sum': sum,
    'min': min,
    'max': max,
}


def totals(logs: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Counters and distributions over all jobs of a run that have ended by themselves.

    Empty for engines that give none. `logs`: directory with the jobs' files, of all launches.
    """
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(logs.glob(f'*.{SUFFIX}')):
        for kind, metrics in (read_json(file) or {}).items():
            held = found.setdefault(kind, {})
            for name, value in metrics.items() if isinstance(metrics, Mapping) else ():
                held[name] = merged(held.get(name), value)
    return found


def unwritten_rows(counted: Mapping[str, Mapping[str, Any]]) -> str:
    """Which rows could not be written and why, such as '32 of actor-003 (...)'; may be empty.

    `counted`: by `totals`.
    """
    owners = dict(counted.get(UNWRITTEN, {}))
    reasons = ', '.join(owners.pop(REASONS, ()))
    rows = ', '.join(f'{number:,} of {owner}' for owner, number in sorted(owners.items()))
    return f'{rows} ({reasons})' if rows else ''


def merged(one: Any, other: Any) -> Any:
    """The sum of two counters or distributions, all of two lists; nothing of what is neither."""
    if isinstance(one, list) or isinstance(other, list):
        lists = [part for part in (one, other) if isinstance(part, list)]
        return sorted({str(text) for part in lists for text in part})
    if isinstance(one, Mapping) or isinstance(other, Mapping):
        parts = [part for part in (one, other) if isinstance(part, Mapping) and part.get('count')]
        return {name: fold(_values(parts, name)) for name, fold in _FOLDS.items()}
    return (count(one) or 0) + (count(other) or 0)


def _values(distributions: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    return [int(finite(each.get(name)) or 0) for each in distributions] or [0]
