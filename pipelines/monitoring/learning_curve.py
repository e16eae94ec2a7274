"""The learning curve of a run: its games and evaluations in, a picture out."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from infra.disk import read_json_lines, write_atomically
from pipelines.events import finite
from pipelines.monitoring.episodes import RETURN_WINDOW, Episode, read_episodes
from pipelines.storage import provenance
from pipelines.storage.run_directory import RunDirectory

_INCHES = (8.0, 7.0)
_DOTS_PER_INCH = 120
_LEAST_HALF_WIDTH = 5  # games
_UNITS = {'frames': 'emulator frames', 'steps': 'steps'}
AXES = {'frames': _UNITS['frames'], 'updates': 'updates', 'minutes': 'minutes of training'}
"""The horizontal axes, by the names of a point's coordinates, and their labels."""
_LAYOUT = [['frames', 'frames'], ['updates', 'minutes']]

Start = tuple[float, float]
"""When a launch began (seconds since 1970), and the seconds trained before it."""
Points = Mapping[str, np.ndarray]
"""Coordinates [points] of games or evaluations, by the names of `AXES`."""


def smoothed(values: Sequence[float] | np.ndarray, window: int = RETURN_WINDOW) -> np.ndarray:
    """Centred moving mean float64 [N] of values [N] in the order of the horizontal axis.

    The mean at i is that of the values i - h to i + h. The half-width h grows with the distance to
    the nearer end, from 5 to the lesser of `window` / 2 and N / 10, so that the mean does not lag
    behind a trend as that of the last `window` values does. Within 5 values of an end the range is
    cut off there.
    """
    values = np.asarray(values, np.float64)
    index = np.arange(len(values))
    to_end = np.minimum(index, index[::-1])
    widest = min(window // 2, len(values) // 10)
    half = np.maximum(np.minimum(to_end, widest), _LEAST_HALF_WIDTH)
    begin, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[end] - sums[begin]) / (end - begin)


def starts(launches: Iterable[Mapping[str, Any]]) -> list[Start]:
    """The readable starts and resumes of a run, from lines of `launches.jsonl`."""
    timed = [(provenance.launched_at(row), row) for row in launches]
    return [
        (time, finite(row.get('wall_seconds')) or 0.0) for time, row in timed if time is not None
    ]


def training_minutes(
    times: Sequence[float] | np.ndarray,
    launches: Sequence[Start],
    weights: Sequence[float] | None = None,
) -> np.ndarray:
    """Minutes that a run had trained at moments, without the pauses before its resumes.

    Args:
      times: seconds since 1970, float [N].
      launches: of the run, in order; without any (a run of an earlier version) the minutes count
        from the first moment.
      weights: factor of the minutes of each launch, such as its cores; None: 1.

    Returns:
      float64 [N].
    """
    times = np.asarray(times, np.float64)
    if not launches:
        return (times - times.min(initial=np.inf)) / 60.0
    begun, before = np.array(launches, np.float64).T
    factors = np.ones(len(begun)) if weights is None else np.asarray(weights, np.float64)
    earlier = np.cumsum(np.concatenate([factors[:1] * before[:1], factors[:-1] * np.diff(before)]))
    launch = np.maximum(np.searchsorted(begun, times, side='right') - 1, 0)
    seconds = earlier[launch] + factors[launch] * (times - begun[launch])
    return np.maximum(seconds, 0.0) / 60.0


