"""Results and curves in, the report's charts out."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.reporting import curves, drawing, reference, results
from pipelines.reporting.drawing import Picture
from pipelines.reporting.records import Evaluation
from pipelines.reporting.results import Variant, Verdict
from pipelines.reporting.runs import Run
from pipelines.storage.evaluations import EVALUATION_FILE

_PUBLISHED = (
    ('dqn', 'DQN', drawing.MUTED, 's', ':'),
    ('gorila', 'Gorila', drawing.INK, 'D', '--'),
    ('apex', 'Ape-X', drawing.MUTED, '^', '-.'),
)
"""Agent, name, colour, marker and line of published scores: hollow and grey, ours have colours."""
_LINEAR_PERCENT = 100.0  # the scale of normalised scores is linear below, logarithmic above
_STARTS = (('noop', results.TITLES['noop']), ('human', results.TITLES['human']))
_MOST_TICKS = 5  # that are percentages, on an axis
_ROW_INCHES, _FRAME_INCHES = 0.3, 1.25
_PROFILE_POINTS = 81
_LEARNER_TAGS = 12  # charts of the learners' own figures at most


Specs = Sequence[tuple[str, str, str]]
"""(tag, title, unit) of scalars; `{n}` in a tag stands for any number, `{box}` for any
numbered box, such as actor_0."""


@dataclasses.dataclass(frozen=True)
class Chart:
    """Pictures that belong together.

    Attributes:
      title, caption: what they show, and how to read them.
      pictures: one per game, or one.
    """

    title: str
    caption: str
    pictures: tuple[Picture, ...]


def colour(index: int) -> str:
    return drawing.SERIES[index % len(drawing.SERIES)]


def _line(index: int) -> str:
    """Line style: colours repeat after seven series, then dashed."""
    return ('-', '--', ':')[index // len(drawing.SERIES) % 3]


def _marker(index: int) -> str:
    return 'oPX'[index // len(drawing.SERIES) % 3]


# Scores.


@dataclasses.dataclass(frozen=True)
class Series:
    """A verdict in a chart.

    Attributes:
      index: of its colour, line and marker, its own among all verdicts.
      name: in the legend, its own in the chart.
    """

    verdict: Verdict
    index: int
    name: str


def series(
    verdicts: Sequence[Verdict],
    variants: Sequence[Variant],
    starts: str,
    comparable: bool = False,
) -> list[Series]:
    """The verdicts with these starts and a game among the 49; or the comparable ones of them.

    The first verdict of a variant has the variant's colour, as its curves have; the variant's
    further protocols have colours of their own.
    """
    more, seen, held = itertools.count(len(variants)), set(), []
    for verdict in verdicts:
        index = variants.index(verdict.variant)
        place = next(more) if index in seen else index
        seen.add(index)
        rules = verdict.protocol
        if verdict.known and rules.starts == starts and (rules.comparable or not comparable):
            held.append((verdict, place))
    return [Series(verdict, place, _label(verdict)) for verdict, place in held]


def _label(verdict: Verdict) -> str:
    """The variant, and what distinguishes the protocol from the chart's starts."""
    rules = verdict.protocol
    other = rules.name.removeprefix(dict(_STARTS)[rules.starts]).removeprefix(', ')
    return f'{verdict.variant.key}, {other}' if other else verdict.variant.key


def scores(verdicts: Sequence[Verdict], variants: Sequence[Variant]) -> Chart | None:
    """Normalised scores of each game beside the published ones, per kind of starts."""
    pictures = []
    for starts, name in _STARTS:
        held = series(verdicts, variants, starts)
        if held:
            games = sorted({score.game for row in held for score in row.verdict.known})
            height = _FRAME_INCHES + _ROW_INCHES * max(2, len(games)) * max(1, len(held) / 2)
            pictures.append(
                drawing.draw(
                    f'scores-{starts}',
                    f'Human-normalised scores of {len(games)} games, {name}, beside published ones',
                    functools.partial(_paint_scores, held=held, games=games, title=name),
                    (drawing.SIZE_INCHES[0], height),
                )
            )
    caption = (
        'Percent of a human’s score: 0 is random play, 100 a professional player; linear up to 100,'
        ' logarithmic beyond. Small dots are seeds, the large dot is their mean; grey and hollow:'
        ' published.'
    )
    return Chart('Score per game', caption, tuple(pictures)) if pictures else None


