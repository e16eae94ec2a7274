"""Runs of one game in, their learning curves out: over frames, and over time spent.

A point of a curve is the mean of the games that ended within 4 % of the axis around it, so a curve
starts with the first games and does not lag.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from agents.config import is_atari
from pipelines.monitoring.learning_curve import Start, training_minutes
from pipelines.reporting.runs import Run

Axis = Callable[[Run], np.ndarray | None]
"""<float64>[episodes]: where each training game of a run ended, None: unknown."""

Spent = Callable[[np.ndarray], np.ndarray]
"""Turns seconds since 1970 into (core-)minutes of training."""

_POINTS = 100
_HALF_WINDOW = 0.04  # share of the axis


@dataclasses.dataclass(frozen=True)
class Curve:
    """The curves of a variant's seeds on one game.

    Attributes:
      x: <float64>[points].
      runs: <float64>[runs, points], NaN where a run has no game near or has ended.
      mean, low, high: <float64>[points], over the runs, up to where the first ends.
    """

    x: np.ndarray
    runs: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def unit(runs: Sequence[Run]) -> str:
    """What the frames of runs are: of an emulator, or steps of other environments."""
    kinds = {is_atari(run.game) for run in runs}
    if kinds == {False}:
        return 'steps'
    return 'frames or steps' if False in kinds else 'emulator frames'


def frames(run: Run) -> np.ndarray:
    """Axis: emulator frames of the whole run, or steps."""
    return np.array([episode.frames for episode in run.episodes], np.float64)


def minutes(run: Run) -> np.ndarray | None:
    """Axis: minutes of training, without the pauses between launches."""
    spent = spent_minutes(run)
    return None if spent is None else spent(_ends(run))


def core_minutes(run: Run) -> np.ndarray | None:
    """Axis: minutes of training times cores that the launcher may use."""
    spent = spent_core_minutes(run)
    return None if spent is None else spent(_ends(run))


def _ends(run: Run) -> np.ndarray:
    return np.array([episode.time for episode in run.episodes])


def spent_minutes(run: Run) -> Spent | None:
    """Minutes of training; None: unknown."""
    launches = _launches(run)
    return functools.partial(training_minutes, launches=launches) if launches else None


def spent_core_minutes(run: Run) -> Spent | None:
    """Minutes of training times cores; None: unknown."""
    launches = _launches(run)
    cores = [known for time, _ in launches if (known := run.cores(time)) is not None]
    if not launches or len(cores) < len(launches):
        return None
    return functools.partial(training_minutes, launches=launches, weights=cores)


def _launches(run: Run) -> list[Start]:
    """By `launches.jsonl`; of an earlier version, by its sessions."""
    known = [(row.time, row.wall_seconds) for row in run.launches if row.time is not None]
    if known:
        return sorted(known)
    found, total = [], 0.0
    for session in run.sessions:
        found.append((session.start, total))
        total += session.end - session.start
    return found


def curve(runs: Sequence[Run], axis: Axis) -> Curve | None:
    """The curves of runs of one game; None if no run has a game on this axis."""
    placed = [(run, axis(run)) for run in runs if run.episodes]
    held = [(run, places) for run, places in placed if places is not None and len(places)]
    if not held:
        return None
    ends = [float(places.max()) for _, places in held]
    x = np.linspace(0, max(ends), _POINTS)
    half = _HALF_WINDOW * max(ends)
    smooth = np.array([_smooth(run, places, x, half) for run, places in held])
    common = smooth[:, x <= min(ends)]
    means = np.full((3, _POINTS), np.nan)
    complete = np.flatnonzero(~np.isnan(common).any(axis=0))
    kept = common[:, complete]
    means[:, complete] = kept.mean(axis=0), kept.min(axis=0), kept.max(axis=0)
    return Curve(x, smooth, *means)


def _smooth(run: Run, places: np.ndarray, x: np.ndarray, half: float) -> np.ndarray:
    """<float64>[points]: mean return of the games within `half` of each point."""
    order = np.argsort(places, kind='stable')
    returns = np.array([episode.raw_return for episode in run.episodes])[order]
    sums = np.concatenate([[0.0], np.cumsum(returns)])
    first = np.searchsorted(places[order], x - half, 'left')
    last = np.searchsorted(places[order], x + half, 'right')
    count = last - first
    means = (sums[last] - sums[first]) / np.maximum(count, 1)
    return np.where((count > 0) & (x <= places.max() + half), means, np.nan)
