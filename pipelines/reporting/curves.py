"""Runs of one game in, their learning curves out: over frames, and over time spent.

A point of a curve is the mean of the games that ended within 4 % of the axis around it, so a curve
starts with the first games and does not lag.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from pipelines.reporting.runs import Run
from pipelines.reporting.sessions import Session

Axis = Callable[[Run], np.ndarray | None]
"""<float64>[episodes]: where each training game of a run ended, None: unknown."""

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


def frames(run: Run) -> np.ndarray:
    """Axis: emulator frames of the whole run."""
    return np.array([episode.frames for episode in run.episodes], np.float64)


def minutes(run: Run) -> np.ndarray | None:
    """Axis: minutes of training, without the pauses between launches."""
    return _spent(run, lambda session: 1.0)


def core_minutes(run: Run) -> np.ndarray | None:
    """Axis: minutes of training times cores of the launcher's machine."""
    return _spent(run, lambda session: run.cores(session.start))


def _spent(run: Run, weight: Callable[[Session], float | None]) -> np.ndarray | None:
    spent = spent_minutes(run, weight)
    return None if spent is None else spent(np.array([episode.time for episode in run.episodes]))


def spent_minutes(
    run: Run, weight: Callable[[Session], float | None] = lambda session: 1.0
) -> Callable[[np.ndarray], np.ndarray] | None:
    """Turns seconds since 1970 into weighted minutes of training; None: without sessions."""
    times, values, total = [], [], 0.0
    for session in run.sessions:
        factor = weight(session)
        if factor is None:
            return None
        times += [session.start, session.end]
        values += [total, total := total + factor * (session.end - session.start) / 60]
    return (lambda when: np.interp(when, times, values)) if times else None


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
