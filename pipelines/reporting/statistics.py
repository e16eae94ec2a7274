"""Aggregate scores over games and seeds, with stratified bootstrap intervals.

In: the normalised scores of each game's runs. Out: point estimates and intervals as rliable 1.2
computes them (Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical
Precipice"). rliable itself is not a dependency: with pandas and scipy installed each worker takes
0.75 s longer to import TensorFlow. Unlike rliable, games may have different numbers of runs.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

Scores = Sequence[np.ndarray]
"""Per game <float64>[runs]: the score of each run; every game has at least one."""
Statistic = Callable[[Scores], np.ndarray]
"""Computes a statistic of scores <float64>[..., runs] per game along the last axis."""

REPETITIONS = 10_000  # between rliable's defaults: 2,000 for profiles, 50,000 for aggregates
CONFIDENCE = 0.95
_CUT = 0.25  # share that an interquartile mean drops at each end


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A statistic with its interval.

    Attributes:
      value: point estimate; an array for a performance profile.
      low, high: bounds of the interval of confidence `CONFIDENCE`; None: a game has a single run.
    """

    value: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def median(scores: Scores) -> np.ndarray:
    """Median over games of the mean over runs."""
    return np.median(_game_means(scores), axis=-1)


def mean(scores: Scores) -> np.ndarray:
    """Mean over games of the mean over runs."""
    return _game_means(scores).mean(axis=-1)


def interquartile_mean(scores: Scores) -> np.ndarray:
    """Mean of the middle half of all runs of all games."""
    pooled = np.sort(np.concatenate([_floats(game) for game in scores], axis=-1), axis=-1)
    count = pooled.shape[-1]
    cut = int(_CUT * count)  # as scipy.stats.trim_mean
    return pooled[..., cut : count - cut].mean(axis=-1)


def profile(thresholds: np.ndarray) -> Statistic:
    """Statistic [..., thresholds]: the share of runs above each threshold, averaged over games."""

    def above(scores: Scores) -> np.ndarray:
        # A running sum: an array of every game's resamples would take a gigabyte.
        return sum((_floats(game)[..., None] > thresholds).mean(axis=-2) for game in scores) / len(
            scores
        )

    return above


def improvement(scores: Scores, others: Scores) -> np.ndarray:
    """Probability that a run scores above a run of `others` on a game drawn at random.

    Ties count one half (the Mann-Whitney U statistic divided by the number of pairs). `others` has
    the same games in the same order.
    """
    wins = []
    for game, other in zip(scores, others):
        left, right = _floats(game)[..., :, None], _floats(other)[..., None, :]
        wins.append(((left > right) + 0.5 * (left == right)).mean(axis=(-2, -1)))
    return np.mean(wins, axis=0)


def estimate(statistic: Statistic, scores: Scores, seed: int = 0) -> Estimate:
    """A statistic with its percentile interval, from resampling the runs within each game."""
    value = statistic(scores)
    if min(len(game) for game in scores) < 2:
        return Estimate(value)
    return _interval(value, statistic(_resampled(scores, np.random.default_rng(seed))))


def estimate_improvement(scores: Scores, others: Scores, seed: int = 0) -> Estimate:
    """`improvement` with its interval; `others` may be published scores, one per game."""
    value = improvement(scores, others)
    if min(len(game) for game in scores) < 2:
        return Estimate(value)
    rng = np.random.default_rng(seed)
    return _interval(value, improvement(_resampled(scores, rng), _resampled(others, rng)))


def _interval(value: np.ndarray, resampled: np.ndarray) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, (tail, 1 - tail), axis=0)
    return Estimate(value, low, high)


def _resampled(scores: Scores, rng: np.random.Generator) -> list[np.ndarray]:
    """<float64>[REPETITIONS, runs] per game, drawn with replacement from the game's runs."""
    return [rng.choice(_floats(game), (REPETITIONS, len(game))) for game in scores]


def _game_means(scores: Scores) -> np.ndarray:
    """<float64>[..., games]."""
    return np.stack([_floats(game).mean(axis=-1) for game in scores], axis=-1)


def _floats(game: np.ndarray) -> np.ndarray:
    return np.asarray(game, dtype=np.float64)
