"""Plays the games of an evaluation in this process: games in, their scores out as they end."""

import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from pipelines.evaluation.play import Failure, Game, Score
from pipelines.evaluation.players import Players
from pipelines.evaluation.policies import Policy

_TICK_SECONDS = 1.0


def play_all(
    policies: Sequence[Policy],
    games: Sequence[Game],
    num_threads: int,
    hang_seconds: float,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[Score | Failure]:
    """Plays in threads; TensorFlow and the emulators compute without Python's lock.

    Args:
      policies: by the index in `Game.policy`.
      games: to play.
      num_threads: each opens the policies that it needs.
      hang_seconds: after so long without a step a game fails.
      tick: called once a second while no game ends.

    Yields:
      A record for each game, in the order in which they end. Leaving the iterator early ends the
      threads at their next step, or within seconds.
    """
    os.environ.setdefault('TF_NUM_INTRAOP_THREADS', '1')
    waiting: queue.SimpleQueue[Game] = queue.SimpleQueue()
    ended: queue.SimpleQueue[Score | Failure] = queue.SimpleQueue()
    for game in games:
        waiting.put(game)
    cancelled, hung = threading.Event(), Counter[int]()
    players = [Players(policies.__getitem__, hang_seconds, hung) for _ in games[:num_threads]]
    threads = [
        threading.Thread(target=_play_waiting, args=(each, waiting, ended, cancelled))
        for each in players
    ]
    try:
        for thread in threads:
            thread.start()
        for _ in games:
            yield _next(ended, tick)
    finally:
        cancelled.set()
        for thread in threads:
            thread.join()


def _next(ended: 'queue.SimpleQueue[Score | Failure]', tick: Callable[[], None]) -> Score | Failure:
    while True:
        try:
            return ended.get(timeout=_TICK_SECONDS)
        except queue.Empty:
            tick()


def _play_waiting(
    players: Players,
    waiting: 'queue.SimpleQueue[Game]',
    ended: 'queue.SimpleQueue[Score | Failure]',
    cancelled: threading.Event,
) -> None:
    """Plays waiting games until there are none."""
    while not cancelled.is_set():
        try:
            game = waiting.get_nowait()
        except queue.Empty:
            return
        ended.put(players.played(game, cancelled.is_set))