def _paint_scores(axes: Any, held: Sequence[Series], games: Sequence[str], title: str) -> None:
    rows = {game: len(games) - 1 - index for index, game in enumerate(games)}
    _paint_published(axes, held[0].verdict.protocol.starts, rows)
    for row, shift in _shifted(held):
        shade, marker = colour(row.index), _marker(row.index)
        for score in row.verdict.known:
            seeds, y = score.normalised, rows[score.game] + shift
            axes.plot(seeds, [y] * len(seeds), '.', color=shade, markersize=4, alpha=0.6)
            label = row.name if score is row.verdict.known[0] else None
            axes.plot(seeds.mean(), y, marker, color=shade, markersize=7.5, label=label)
    axes.set_xscale('symlog', linthresh=_LINEAR_PERCENT, linscale=1.2)
    axes.set_yticks(list(rows.values()), [reference.title(game) for game in rows])
    axes.set_ylim(-0.7, len(games) - 0.3)
    axes.set_title(title)
    _percent_axis(axes)
    low, high = axes.get_xlim()
    steps = [-100, 0, 50, 100, 1000 if high >= 1000 else 300, 10_000]
    axes.set_xticks([step for step in steps if low <= step <= high])
    axes.minorticks_off()
    drawing.legend(axes)


def _shifted(held: Sequence[Series]) -> list[tuple[Series, float]]:
    """Each series with its place above or below a row, the first on top."""
    step = min(0.24, 0.7 / len(held))
    return [(row, ((len(held) - 1) / 2 - place) * step) for place, row in enumerate(held)]


def _percent_axis(axes: Any) -> None:
    axes.set_xlabel('human-normalised score')
    axes.xaxis.set_major_formatter(lambda value, _: f'{value:,.0f} %')


def _paint_published(axes: Any, starts: str, rows: Mapping[str, int]) -> None:
    for percent in (0, 100):
        axes.axvline(percent, color=drawing.MUTED, linewidth=1.0)
    for agent, name, shade, marker, _ in _PUBLISHED:
        values = reference.published_normalised(agent, starts)
        axes.plot(
            [values[game] for game in rows],
            list(rows.values()),
            marker,
            markerfacecolor='none',
            markeredgecolor=shade,
            markersize=6.5,
            markeredgewidth=1.4,
            label=name,
        )


def _comparable(
    verdicts: Sequence[Verdict], variants: Sequence[Variant]
) -> Iterator[tuple[str, str, list[Series]]]:
    """Suffix of a file, title and series of each kind of starts with comparable scores."""
    for starts, name in _STARTS:
        held = series(verdicts, variants, starts, comparable=True)
        if held:
            yield '' if starts == 'noop' else f'-{starts}', name, held


def profiles(verdicts: Sequence[Verdict], variants: Sequence[Variant]) -> Chart | None:
    """Performance profiles: the share of runs above each normalised score."""
    pictures = [
        drawing.draw(
            f'profile{suffix}',
            f'Share of runs above each human-normalised score, {name}',
            functools.partial(_paint_profiles, held=held, title=name),
        )
        for suffix, name, held in _comparable(verdicts, variants)
    ]
    caption = (
        'Share of runs (each game weighs the same) whose human-normalised score exceeds the value'
        ' on the axis. Higher is better. Bands: 95 % bootstrap interval over seeds, stratified by'
        ' game. Grey: published scores on the same games.'
    )
    return Chart('Performance profile', caption, tuple(pictures)) if pictures else None


def _paint_profiles(axes: Any, held: Sequence[Series], title: str) -> None:
    verdicts = [row.verdict for row in held]
    top = max(float(np.max(score.normalised)) for v in verdicts for score in v.known)
    thresholds = np.linspace(0, max(150.0, 1.1 * min(top, 1000.0)), _PROFILE_POINTS)
    for agent, name, shade, _, line in _PUBLISHED[:2]:
        shares = results.published_profile(agent, verdicts, thresholds)
        axes.step(thresholds, 100 * shares, line, color=shade, linewidth=1.2, label=name)
    for row in held:
        found, shade = results.profile(row.verdict, thresholds), colour(row.index)
        if found is None:
            continue
        axes.step(thresholds, 100 * found.value, _line(row.index), color=shade, label=row.name)
        if found.low is not None and found.high is not None:
            low, high = 100 * found.low, 100 * found.high
            axes.fill_between(
                thresholds, low, high, step='pre', color=shade, alpha=0.16, linewidth=0
            )
    axes.set_title(title)
    axes.set(ylabel='share of runs', ylim=(-3, 103))
    axes.set_xlim(thresholds[0], thresholds[-1])
    _percent_axis(axes)
    axes.locator_params(axis='x', nbins=_MOST_TICKS)
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:.0f} %')
    drawing.legend(axes)


