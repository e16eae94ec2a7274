"""Runs in, scores per variant and game and their aggregates out.

Runs whose settings differ in game and seed only are seeds of one variant.
"""

import dataclasses
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.events import count, finite
from pipelines.experiment.protocols import PLAIN, PROTOCOLS
from pipelines.experiment.protocols import Protocol as Rules
from pipelines.reporting import reference, statistics
from pipelines.reporting.records import Evaluation
from pipelines.reporting.runs import Run
from pipelines.reporting.statistics import Estimate
from pipelines.storage.evaluations import EVALUATION_FILE

_NO_VARIANT = ('game', 'seed', 'seal', 'checksum', 'video')
_NO_VARIANT_PREFIXES = ('checkpoint_', 'evaluation_', 'evaluator_', 'wandb')
"""Settings that do not change what is learned."""

_EARLIER_NAMES = {'no-op starts': 'noop'}
"""Names of protocols in results of earlier versions."""
TITLES = {'noop': 'no-op starts', 'human': 'human starts'}
"""Names of protocols with published scores, as shown."""
_SOURCES = {
    'noop': 'Nair et al. 2015',
    'human': 'Nair et al. 2015, whose start points were never published: these are others',
    'rainbow': 'Hessel et al. 2018; Ape-X’s scores are of such games with epsilon 0',
    'machado': 'Machado et al. 2018',
    'plain': 'the environment’s own rules',
}

