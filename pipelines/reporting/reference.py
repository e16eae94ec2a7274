"""Published scores of 49 Atari games: a game and a score in, a normalised score out.

Sources of `atari49_scores.json`:
  random, human, dqn, gorila: Nair et al. 2015 (arXiv 1507.04296), tables of raw scores in the
    appendix, with no-op starts and with human starts; `dqn` with no-op starts is that of Mnih et
    al. 2015 (Nature).
  apex: Horgan et al. 2018 (arXiv 1803.00933), tables of scores per game in the appendix.
"""

import functools
import json
import pathlib
import statistics
from collections.abc import Mapping

from agents.config import is_atari

DATA_FILE = pathlib.Path(__file__).with_name('atari49_scores.json')

STARTS = ('noop', 'human')
"""Kinds of starts with published scores: no-op starts and human starts."""
AGENTS = ('random', 'human', 'dqn', 'gorila', 'apex')
"""Columns of the table; `human` is a professional player."""


@functools.cache
def table() -> dict[str, dict[str, dict[str, float]]]:
    """Mean raw scores, by game (its ROM's name), starts and agent."""
    rows = json.loads(DATA_FILE.read_text(encoding='utf-8'))
    return {name.replace('-', '_'): row for name, row in rows.items()}


def title(game: str) -> str:
    """The name of a game's ROM as a title: 'Space invaders'; others stay as they are."""
    return game.replace('_', ' ').capitalize() if is_atari(game) else game


def scores(game: str, starts: str) -> Mapping[str, float] | None:
    """Published mean raw scores by agent, None for a game outside the 49.

    Args:
      game: name of its ROM, such as 'pong'.
      starts: one of `STARTS`.
    """
    return table()[game][starts] if game in table() else None


def normalised(score: float, game: str, starts: str) -> float | None:
    """Human-normalised score in percent: 0 is random play, 100 the professional player.

    100 (score - random) / (human - random), Mnih et al. 2015; None for a game outside the 49.
    """
    published = scores(game, starts)
    if published is None:
        return None
    return 100 * (score - published['random']) / (published['human'] - published['random'])


def published_normalised(agent: str, starts: str) -> dict[str, float]:
    """Human-normalised score of a published agent on each of the 49 games, in percent."""
    found = {game: normalised(rows[starts][agent], game, starts) for game, rows in table().items()}
    return {game: score for game, score in found.items() if score is not None}


def median(agent: str, starts: str) -> float:
    """Median human-normalised score of a published agent over the 49 games, in percent."""
    return statistics.median(published_normalised(agent, starts).values())


def wins(means: Mapping[str, float], agent: str, starts: str) -> tuple[list[str], list[str]]:
    """Games whose mean score exceeds a published agent's, and the other games of the 49.

    Args:
      means: mean raw score by game; games outside the 49 are ignored.
      agent: one of `AGENTS`.
      starts: one of `STARTS`, under which `means` were played.
    """
    known = {game: published for game in means if (published := scores(game, starts))}
    won = [game for game, published in known.items() if means[game] > published[agent]]
    return won, [game for game in known if game not in won]
