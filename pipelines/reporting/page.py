"""Variants, verdicts and charts in, one self-contained HTML page out."""

import base64
import dataclasses
import datetime
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.monitoring.episodes import RETURN_WINDOW
from pipelines.reporting import curves, drawing, reference, results, tables
from pipelines.reporting.charts import Chart
from pipelines.reporting.results import Variant, Verdict
from pipelines.reporting.runs import Run
from pipelines.reporting.statistics import Estimate

TEMPLATE_FILE = pathlib.Path(__file__).with_name('template.html')
GENERATOR = 'Gorila on Beam report'
"""Marks a page as a report, which a later report may replace."""

_FEW_SEEDS = 5
_FOLDED_PICTURES = 12  # a chart of more opens on a click
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Content:
    """What a report shows.

    Attributes:
      variants, verdicts: see `results`.
      scores: charts of the verdicts; empty: nothing to compare.
      curves: learning curves, one chart per axis.
      activity: throughput, staleness, rejections and the learners' figures.
      problems: what was skipped, and why.
      files: name of the directory beside the page.
      command: that made the report.
      video_bytes: of all embedded videos at most.
    """

    variants: Sequence[Variant]
    verdicts: Sequence[Verdict]
    scores: Sequence[Chart]
    curves: Sequence[Chart]
    activity: Sequence[Chart]
    problems: Sequence[str]
    files: str
    command: str
    video_bytes: int

    @property
    def runs(self) -> list[Run]:
        return [run for variant in self.variants for run in variant.runs]

    @property
    def unit(self) -> str:
        """What the runs' frames are."""
        return curves.unit(self.runs)


def render(content: Content) -> str:
    """The page."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(_FILTERS)
    template = environment.from_string(TEMPLATE_FILE.read_text(encoding='utf-8'))
    best = _headliner(content.verdicts)
    return template.render(
        content=content,
        best=best,
        headline=headline(best, content),
        protocols=_by_protocol(content.verdicts),
        published=results.published_aggregates,
        published_wins=_published_wins(best),
        aggregates=list(results.AGGREGATES),
        agents=reference.AGENTS,
        run_rows=_run_rows(content.variants),
        settings=tables.settings(content.variants).rows,
        machines=tables.machines(content.variants),
        launches=tables.launches,
        minutes=sum(tables.minutes(run) or 0 for run in content.runs),
        core_minutes=_sum([tables.core_minutes(run) for run in content.runs]),
        at_once=tables.at_once(content.runs),
        videos=_videos(content),
        few_seeds=_few_seeds(content.verdicts),
        fold=_FOLDED_PICTURES,
        series=len(drawing.SERIES),
        generator=GENERATOR,
        now=datetime.datetime.now(datetime.UTC),
    )


def _headliner(verdicts: Sequence[Verdict]) -> Verdict | None:
    """The comparable verdict of highest precedence, with most games, then interquartile mean."""
    ranked = [v for v in verdicts if v.protocol.comparable and v.known]
    return max(ranked, key=_rank) if ranked else None


def _rank(verdict: Verdict) -> tuple[Any, ...]:
    mean = float(verdict.aggregates['interquartile mean'].value)
    return *(not late for late in verdict.protocol.precedence), len(verdict.known), mean


def _published_wins(best: Verdict | None) -> tuple[int, int]:
    """(games of the 49 on which Gorila beats DQN, games), with the verdict's starts."""
    starts = best.protocol.starts if best else reference.STARTS[0]
    means = {game: row[starts]['gorila'] for game, row in reference.table().items()}
    won, others = reference.wins(means, 'dqn', starts)
    return len(won), len(won) + len(others)


def headline(best: Verdict | None, content: Content) -> str:
    """The page's first sentence."""
    if best is None:
        return _headline_without_comparison(content)
    won, of = best.wins('gorila')
    if of == 1:
        score = best.known[0]
        game = reference.title(score.game)
        gorila = number((score.published or {})['gorila'])
        place = 'above' if won else 'below'
        text = f'{game}: {number(score.mean)} points, {place} Gorila’s {gorila}'
    else:
        text = f'Beats Gorila on {won} of {of} games'
    return text if not any(best.protocol.precedence) else f'{text} ({best.protocol.name})'


