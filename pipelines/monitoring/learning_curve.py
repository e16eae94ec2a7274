"""The learning curve of a run: its games in, a picture out."""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from infra.disk import write_atomically
from pipelines.monitoring.episodes import RETURN_WINDOW, read_episodes

_CURVE_INCHES = (8.0, 4.5)
_CURVE_DOTS_PER_INCH = 120


def running_mean(values: Sequence[float], window: int = RETURN_WINDOW) -> list[float]:
    """Mean of the last `window` values (or all, if fewer) at each value."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means


def draw_learning_curve(
    episodes_file: pathlib.Path,
    target: pathlib.Path,
    title: str,
    evaluation: Mapping[str, Any] | None = None,
    frames: int | None = None,
) -> None:
    """Draws return over frames: episodes, their running mean, the final evaluation.

    Args:
      episodes_file: the run's `episodes.jsonl`.
      target: the PNG file to write.
      title: of the figure.
      evaluation: the summary's `evaluation`, of which `mean`, `std`, `episodes` are drawn.
      frames: x position of the evaluation; None: that of the last episode.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(read_episodes(episodes_file), key=lambda row: row.frames)
    steps = [row.frames for row in rows]
    returns = [row.raw_return for row in rows]
    figure = Figure(figsize=_CURVE_INCHES, dpi=_CURVE_DOTS_PER_INCH, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, returns, '.', color='0.7', markersize=3, label='training episode')
    axes.plot(steps, running_mean(returns), color='C0', label=f'mean of {RETURN_WINDOW} episodes')
    if evaluation is not None and evaluation['mean'] is not None:
        _draw_evaluation(axes, evaluation, max(steps, default=0) if frames is None else frames)
    axes.set(title=title, xlabel='emulator frames', ylabel='return (raw game score)')
    axes.grid(alpha=0.3)
    axes.legend(loc='best')
    picture = io.BytesIO()
    canvas.print_png(picture)
    write_atomically(target, picture.getvalue())


def _draw_evaluation(axes: Any, evaluation: Mapping[str, Any], frames: int) -> None:
    """Draws the evaluation's mean at `frames`, with its standard deviation as error bar."""
    axes.errorbar(
        frames,
        evaluation['mean'],
        yerr=evaluation['std'],
        fmt='D',
        color='C3',
        capsize=4,
        label=f'evaluation: {evaluation["mean"]:.1f} ({evaluation["episodes"]} episodes)',
    )