def aggregates(verdicts: Sequence[Verdict], variants: Sequence[Variant]) -> Chart | None:
    """Aggregate scores with their intervals, beside those of DQN and Gorila on the same games."""
    pictures = [
        drawing.draw(
            f'aggregates{suffix}',
            f'Aggregate human-normalised scores with 95 % intervals, {name}',
            functools.partial(_paint_aggregates, held=held, title=name),
            (
                drawing.SIZE_INCHES[0],
                _FRAME_INCHES + len(results.AGGREGATES) * max(0.5, 0.24 * len(held)),
            ),
        )
        for suffix, name, held in _comparable(verdicts, variants)
    ]
    caption = (
        'Aggregates of the human-normalised scores. Lines: 95 % bootstrap interval over seeds,'
        ' stratified by game; none if a game has one seed. Grey: published scores on the same'
        ' games.'
    )
    return Chart('Aggregates', caption, tuple(pictures)) if pictures else None


def _paint_aggregates(axes: Any, held: Sequence[Series], title: str) -> None:
    names = list(results.AGGREGATES)[::-1]
    for agent, name, shade, marker, _ in _PUBLISHED[:2]:
        values = results.published_aggregates(agent, [row.verdict for row in held])
        style = {'markerfacecolor': 'none', 'markeredgecolor': shade, 'markeredgewidth': 1.4}
        axes.plot([values[n] for n in names], range(len(names)), marker, label=name, **style)
    for row, shift in _shifted(held):
        shade = colour(row.index)
        for y, name in enumerate(names):
            found = row.verdict.aggregates[name]
            label = row.name if y == 0 else None
            marker = _marker(row.index)
            axes.plot(found.value, y + shift, marker, color=shade, markersize=6.5, label=label)
            if found.low is not None:
                axes.plot([found.low, found.high], [y + shift] * 2, color=shade)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlim(min(0, axes.get_xlim()[0]))
    axes.set_title(title)
    _percent_axis(axes)
    axes.locator_params(axis='x', nbins=_MOST_TICKS)
    drawing.legend(axes)


# Learning curves.


def learning(variants: Sequence[Variant], axis: curves.Axis, name: str, unit: str) -> Chart | None:
    """Return over an axis, a picture per game; None if no run has games on this axis.

    Args:
      variants: of the report.
      axis: where each training game ended.
      name: of the files, such as 'frames'.
      unit: label of the axis.
    """
    games = sorted({run.game for variant in variants for run in variant.runs if run.episodes})
    pictures = []
    for game in games:
        held = [
            (index, variant, found)
            for index, variant in enumerate(variants)
            if (found := curves.curve(_of(variant, game), axis)) is not None
        ]
        if held:
            pictures.append(
                drawing.draw(
                    f'curve-{name}-{game}',
                    f'Return of {game} during training over {unit}',
                    functools.partial(_paint_curves, held=held, game=game, axis=axis, unit=unit),
                )
            )
    return Chart(f'Return over {unit}', '', tuple(pictures)) if pictures else None


def _of(variant: Variant, game: str) -> list[Run]:
    return [run for run in variant.runs if run.game == game]


def _paint_curves(
    axes: Any,
    held: Sequence[tuple[int, Variant, curves.Curve]],
    game: str,
    axis: curves.Axis,
    unit: str,
) -> None:
    for index, variant, found in held:
        shade = colour(index)
        if len(held) == 1:
            for run in _of(variant, game):
                places = axis(run)
                if places is not None:
                    returns = [episode.raw_return for episode in run.episodes]
                    axes.plot(places, returns, '.', color=drawing.MUTED, markersize=2, alpha=0.35)
        if len(found.runs) > 1:
            axes.plot(found.x, found.runs.T, color=shade, linewidth=0.7, alpha=0.45)
            axes.fill_between(found.x, found.low, found.high, color=shade, alpha=0.16, linewidth=0)
        seeds = f'{len(found.runs)} seeds' if len(found.runs) > 1 else '1 seed'
        label = f'{variant.key} ({seeds})'
        axes.plot(found.x, found.mean, _line(index), color=shade, label=label)
        if axis is curves.frames:
            _paint_evaluations(axes, _of(variant, game), shade)
    axes.set_title(reference.title(game))
    axes.set(xlabel=unit, ylabel='return (game score)')
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_engineering)
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:,g}'.replace('-', '−'))
    drawing.legend(axes)


def _paint_evaluations(axes: Any, runs: Sequence[Run], shade: str) -> None:
    """Evaluations during training as hollow points, that at the end as a diamond."""
    for run in runs:
        during = [(row.frames, row.mean) for row in run.curve]
        if during:
            axes.plot(*zip(*during), 'o', color=shade, markersize=3.5, markerfacecolor='none')
        if row := final(run):
            axes.plot(run.frames, row.mean, 'D', color=shade, markersize=5.5, clip_on=False)


def final(run: Run) -> Evaluation | None:
    """The evaluation at the end of training, None: not yet."""
    return next((row for row in run.evaluations if row.file == EVALUATION_FILE), None)


