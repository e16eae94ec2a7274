"""Results in, the report's tables out, as rows, CSV and JSON."""

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.reporting import curves, results
from pipelines.reporting.records import Launch, Machine
from pipelines.reporting.reference import AGENTS
from pipelines.reporting.results import GameScore, Variant, Verdict
from pipelines.reporting.runs import Run
from pipelines.reporting.statistics import Estimate


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of equal fields; a value is None where nothing is known."""

    name: str
    rows: tuple[Mapping[str, Any], ...]

    def csv(self) -> str:
        text = io.StringIO()
        fields = list(self.rows[0]) if self.rows else []
        writer = csv.DictWriter(text, fields, lineterminator='\n')
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def json(self) -> str:
        return json.dumps(list(self.rows), indent=1, allow_nan=False) + '\n'


def scores(verdicts: Sequence[Verdict]) -> Table:
    """A row per variant, protocol and game."""
    rows = [_score(score) for verdict in verdicts for score in verdict.scores]
    return Table('scores', tuple(rows))


def _score(score: GameScore) -> dict[str, Any]:
    several = len(score.means) > 1
    return {
        'variant': score.variant.name,
        'game': score.game,
        'protocol': score.protocol.name,
        'comparable': score.protocol.comparable,
        'seeds': len(score.means),
        'games': sum(score.games),
        'fewest_games': min(score.games),
        'lowest_updates': min(score.updates, default=None),
        'highest_updates': max(score.updates, default=None),
        'starts': ', '.join(score.start_sources) or None,
        'score': score.mean,
        'lowest_seed': float(score.means.min()) if several else None,
        'highest_seed': float(score.means.max()) if several else None,
        **{agent: (score.published or {}).get(agent) for agent in AGENTS},
        'normalised_percent': float(score.normalised.mean()) if score.published else None,
        'beats_dqn': score.beats('dqn'),
        'beats_gorila': score.beats('gorila'),
        'games_failed': score.failed,
    }


def aggregates(verdicts: Sequence[Verdict]) -> Table:
    """A row per variant, protocol and aggregate, all in percent."""
    rows = []
    for verdict in verdicts:
        rows += [_aggregate(verdict, name, 1, held) for name, held in verdict.aggregates.items()]
        rows += [
            _aggregate(verdict, f'probability of improvement over {name}', 100, held)
            for name, held in verdict.improvements.items()
        ]
    return Table('aggregates', tuple(rows))


def _aggregate(verdict: Verdict, name: str, factor: float, held: Estimate) -> dict[str, Any]:
    return {
        'variant': verdict.variant.name,
        'protocol': verdict.protocol.name,
        'games': len(verdict.known),
        'runs': sum(len(score.evaluations) for score in verdict.known),
        'aggregate': name,
        'percent': factor * float(held.value),
        'low': None if held.low is None else factor * float(held.low),
        'high': None if held.high is None else factor * float(held.high),
    }


def runs(variants: Sequence[Variant]) -> Table:
    """A row per run."""
    return Table('runs', tuple(_run(v, run) for v in variants for run in v.runs))


def _run(variant: Variant, run: Run) -> dict[str, Any]:
    chosen = sorted(results.chosen(run).items(), key=lambda entry: entry[0].precedence)
    rules, evaluation = chosen[0] if chosen else (None, None)
    return {
        'variant': variant.key,
        'run': run.path,
        'game': run.game,
        'seed': run.seed,
        'frames': run.frames,
        'updates': run.summary.updates,
        'minutes': minutes(run),
        'core_minutes': core_minutes(run),
        'frames_per_second': run.summary.frames_per_second,
        'updates_per_second': run.summary.updates_per_second,
        'score': evaluation.mean if evaluation else None,
        'standard_deviation': evaluation.std if evaluation else None,
        'games': evaluation.episodes if evaluation else None,
        'protocol': rules.name if rules else None,
        'evaluation': evaluation.file if evaluation else None,
        'policy': evaluation.path if evaluation else None,
        'checkpoint': evaluation.checkpoint if evaluation else None,
        'evaluated_updates': evaluation.updates if evaluation else None,
        'mean_return_100': run.summary.mean_return_100,
        'state': run.state,
    }


def minutes(run: Run) -> float | None:
    """Minutes of training; None: unknown."""
    return _at_end(run, curves.spent_minutes(run))


def core_minutes(run: Run) -> float | None:
    """Minutes of training times cores; None: cores unknown."""
    return _at_end(run, curves.spent_core_minutes(run))


def _at_end(run: Run, spent: curves.Spent | None) -> float | None:
    ends = [session.end for session in run.sessions[-1:]]
    return float(spent(np.array(ends))[0]) if spent and ends else None


def at_once(runs: Sequence[Run]) -> int:
    """Greatest number of the runs that one machine trained at a time, as far as is known."""
    moments: dict[str, list[tuple[float, int]]] = {}
    for run in runs:
        for session in run.sessions:
            host = run.host(session.start)
            if host is not None:
                moments.setdefault(host, []).extend([(session.start, 1), (session.end, -1)])
    sums = [
        max(itertools.accumulate(step for _, step in sorted(held))) for held in moments.values()
    ]
    return max(sums, default=1)


def settings(variants: Sequence[Variant]) -> Table:
    """A row per setting, a column per variant; those that differ first."""
    differing = results.differences([variant.settings for variant in variants])
    names = dict.fromkeys([*differing, *(name for v in variants for name in v.settings)])
    shown = [name for name in names if name not in ('game', 'seed', 'seal', 'checksum')]
    rows = [
        {
            'setting': name,
            'differs': name in differing,
            **{variant.key: variant.settings.get(name) for variant in variants},
        }
        for name in shown
    ]
    return Table('settings', tuple(rows))


def machines(variants: Sequence[Variant]) -> dict[Machine, list[str]]:
    """The runs that were launched on each distinct machine and software."""
    held: dict[Machine, list[str]] = {}
    for run in (run for variant in variants for run in variant.runs):
        for row in launches(run):
            names = held.setdefault(row.machine, [])
            if run.name not in names:
                names.append(run.name)
    return held


def launches(run: Run) -> list[Launch]:
    """What launched the run; of a run of an earlier version, what evaluated it."""
    made = [evaluation.launch for evaluation in run.evaluations if evaluation.launch]
    return list(run.launches) or made[:1]
