"""What to evaluate: an evaluation's request in, policies with their protocols and games out."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from agents.config import EnvironmentConfig
from agents.environments.factory import check_name
from pipelines.errors import UsageError
from pipelines.evaluation import policies
from pipelines.evaluation import starts as start_points
from pipelines.evaluation.play import Game
from pipelines.evaluation.policies import RANDOM, Policy
from pipelines.experiment.protocols import (
    Protocol,
    default_for,
    deviations,
    protocol,
    require_fit,
)

DEFAULT_SEED = 1


@dataclasses.dataclass(frozen=True)
class Request:
    """An evaluation as the user requests it; None: the run's own value, or the protocol's.

    Attributes:
      run_dirs: directories of runs, local or gs://...
      checkpoint: of the runs: 'newest', 'best' or a number.
      policies: directories of SavedModels, or 'random'.
      games: for policies that are not a run's; empty: those that the others were trained for.
      protocol: name of the rules.
      starts: file of start points.
      episodes, epsilon, seed: of each policy's evaluation.
    """

    run_dirs: Sequence[str] = ()
    checkpoint: str = 'newest'
    policies: Sequence[str] = ()
    games: Sequence[str] = ()
    protocol: str | None = None
    starts: str | None = None
    episodes: int | None = None
    epsilon: float | None = None
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A policy in one game.

    Attributes:
      policy: the policy.
      protocol: its rules.
      seed: of its games.
      starts: start points, empty for protocols without.
      starts_file, starts_source: their file, and who played them.
    """

    policy: Policy
    protocol: Protocol
    seed: int
    starts: tuple[start_points.Start, ...] = ()
    starts_file: str | None = None
    starts_source: str | None = None

    @property
    def game(self) -> str:
        """Its ROM, or the name of its environment; raises ValueError if it cannot be played."""
        return check_name(self.policy.environment.game)

    def games(self, index: int) -> Iterator[Game]:
        """The games to play, for the entrant's index in the evaluation."""
        chance = self.policy.kind == RANDOM
        rules = dataclasses.replace(self.protocol, epsilon=1.0) if chance else self.protocol
        for episode in range(self.protocol.episodes):
            number = episode % len(self.starts) if self.starts else None
            start = self.starts[number] if number is not None else None
            yield Game(index, episode, self.seed, self.policy.environment, rules, start, number)

    def result(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON values of its result, less those of the whole command.

        Args:
          scores: see `results.combined`.
        """
        policy, rules = self.policy, self.protocol
        by_chance = policy.kind == RANDOM
        starts = {'file': self.starts_file, 'source': self.starts_source, 'count': len(self.starts)}
        return {
            'protocol': rules.name,
            'deviations': deviations(rules, policy.environment),
            'game': self.game,
            'policy': policy.describe(),
            'updates': policy.updates,
            'epsilon': 1.0 if by_chance else rules.epsilon,
            'max_frames': rules.max_frames,
            'seed': self.seed,
            'starts': starts if self.starts else None,
            **scores,
        }


def entrants(request: Request, notify: Callable[[str], None]) -> list[Entrant]:
    """Reads the policies and checks that each fits its game and protocol.

    Args:
      request: what to evaluate.
      notify: receives a line for each damaged checkpoint that is skipped.

    Raises:
      UsageError: a policy, the protocol or the start points cannot be used.
    """
    _require_named(request)
    try:
        games = [check_name(game) for game in request.games]
        run_dirs = dict.fromkeys(request.run_dirs)
        found = [_of_run(request, run_dir, notify) for run_dir in run_dirs]
        for path in dict.fromkeys(request.policies):
            if path != RANDOM:
                found += _of_saved_model(request, path)
        if RANDOM in request.policies:
            found += _of_chance(request, games or [entrant.game for entrant in found])
        for entrant in found:
            if entrant.game not in (games or [entrant.game]):
                raise policies.other_game(entrant.policy.path, entrant.game, games[0])
    except ValueError as error:
        raise UsageError(str(error)) from error
    for entrant in found:
        require_fit(entrant.protocol.name, entrant.policy.environment)
    return found


def _require_named(request: Request) -> None:
    """Checks that policies are named, and a game for random actions, before any is read.

    Raises:
      UsageError: there is none.
    """
    if not (request.run_dirs or request.policies):
        raise UsageError('nothing to evaluate. Fix: name a run as --run_dir, or a --policy.')
    if not (request.run_dirs or request.games or set(request.policies) - {RANDOM}):
        raise UsageError(f'--policy {RANDOM}: no game is named. Fix: add --games.')


def _of_run(request: Request, run_dir: str, notify: Callable[[str], None]) -> Entrant:
    policy = policies.of_run(run_dir, request.checkpoint, notify)
    assert policy.experiment is not None
    run = policy.experiment.run
    own = run.evaluation_rules if request.protocol is None else {}
    rules = _rules(request, run.evaluation_protocol, own)
    return _entrant(request, policy, rules, run.seed)


def _of_saved_model(request: Request, path: str) -> Iterator[Entrant]:
    for game in request.games or (None,):
        policy = policies.of_saved_model(path, game)
        rules = _rules(request, default_for(policy.environment), {})
        yield _entrant(request, policy, rules, DEFAULT_SEED)


def _of_chance(request: Request, games: Iterable[str]) -> Iterator[Entrant]:
    """Random actions in each of the games."""
    for game in dict.fromkeys(games):
        rules = _rules(request, default_for(EnvironmentConfig(game=game)), {})
        policy = policies.of_chance(game, rules.full_action_space)
        yield _entrant(request, policy, rules, DEFAULT_SEED)


def _rules(request: Request, default: str, own: dict[str, Any]) -> Protocol:
    """The requested protocol; the request's values override `own`, and those its own."""
    given = {'episodes': request.episodes, 'epsilon': request.epsilon}
    values = own | {name: value for name, value in given.items() if value is not None}
    return protocol(request.protocol or default, values)


def _entrant(request: Request, policy: Policy, rules: Protocol, seed: int) -> Entrant:
    """
    Raises:
      UsageError: policy, protocol and start points do not fit.
    """
    if rules.full_action_space and not policy.environment.full_action_space:
        raise UsageError(
            f'--protocol {rules.name}: the policy {policy.path} chooses among fewer than all 18'
            ' actions. Fix: train with --preset machado or --full_action_space, or choose another'
            ' protocol.'
        )
    if rules.starts != (request.starts is not None):
        raise UsageError(
            f'--protocol {rules.name}: needs --starts. Fix: record start points with'
            ' `pipelines/record_starts.py`.'
            if rules.starts
            else f'--starts {request.starts}: no effect with --protocol {rules.name}. Fix: add'
            ' --protocol human.'
        )
    seed = seed if request.seed is None else request.seed
    if request.starts is None:
        return Entrant(policy, rules, seed)
    environment = policy.environment
    file = start_points.read(
        pathlib.Path(request.starts), environment.game, environment.action_repeat
    )
    codes = start_points.action_codes(environment.game, environment.full_action_space)
    for number, point in enumerate(file.starts):
        try:
            start_points.indices(point, codes)
        except ValueError as error:
            raise UsageError(
                f'--starts {request.starts}: point {number}: {error}. Fix: record start points with'
                ' the minimal action set.'
            ) from error
    if request.episodes is None:
        rules = dataclasses.replace(rules, episodes=len(file.starts))
    return Entrant(policy, rules, seed, file.starts, request.starts, file.source)