def draw_learning_curve(
    directory: RunDirectory,
    title: str,
    evaluation: Mapping[str, Any] | None = None,
    end: Mapping[str, float] | None = None,
    unit: str = 'frames',
) -> None:
    """Draws `learning_curve.png`: return over frames, and smaller over updates and minutes.

    Args:
      directory: of the run; its `episodes.jsonl`, `evaluations.jsonl` and `launches.jsonl` are
        read, the latter two if they exist.
      title: of the figure.
      evaluation: the summary's `evaluation`, of which `mean`, `std`, `episodes` are drawn.
      end: coordinates of the evaluation, by the names of `AXES`; None: those of the last game.
      unit: of the budget, see `EnvironmentConfig.unit`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(read_episodes(directory.episodes_file))
    games = _games(rows, provenance.launches(directory.launches_file))
    returns = np.array([row.raw_return for row in rows], np.float64)
    evaluations = _evaluations(read_json_lines(directory.evaluations_file))
    final = _final(evaluation, {name: x.max(initial=0.0) for name, x in games.items()}, end)
    figure = Figure(figsize=_INCHES, dpi=_DOTS_PER_INCH, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    panels: dict[Any, Any] = figure.subplot_mosaic(_LAYOUT, height_ratios=(3, 2))
    for name, axes in panels.items():
        _draw(axes, games[name], returns)
        _draw_evaluations(axes, name, evaluations, final)
        axes.set(
            xlabel=_UNITS[unit] if name == 'frames' else AXES[name],
            ylabel='return (raw game score)',
        )
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    panels['frames'].set_title(title)
    panels['frames'].legend(loc='best')
    _write(canvas, directory)


def _write(canvas: Any, directory: RunDirectory) -> None:
    picture = io.BytesIO()
    canvas.print_png(picture)
    write_atomically(directory.learning_curve_file, picture.getvalue())


def _games(rows: Sequence[Episode], launches: Sequence[Mapping[str, Any]]) -> Points:
    return {
        'frames': np.array([row.frames for row in rows], np.float64),
        'updates': np.array([row.updates for row in rows], np.float64),
        'minutes': training_minutes([row.time for row in rows], starts(launches)),
    }


def _evaluations(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Coordinates, mean, standard deviation and `best` of each readable evaluation."""
    found = []
    for row in rows:
        seconds = finite(row.get('wall_seconds'))
        point = {name: finite(row.get(name)) for name in ('frames', 'updates', 'mean', 'std')}
        if seconds is not None and None not in point.values():
            found.append({**point, 'minutes': seconds / 60.0, 'best': row.get('best') is True})
    return found  # type: ignore[return-value]


def _final(
    evaluation: Mapping[str, Any] | None,
    last_game: Mapping[str, float],
    end: Mapping[str, float] | None,
) -> dict[str, Any] | None:
    """The final evaluation with its coordinates, None without a result."""
    if evaluation is None or evaluation['mean'] is None:
        return None
    return {**last_game, **(end or {}), **evaluation}


def _draw(axes: Any, positions: np.ndarray, returns: np.ndarray) -> None:
    """Draws the games and their mean."""
    order = np.argsort(positions, kind='stable')
    positions, returns = positions[order], returns[order]
    axes.plot(positions, returns, '.', color='0.7', markersize=3, label='training game')
    label = f'mean of up to {RETURN_WINDOW} games around'
    axes.plot(positions, smoothed(returns), color='C0', label=label)


def _draw_evaluations(
    axes: Any,
    name: str,
    evaluations: Sequence[Mapping[str, float]],
    final: Mapping[str, Any] | None,
) -> None:
    """Draws the evaluations during training, the best marked, and the final one."""
    if evaluations:
        positions, means, deviations = (
            [row[key] for row in evaluations] for key in (name, 'mean', 'std')
        )
        style = {'fmt': 'o-', 'color': 'C1', 'markersize': 4, 'elinewidth': 0.8, 'capsize': 2}
        axes.errorbar(positions, means, yerr=deviations, label='evaluation in training', **style)
    if best := [row for row in evaluations if row['best']]:
        style = {'color': 'C1', 'markersize': 13, 'label': 'best in training'}
        axes.plot(best[-1][name], best[-1]['mean'], '*', **style)
    if final is not None:
        games = f'{final["episodes"]} game{"s" * (final["episodes"] != 1)}'
        label = f'final evaluation: {final["mean"]:.1f} ({games})'
        style = {'fmt': 'D', 'color': 'C3', 'capsize': 4}
        axes.errorbar(final[name], final['mean'], yerr=final['std'], label=label, **style)
