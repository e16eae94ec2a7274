"""Plays the games of an evaluation in this process: games in, their scores out as they end."""

import os
import queue
import threading
from collections.abc import Iterator, Sequence

from pipelines.evaluation.bounded import play_within
from pipelines.evaluation.play import CancelledError, Failure, Game, Score
from pipelines.evaluation.policies import Player, Policy


def play_all(
    policies: Sequence[Policy], games: Sequence[Game], num_threads: int, hang_seconds: float
) -> Iterator[Score | Failure]:
    """Plays in threads; TensorFlow and the emulators compute without Python's lock.

    Args:
      policies: by the index in `Game.policy`.
      games: to play.
      num_threads: each opens the policies that it needs.
      hang_seconds: after so long without a step a game fails.

    Yields:
      A record for each game, in the order in which they end.

    Leaving the iterator early ends the threads at their next step, or after seconds without one.
    """
    os.environ.setdefault('TF_NUM_INTRAOP_THREADS', '1')
    waiting: queue.SimpleQueue[Game] = queue.SimpleQueue()
    ended: queue.SimpleQueue[Score | Failure] = queue.SimpleQueue()
    for game in games:
        waiting.put(game)
    cancelled = threading.Event()
    threads = [
        threading.Thread(
            target=_play_waiting, args=(policies, hang_seconds, waiting, ended, cancelled)
        )
        for _ in range(min(num_threads, len(games)))
    ]
    try:
        for thread in threads:
            thread.start()
        for _ in games:
            yield ended.get()
    finally:
        cancelled.set()
        for thread in threads:
            thread.join()


def _play_waiting(
    policies: Sequence[Policy],
    hang_seconds: float,
    waiting: 'queue.SimpleQueue[Game]',
    ended: 'queue.SimpleQueue[Score | Failure]',
    cancelled: threading.Event,
) -> None:
    """Plays waiting games until there are none."""
    players: dict[int, Player] = {}
    while not cancelled.is_set():
        try:
            game = waiting.get_nowait()
        except queue.Empty:
            return
        ended.put(_played(policies, players, hang_seconds, game, cancelled))


def _played(
    policies: Sequence[Policy],
    players: dict[int, Player],
    hang_seconds: float,
    game: Game,
    cancelled: threading.Event,
) -> Score | Failure:
    try:
        if game.policy not in players:
            players[game.policy] = policies[game.policy].player()
        return play_within(hang_seconds, game, players[game.policy](), cancelled.is_set)
    except CancelledError:
        return Failure(game.policy, game.episode, 'interrupted')
    except Exception as error:  # of any kind: a policy may be the user's own
        return Failure.of(game, error)