def _engineering(value: float, _: Any = None) -> str:
    for size, sign in ((1e9, ' G'), (1e6, ' M'), (1e3, ' k')):
        if abs(value) >= size:
            return f'{value / size:g}{sign}'
    return f'{value:g}'


# What the run did, over its minutes.


def scalars(title: str, caption: str, variants: Sequence[Variant], specs: Specs) -> Chart:
    """All runs over minutes of training, a picture per scalar; names those that stay zero.

    Args:
      title, caption: of the chart.
      variants: of the report.
      specs: of the scalars; the lines of boxes share a picture.
    """
    runs = [(index, run) for index, variant in enumerate(variants) for run in variant.runs]
    pictures, zero = [], []
    for tag, name, unit in specs:
        lines = [(i, run, run.scalar(held)) for i, run in runs for held in _matching(run, tag)]
        if not any(rows[:, 2].any() for _, _, rows in lines):
            zero += [name] if lines else []
            continue
        paint = functools.partial(
            _paint_scalar, lines=lines, variants=variants, title=name, unit=unit
        )
        pictures.append(drawing.draw(f'scalar-{_file_name(tag)}', f'{name} over minutes', paint))
    stays = f' Zero throughout: {", ".join(zero)}.' if zero else ''
    return Chart(title, caption + stays, tuple(pictures))


def _matching(run: Run, tag: str) -> list[str]:
    """The run's tags that a spec's `tag` stands for."""
    pattern = re.escape(tag).replace(r'\{n\}', r'\d+').replace(r'\{box\}', r'[a-z_]+_\d+')
    held = {name for session in run.sessions for name in session.scalars}
    return sorted(name for name in held if re.fullmatch(pattern, name))


def _file_name(tag: str) -> str:
    return tag.replace('_{n}', 's').replace('{box}', 'boxes').replace('/', '-')


def _paint_scalar(
    axes: Any,
    lines: Sequence[tuple[int, Run, np.ndarray]],
    variants: Sequence[Variant],
    title: str,
    unit: str,
) -> None:
    seen: set[int] = set()
    for index, run, rows in lines:
        spent = curves.spent_minutes(run)
        if spent is not None:
            label = None if index in seen else variants[index].key
            seen.add(index)
            axes.plot(
                spent(rows[:, 1]),
                rows[:, 2],
                _line(index),
                color=colour(index),
                linewidth=1.1,
                label=label,
            )
    axes.set_title(title)
    axes.set(xlabel='minutes of training', ylabel=unit or title)
    axes.set_xlim(left=0)
    if all((rows[:, 2] >= 0).all() for _, _, rows in lines):
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_engineering)
    if len(variants) > 1:
        drawing.legend(axes)


def learner_tags(variants: Sequence[Variant]) -> Specs:
    """(tag, title, unit) of the learners' own figures."""
    tags = {
        tag
        for variant in variants
        for run in variant.runs
        for session in run.sessions
        for tag in session.scalars
        if tag.startswith(('learner/', 'actor/'))
    }
    names = sorted(tags - {'learner/outlier_share'})[:_LEARNER_TAGS]
    return [(tag, tag.partition('/')[2].replace('_', ' '), '') for tag in names]


def staleness(variants: Sequence[Variant]) -> Picture | None:
    """Distribution of staleness over all runs of each variant, from the summaries."""
    held = []
    for index, variant in enumerate(variants):
        bins = [run.summary.staleness for run in variant.runs if run.summary.staleness]
        if any(sum(found.values()) for found in bins):
            held.append((index, variant, bins))
    if not held:
        return None
    return drawing.draw(
        'staleness-histogram',
        'Share of gradients by staleness',
        lambda axes: _paint_staleness(axes, held),
    )


def _paint_staleness(
    axes: Any, held: Sequence[tuple[int, Variant, list[Mapping[str, int]]]]
) -> None:
    names = list(dict.fromkeys(n for _, _, bins in held for found in bins for n in found))
    width = 0.8 / len(held)
    for place, (index, variant, bins) in enumerate(held):
        totals = np.array([sum(found.get(name, 0) for found in bins) for name in names])
        at = np.arange(len(names)) + (place - (len(held) - 1) / 2) * width
        shares = 100 * totals / totals.sum()
        axes.bar(at, shares, width, color=colour(index), label=variant.key)
    axes.set_xticks(range(len(names)), [n.replace('above ', '>') for n in names], rotation=45)
    axes.set_title('staleness')
    axes.set(xlabel='updates, up to', ylabel='share of gradients')
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:.0f} %')
    axes.grid(visible=False, axis='x')
    if len(held) > 1:
        drawing.legend(axes)
