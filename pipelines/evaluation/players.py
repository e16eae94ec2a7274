"""Plays the games of an evaluation's policies: games in, a score or a failure out for each."""

from collections import Counter
from collections.abc import Callable

from pipelines.evaluation.bounded import Asked, HungError, within
from pipelines.evaluation.play import CancelledError, Failure, Game, Score, play
from pipelines.evaluation.policies import Player, Policy

_MOST_HUNG = 3  # games in a row; each leaves a thread and an environment behind


class Players:
    """Policies, each opened at its first game; not thread-safe."""

    def __init__(
        self,
        policy: Callable[[int], Policy],
        hang_seconds: float,
        hung: Counter[int] | None = None,
    ):
        """
        Args:
          policy: returns one by the index in `Game.policy`; called once for each.
          hang_seconds: without a step after which a game fails, and for a policy to open.
          hung: counts the games of each policy that hung in a row, with those of other threads.
        """
        self._policy, self._hang_seconds = policy, hang_seconds
        self._players: dict[int, Player] = {}
        self._hung = Counter() if hung is None else hung

    def played(self, game: Game, cancelled: Asked = lambda: False) -> Score | Failure:
        """Plays a game; after three in a row that hang its policy plays no more."""
        try:
            if self._hung[game.policy] >= _MOST_HUNG:
                raise HungError(f'not played, since {_MOST_HUNG} games before it hung')
            score = within(self._hang_seconds, lambda asked: self._play(game, asked), cancelled)
        except CancelledError:
            return Failure(game.policy, game.episode, 'interrupted')
        except Exception as error:  # of any kind: a policy may be the user's own
            hung = self._hung[game.policy] + 1
            self._hung[game.policy] = hung if isinstance(error, HungError) else 0
            return Failure.of(game, error)
        self._hung[game.policy] = 0
        return score

    def _play(self, game: Game, asked: Asked) -> Score:
        if game.policy not in self._players:
            self._players[game.policy] = self._policy(game.policy).player()
            asked()
        return play(game, self._players[game.policy](), cancelled=asked)