def _headline_without_comparison(content: Content) -> str:
    scores = [score for verdict in content.verdicts for score in verdict.scores]
    if len(scores) == 1:
        score = scores[0]
        game = reference.title(score.game)
        return f'{game}: {number(score.mean)} points under {score.protocol.name}'
    returns = [episode.raw_return for run in content.runs for episode in run.episodes]
    if not scores and len(content.runs) == 1 and returns:
        last = returns[-RETURN_WINDOW:]
        mean = number(sum(last) / len(last))
        game = reference.title(content.runs[0].game)
        return f'{game}: {mean} points in the last {len(last)} training games, not evaluated yet'
    games = sorted({run.game for run in content.runs})
    named = reference.title(games[0]) if len(games) == 1 else f'{len(games)} games'
    return f'{named}: no score to hold against the published ones yet'


def _by_protocol(verdicts: Sequence[Verdict]) -> list[tuple[Any, list[Verdict]]]:
    held: dict[Any, list[Verdict]] = {}
    for verdict in verdicts:
        held.setdefault(verdict.protocol, []).append(verdict)
    return list(held.items())


def _few_seeds(verdicts: Sequence[Verdict]) -> bool:
    """Whether an interval is shown that comes from too few seeds to be wide enough."""
    seeds = [min(map(len, (s.means for s in v.scores))) for v in verdicts if v.scores]
    return any(2 <= least < _FEW_SEEDS for least in seeds)


def _run_rows(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """The rows of the runs with the variant itself, and names of runs where they are unique."""
    held = [(variant, run) for variant in variants for run in variant.runs]
    unique = len({run.name for _, run in held}) == len(held)
    rows = tables.runs(variants).rows
    return [
        {**row, 'variant': variant, 'run': run.name if unique else run.path}
        for row, (variant, run) in zip(rows, held)
    ]


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _videos(content: Content) -> list[dict[str, Any]]:
    """The video of each game's best run under one protocol, until `video_bytes` are embedded."""
    rules = {s.game: v.protocol for v in reversed(content.verdicts) for s in v.scores}
    best: dict[str, tuple[float, Run]] = {}
    for run in content.runs:
        held = results.chosen(run).get(rules[run.game]) if run.game in rules else None
        score = held.mean if held else -float('inf')
        if run.video is not None and (run.game not in best or score > best[run.game][0]):
            best[run.game] = score, run
    videos, left = [], content.video_bytes
    for game, (score, run) in sorted(best.items()):
        assert run.video is not None
        fits = run.video.content is not None and run.video.size <= left
        left -= run.video.size if fits else 0
        data = base64.b64encode(run.video.content or b'').decode() if fits else None
        size = run.video.size / _MIB
        videos.append({'game': game, 'run': run, 'score': score, 'data': data, 'mib': size})
    return videos


# How values are written.


def number(value: float | None, digits: int = 1) -> str:
    """With thousands separators and `digits` decimals, so that a column aligns; '–' for None."""
    return '–' if value is None else f'{value:,.{digits}f}'.replace('-', '−')


def percent(value: float | None) -> str:
    return '–' if value is None else f'{number(value)}\u00a0%'


def _span(values: Sequence[int]) -> str:
    """A count that runs share, or the lowest and highest of theirs; '–' for none."""
    if not values:
        return '–'
    low, high = min(values), max(values)
    return number(low, 0) if low == high else f'{number(low, 0)} to {number(high, 0)}'


def _interval(estimate: Estimate, factor: float = 1.0) -> str:
    """Bounds of an estimate in percent, or that there are none."""
    if estimate.low is None or estimate.high is None:
        return 'one seed'
    return f'{number(factor * float(estimate.low))} to {percent(factor * float(estimate.high))}'


def _duration(minutes: float) -> str:
    return f'{number(minutes)} min' if minutes < 60 else f'{number(minutes / 60)} h'


def _value(value: Any) -> str:
    """A setting."""
    if value is None:
        return '–'
    if isinstance(value, Mapping):
        return ', '.join(f'{name} {entry}' for name, entry in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f'{value:,}'
    return results.shown(value)


_FILTERS = {
    'number': number,
    'percent': percent,
    'game': reference.title,
    'interval': _interval,
    'span': _span,
    'value': _value,
    'duration': _duration,
}
"""By their name in the template."""
