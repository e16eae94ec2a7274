"""Results of an evaluation: scores of games in, one JSON file for each policy and game out."""

import collections
import dataclasses
import datetime
import pathlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.evaluation.play import Failure, Score

PROGRESS_SECONDS = 10.0
"""Between two lines of progress while games are played."""

_FAILURES_NAMED = 5


def combined(records: Iterable[Score | Failure]) -> dict[str, Any]:
    """The scores of one policy in one game; equal for any order of `records`.

    Returns:
      JSON values: number of games that were played and failed, mean, standard deviation and error,
      median and scores; None where no game was played.
    """
    listed = sorted(records, key=lambda record: record.episode)
    scores = [record for record in listed if isinstance(record, Score)]
    failures = [record for record in listed if isinstance(record, Failure)]
    values = np.array([score.value for score in scores])
    played = len(values) > 0
    return {
        'episodes': len(scores),
        'failed': len(failures),
        'mean': float(values.mean()) if played else None,
        'std': float(values.std()) if played else None,
        'standard_error': float(values.std(ddof=1) / len(values) ** 0.5)
        if len(values) > 1
        else None,
        'median': float(np.median(values)) if played else None,
        'returns': values.tolist(),
        'details': [
            {
                'episode': score.episode,
                'start': score.start_index,
                'return': score.value,
                'frames': score.frames,
                'cut': score.cut,
            }
            for score in scores
        ],
        'failures': [
            {'episode': failure.episode, 'reason': failure.reason}
            for failure in failures[:_FAILURES_NAMED]
        ],
    }


def encoded(record: Score | Failure) -> dict[str, Any]:
    """JSON values of a record (see `decoded`)."""
    return {'kind': type(record).__name__, **dataclasses.asdict(record)}


def decoded(values: Mapping[str, Any]) -> Score | Failure:
    """The record that `encoded` encoded."""
    kinds: dict[str, type[Score] | type[Failure]] = {'Score': Score, 'Failure': Failure}
    fields = {name: value for name, value in values.items() if name != 'kind'}
    return kinds[values['kind']](**fields)


def by_policy(records: Iterable[Score | Failure]) -> dict[int, dict[str, Any]]:
    """`combined` for each policy, by its index."""
    grouped: dict[int, list[Score | Failure]] = collections.defaultdict(list)
    for record in records:
        grouped[record.policy].append(record)
    return {policy: combined(group) for policy, group in grouped.items()}


def file_name(result: Mapping[str, Any], elsewhere: bool) -> str:
    """A new name for a result, which tells policy and game if it is not in the run's directory."""
    # The digits differ between two evaluations that start in the same second.
    stamp = f'{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}'
    parts: Sequence[str] = ('evaluation', result['protocol'], stamp)
    if elsewhere:
        path = pathlib.PurePath(result['policy']['path'])
        saved_model = result['policy']['kind'] == 'saved_model'  # each run has a `policy`
        names = (path.parent.name, path.name) if saved_model else (path.name,)
        game = result['game'].replace('/', '_')
        parts = (*filter(None, names), game, result['protocol'], stamp)
    return '-'.join(parts) + '.json'
