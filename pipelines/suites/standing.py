"""How far a run is: its directory, or the lines that it prints, in; figures out.

Only the lines of an active run name its phase and its rate; of its files, `episodes.jsonl` has the
frames where a game ends, and the rest appear at checkpoints or at the end.
"""

import contextlib
import dataclasses
import enum
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from infra.disk import read_json
from pipelines.errors import UsageError
from pipelines.events import finite
from pipelines.storage.evaluations import EVALUATION_FILE, read_result, rules
from pipelines.storage.resuming import frames_of, is_complete
from pipelines.storage.run_directory import RunDirectory

END_SECONDS = 500.0
"""For a run of a suite to end once it was asked to; above what its last checkpoint needs."""

_LINE = re.compile(r'\[\d+:\d\d:\d\d\] (.*)')
_PHASES = (
    'starting servers',
    'connecting to servers',
    'starting workers',
    'filling replay',
    'training',
    'stopping workers',
    'checkpointing',
    'evaluating',
    'filming',
    'resuming',
)
_FIGURES = re.compile(r'(frames|steps) (?P<frames>[\d,]+)/[\d,]+ .*\| return (?P<mean_return>\S+) ')
_RATE = re.compile(r'\((\d+)/s\)')


class Stage(enum.Enum):
    """What a run's directory holds."""

    NEW = 'no checkpoint'
    HALF = 'a checkpoint, but not everything'
    DONE = 'everything'


@dataclasses.dataclass(frozen=True)
class Figures:
    """Progress of a run; None: not known yet.

    Attributes:
      phase: what it is doing; empty: not known yet.
      frames: emulator frames.
      mean_return: raw, of the last 100 training games.
      score: mean return of the evaluation.
      rules: that the score was taken under; empty: its file, of an earlier version, does not say.
      frames_per_second: recently.
    """

    phase: str = ''
    frames: int | None = None
    mean_return: float | None = None
    score: float | None = None
    frames_per_second: float | None = None
    rules: str = ''


def stage(path: pathlib.Path, max_frames: int) -> Stage:
    """What the directory of a run holds, which is not active."""
    summary = read_json(path / 'summary.json') or {}
    try:
        directory = RunDirectory.existing(path)
        if is_complete(directory) and (frames_of(summary) or 0) >= max_frames:
            return Stage.DONE
        return Stage.HALF if directory.has_checkpoint() else Stage.NEW
    except UsageError:  # no run, or not readable: run.py says which
        return Stage.HALF if _holds_checkpoints(path) else Stage.NEW


def _holds_checkpoints(path: pathlib.Path) -> bool:
    """Whether there are checkpoints, readable or not, which must not be removed."""
    return any((path / 'checkpoints').glob('checkpoint-*'))


def recorded(path: pathlib.Path, before: Figures) -> Figures:
    """The figures in the directory of a run that is not active; `before` where there are none."""
    summary = read_json(path / 'summary.json') or {}
    evaluation: Any = summary.get('evaluation') or read_result(path / EVALUATION_FILE) or {}
    frames = frames_of(summary)
    mean_return = finite(summary.get('mean_return_100'))
    return Figures(
        frames=before.frames if frames is None else frames,
        mean_return=before.mean_return if mean_return is None else mean_return,
        score=finite(evaluation.get('mean')),
        frames_per_second=before.frames_per_second,
        rules=_rules(evaluation),
    )


def _rules(evaluation: Any) -> str:
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        return rules(evaluation)
    return ''


def printed(lines: Sequence[str], before: Figures) -> Figures:
    """The figures in the lines of an active run, oldest first; `before` where they say nothing."""
    figures = before
    for line in lines:
        if match := _LINE.fullmatch(line):
            figures = _read(match[1], figures)
    return figures


def _read(text: str, before: Figures) -> Figures:
    head = text.partition(' | ')[0].partition(' from ')[0]
    phase = head if head.startswith(_PHASES) else before.phase
    found = _FIGURES.search(text)
    if found is None:
        return dataclasses.replace(before, phase=phase)
    rate = _RATE.search(text)
    return dataclasses.replace(
        before,
        phase=phase,
        frames=int(found['frames'].replace(',', '')),
        mean_return=_number(found['mean_return']),
        frames_per_second=float(rate[1]) if rate else None,
    )


def _number(text: str) -> float | None:
    return None if text == '-' else float(text)