AGGREGATES: Mapping[str, statistics.Statistic] = {
    'median': statistics.median,
    'interquartile mean': statistics.interquartile_mean,
    'mean': statistics.mean,
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The rules under which a score was taken.

    Attributes:
      name: as shown.
      starts: kind of published scores that are shown beside, one of `reference.STARTS`.
      comparable: whether they were taken under the same rules.
      note: says what the rules are, and how they differ from those of the published scores.
      best: whether the scores are of checkpoints that the run's own evaluations selected.
    """

    name: str
    starts: str
    comparable: bool
    note: str
    best: bool = False

    @property
    def precedence(self) -> tuple[bool, bool, bool]:
        """Lowest for the scores that say most: comparable, of final parameters, no-op starts.

        The start points of published human starts are unknown, so scores from others come second.
        """
        return not self.comparable, self.best, self.starts != reference.STARTS[0]


@dataclasses.dataclass(frozen=True)
class Variant:
    """Runs that differ in game and seed only.

    Attributes:
      key: short name in charts: a letter, or the preset of the report's only variant.
      name: the preset, and what distinguishes it from the report's other variants of that.
      settings: of its first run.
      runs: at least one.
    """

    key: str
    name: str
    settings: Mapping[str, Any]
    runs: tuple[Run, ...]


@dataclasses.dataclass(frozen=True)
class GameScore:
    """Scores of a variant on one game under one protocol.

    Attributes:
      evaluations: with the run of each, one per run.
      published: mean raw scores by agent (`reference.AGENTS`), None: outside the 49 games.
    """

    variant: Variant
    game: str
    protocol: Protocol
    evaluations: tuple[tuple[Run, Evaluation], ...]
    published: Mapping[str, float] | None

    @property
    def means(self) -> np.ndarray:
        """<float64>[runs]: mean raw score of each run."""
        return np.array([evaluation.mean for _, evaluation in self.evaluations])

    @property
    def mean(self) -> float:
        return float(self.means.mean())

    @property
    def normalised(self) -> np.ndarray:
        """<float64>[runs]: human-normalised, in percent; empty outside the 49 games."""
        if self.published is None:
            return np.empty(0)
        starts = self.protocol.starts
        return np.array([reference.normalised(m, self.game, starts) for m in self.means], float)

    @property
    def failed(self) -> int:
        """Games that did not end."""
        return sum(evaluation.failed for _, evaluation in self.evaluations)

    @property
    def games(self) -> list[int]:
        """Games that ended, of each run."""
        return [evaluation.episodes for _, evaluation in self.evaluations]

    @property
    def updates(self) -> list[int]:
        """Of the evaluated parameters of each run, as far as known."""
        return [e.updates for _, e in self.evaluations if e.updates is not None]

    @property
    def start_sources(self) -> list[str]:
        """Who played the recorded start points; empty: unknown, or a protocol without."""
        sources = {e.start_source for _, e in self.evaluations if e.start_source}
        return sorted(sources)

    def beats(self, agent: str) -> bool | None:
        """Whether the mean exceeds a published agent's; None: not comparable."""
        if self.published is None or not self.protocol.comparable:
            return None
        return self.mean > self.published[agent]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A variant under one protocol, over all its games.

    Attributes:
      scores: one per game, by name.
      aggregates: of the human-normalised scores, by their name in `AGGREGATES`, in percent.
      improvements: probability of improvement over published agents and the report's other
        variants, by their key.
    """

    variant: Variant
    protocol: Protocol
    scores: tuple[GameScore, ...]
    aggregates: Mapping[str, Estimate]
    improvements: Mapping[str, Estimate]

    @property
    def known(self) -> tuple[GameScore, ...]:
        """Scores on games among the 49."""
        return tuple(score for score in self.scores if score.published is not None)

    def wins(self, agent: str) -> tuple[int, int]:
        """(games won against a published agent, games compared)."""
        compared = [score.beats(agent) for score in self.scores if score.beats(agent) is not None]
        return sum(map(bool, compared)), len(compared)

    @property
    def runs(self) -> int:
        return sum(len(score.evaluations) for score in self.scores)

    @property
    def games(self) -> list[int]:
        """Games that ended, of each run."""
        return [number for score in self.scores for number in score.games]

    @property
    def start_sources(self) -> list[str]:
        """Who played the recorded start points; empty: unknown, or a protocol without."""
        return sorted({source for score in self.scores for source in score.start_sources})


def variants(runs: Sequence[Run]) -> list[Variant]:
    """Groups runs into variants, in the order of their first run."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(sorted(_identity(run).items())), []).append(run)
    firsts = [group[0] for group in groups.values()]
    names = [_name(run, firsts) for run in firsts]
    return [
        Variant(
            key=_letters(index) if len(groups) > 1 else name,
            name=name,
            settings=group[0].settings,
            runs=tuple(sorted(group, key=lambda run: (run.game, str(run.seed)))),
        )
        for index, (name, group) in enumerate(zip(_unique(names), groups.values()))
    ]


def _letters(index: int) -> str:
    """A to Z, then AA, AB and so on."""
    prefix = _letters(index // 26 - 1) if index >= 26 else ''
    return prefix + string.ascii_uppercase[index % 26]


def _identity(run: Run) -> dict[str, str]:
    return {name: repr(value) for name, value in run.settings.items() if _varies(name)}


def _varies(name: str) -> bool:
    return name not in _NO_VARIANT and not name.startswith(_NO_VARIANT_PREFIXES)


def differences(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings that distinguish variants and differ among the given ones."""
    names = dict.fromkeys(name for held in settings for name in held if _varies(name))
    return [name for name in names if len({repr(held.get(name)) for held in settings}) > 1]


def _name(run: Run, others: Iterable[Run]) -> str:
    """The preset, and what distinguishes the run from others of this preset."""
    preset = run.settings.get('preset', 'unknown')
    peers = [o.settings for o in others if o.settings.get('preset', 'unknown') == preset]
    values = [
        f'{name} {shown(run.settings.get(name, "not recorded"))}' for name in differences(peers)
    ]
    return ', '.join([str(preset), *values])


def shown(value: Any) -> str:
    """A setting without the digits that binary fractions add."""
    return f'{value:.12g}' if isinstance(value, float) else str(value)


def _unique(names: Sequence[str]) -> list[str]:
    """The names, with a number after one that occurred before."""
    return [
        name if names.index(name) == index else f'{name} ({names[:index].count(name) + 1})'
        for index, name in enumerate(names)
    ]


def protocol(evaluation: Evaluation, settings: Mapping[str, Any]) -> Protocol:
    """The rules of an evaluation, of this version or an earlier one.

    The best checkpoint has rules of its own: its selection favours luck.
    """
    rules = _protocol(evaluation, settings)
    if not evaluation.best:
        return rules
    note = f"{rules.note}; of the checkpoint that the run's own evaluations found best"
    return dataclasses.replace(rules, name=f'{rules.name}, best checkpoint', note=note, best=True)


def _protocol(evaluation: Evaluation, settings: Mapping[str, Any]) -> Protocol:
    name = _EARLIER_NAMES.get(evaluation.protocol, evaluation.protocol)
    exact = PROTOCOLS.get(name)
    if exact is None:
        return Protocol(name, 'noop', False, 'a protocol that this version does not know')
    changed = evaluation.deviations
    if changed is None:
        changed = _earlier_deviations(evaluation, settings, exact)
    changed = {field: value for field, value in changed.items() if field != 'episodes'}
    missed = _missed(evaluation, exact)
    named = [f'{field} {value}' for field, value in changed.items()]
    named += [f'fewer than {number}' for number in missed]
    title = ', '.join([TITLES.get(name, name), *named])
    note = f'{_rules(dataclasses.replace(exact, **_known(changed)))} ({_SOURCES[name]})'
    starts = 'human' if name == 'human' else 'noop'
    comparable = not named and name in reference.STARTS
    if not comparable:
        other = changed or name not in reference.STARTS
        than = 'other rules' if other else ' and '.join(missed)
        note += f'; the published scores are of {than}, so no win or loss is counted'
    return Protocol(title, starts, comparable, note)


def _missed(evaluation: Evaluation, exact: Rules) -> list[str]:
    """The numbers of its protocol that an evaluation does not reach; failed games do not count.

    Its own numbers are no part of them: seeds with 28 and 29 of 30 games share a verdict.
    """
    numbers = {'games': evaluation.episodes}
    if exact.starts and evaluation.start_points is not None:
        numbers['start points'] = evaluation.start_points  # one for each game
    return [f'{exact.episodes} {name}' for name, n in numbers.items() if n < exact.episodes]


def _known(changed: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are fields of a protocol."""
    names = {field.name for field in dataclasses.fields(Rules)}
    return {name: value for name, value in changed.items() if name in names}


def _rules(rules: Rules) -> str:
    """A protocol's rules, in words."""
    parts = [
        'recorded start points' if rules.starts else '',
        f'up to {rules.max_noops} no-ops' if rules.max_noops else '',
        f'{rules.max_frames:,} {"steps" if rules.name == PLAIN else "frames"} at most',
        f'epsilon {rules.epsilon:g}',
        f'sticky actions {rules.sticky_action_probability:g}'
        if rules.sticky_action_probability
        else '',
        'all 18 actions' if rules.full_action_space else '',
    ]
    return ', '.join(part for part in parts if part)


def _earlier_deviations(
    evaluation: Evaluation, settings: Mapping[str, Any], exact: Rules
) -> dict[str, Any]:
    """Deviations of a result that does not name them, by its run's settings."""
    used = {
        'epsilon': evaluation.epsilon,
        'max_frames': evaluation.max_frames or count(settings.get('evaluation_max_frames')),
        'sticky_action_probability': finite(settings.get('sticky_action_probability')),
    }
    return {
        name: value
        for name, value in used.items()
        if value is not None and value != getattr(exact, name)
    }


def verdicts(found: Sequence[Variant]) -> list[Verdict]:
    """Each variant under each protocol, by precedence; then those with more games."""
    bare = [
        Verdict(variant, scores[0].protocol, tuple(scores), {}, {})
        for variant in found
        for scores in _scores(variant)
    ]
    full = [
        dataclasses.replace(
            verdict,
            aggregates=_aggregates(verdict),
            improvements=_published_improvements(verdict) | _improvements(verdict, bare),
        )
        for verdict in bare
    ]
    return sorted(full, key=lambda v: (v.protocol.precedence, -len(v.scores)))


def _scores(variant: Variant) -> list[list[GameScore]]:
    """The variant's scores by protocol, each sorted by game."""
    held: dict[Protocol, dict[str, list[tuple[Run, Evaluation]]]] = {}
    for run in variant.runs:
        for rules, evaluation in chosen(run).items():
            held.setdefault(rules, {}).setdefault(run.game, []).append((run, evaluation))
    return [
        [
            GameScore(variant, game, rules, tuple(rows), reference.scores(game, rules.starts))
            for game, rows in sorted(games.items())
        ]
        for rules, games in held.items()
    ]


def chosen(run: Run) -> dict[Protocol, Evaluation]:
    """One evaluation per protocol: newest parameters, most games, at the end of training, newest.

    Never by score, which would favour luck.
    """
    ranked: dict[Protocol, tuple[tuple, Evaluation]] = {}
    for place, evaluation in enumerate(run.evaluations):
        rules = protocol(evaluation, run.settings)
        updates = -1 if evaluation.updates is None else evaluation.updates
        rank = updates, evaluation.episodes, evaluation.file == EVALUATION_FILE, place
        if rules not in ranked or rank > ranked[rules][0]:
            ranked[rules] = rank, evaluation
    return {rules: evaluation for rules, (_, evaluation) in ranked.items()}


def _matrix(verdict: Verdict) -> list[np.ndarray]:
    """Normalised scores per game among the 49."""
    return [score.normalised for score in verdict.known]


def _aggregates(verdict: Verdict) -> dict[str, Estimate]:
    matrix = _matrix(verdict)
    if not matrix:
        return {}
    return {name: statistics.estimate(compute, matrix) for name, compute in AGGREGATES.items()}


def _published_improvements(verdict: Verdict) -> dict[str, Estimate]:
    """Over DQN and Gorila, each with one published score per game."""
    if not verdict.protocol.comparable or not verdict.known:
        return {}
    return {
        name: statistics.estimate_improvement(
            [score.means for score in verdict.known],
            [np.array([score.published[agent]]) for score in verdict.known if score.published],
        )
        for agent, name in (('dqn', 'DQN'), ('gorila', 'Gorila'))
    }


def _improvements(verdict: Verdict, others: Sequence[Verdict]) -> dict[str, Estimate]:
    """Over the other variants, on the games that both played under this protocol."""
    own = {score.game: score.means for score in verdict.scores}
    found = {}
    for other in others:
        theirs = {score.game: score.means for score in other.scores}
        common = [game for game in own if game in theirs]
        if other is verdict or other.protocol != verdict.protocol or not common:
            continue
        found[other.variant.key] = statistics.estimate_improvement(
            [own[game] for game in common], [theirs[game] for game in common]
        )
    return found


def profile(verdict: Verdict, thresholds: np.ndarray) -> Estimate | None:
    """Share of runs above each threshold (percent), None without games among the 49."""
    matrix = _matrix(verdict)
    return statistics.estimate(statistics.profile(thresholds), matrix) if matrix else None


def published_profile(
    agent: str, verdicts: Sequence[Verdict], thresholds: np.ndarray
) -> np.ndarray:
    """Share of the verdicts' games on which a published agent is above each threshold."""
    return statistics.profile(thresholds)(_published_matrix(agent, verdicts))


def published_aggregates(agent: str, verdicts: Sequence[Verdict]) -> dict[str, float]:
    """A published agent's aggregates over the verdicts' games, by name, in percent."""
    held = _published_matrix(agent, verdicts)
    return {name: float(compute(held)) for name, compute in AGGREGATES.items()}


def _published_matrix(agent: str, verdicts: Sequence[Verdict]) -> list[np.ndarray]:
    """Normalised scores per game of the verdicts, all with one kind of starts."""
    scores = reference.published_normalised(agent, verdicts[0].protocol.starts)
    games = sorted({score.game for verdict in verdicts for score in verdict.known})
    return [np.array([scores[game]]) for game in games]
