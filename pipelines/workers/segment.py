"""Segments: what a worker did within some seconds, as one typed record; its text in the ledger.

The names of fields are those of the telemetry (`pipelines/events.py`).
"""

import json
from collections.abc import Sequence
from typing import NamedTuple


class Episode(NamedTuple):
    """One finished game.

    Attributes:
      time: of its end, seconds since 1970.
      raw_return: sum of the game's own rewards, in points.
      clipped_return: sum of the rewards that the agent learns from.
      agent_steps: decisions in the game.
      epsilon: probability of a random action at the end of the game.
      run_agent_steps: of the run at that time, as far as the actor knew.
      run_updates: likewise.
    """

    time: float
    raw_return: float
    clipped_return: float
    agent_steps: int
    epsilon: float
    run_agent_steps: int
    run_updates: int


class Segment(NamedTuple):
    """A segment of a worker's work; (kind, worker, segment) identifies it in a run.

    Attributes:
      kind: 'actor', 'learner' or 'bundle'.
      worker: its number.
      segment: its number, from 0; a later start of the run goes on with the numbers.
      submission: of the job in which it was done.
      time: of its end, seconds since 1970.
      seconds: that it took.
      agent_steps: decisions made.
      gradients: computed; outliers: of these, dropped by the outlier test; stale, invalid: of
        these, rejected by the parameter server. The others were applied: updates.
      loss_sum: sum of the losses of the gradients.
      staleness: pushed gradients by staleness (see `STALENESS_BOUNDS`); empty of an actor.
      episodes: games that ended.
    """

    kind: str
    worker: int
    segment: int
    submission: int
    time: float
    seconds: float
    agent_steps: int = 0
    gradients: int = 0
    outliers: int = 0
    stale: int = 0
    invalid: int = 0
    loss_sum: float = 0.0
    staleness: Sequence[int] = ()
    episodes: Sequence[Episode] = ()


def encode(segment: Segment) -> str:
    """The segment as JSON."""
    episodes = [episode._asdict() for episode in segment.episodes]
    return json.dumps({**segment._asdict(), 'episodes': episodes})


def decode(text: str) -> Segment:
    """The segment that `encode` wrote.

    Raises:
      ValueError, TypeError, KeyError: it is not one of this version.
    """
    values = json.loads(text)
    episodes = tuple(Episode(**row) for row in values.pop('episodes'))
    return Segment(**{**values, 'staleness': tuple(values['staleness']), 'episodes': episodes})
