"""What the monitor writes down: episodes as JSON lines, scalars for TensorBoard, a learning curve.

In: plain numbers. Out: files that survive a kill at any moment and go on after a resume. TensorFlow
is not imported: TensorBoard's own record writer needs none.
"""

import dataclasses
import io
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.files import write_atomically

_FIELDS = ('episode', 'frames', 'updates', 'raw_return')
"""Fields without which a line of `episodes.jsonl` is of no use."""

_CURVE_INCHES = (8.0, 4.5)
_CURVE_DOTS_PER_INCH = 120
REMEMBERED_EPISODES = 10_000
"""Latest episodes by which a repeated event is known."""
RETURN_WINDOW = 100
"""Episodes in the running mean return (the contract's `mean_return_100`)."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """One line of `episodes.jsonl`.

    Attributes:
      episode: its number in the run, from 1.
      time: when it was recorded, seconds since 1970.
      frames: emulator frames of the whole run by then; the learning curve's x axis.
      updates: global updates by then.
      raw_return: sum of the game's own rewards.
      clipped_return: sum of the rewards as the learner sees them; None: not told.
      agent_steps: its length; None: not told.
      worker: the actor that played it.
      epsilon: share of its actions drawn at random, as it was at its end; None: not told.
    """

    episode: int
    time: float
    frames: int
    updates: int
    raw_return: float
    clipped_return: float | None
    agent_steps: int | None
    worker: int
    epsilon: float | None = None

    @property
    def identity(self) -> tuple:
        """Equal for a repeat of the same event; two real episodes differ at least in time."""
        return self.worker, self.time, self.raw_return, self.agent_steps


def read_episodes(path: pathlib.Path) -> Iterator[Episode]:
    """The episodes of a file; lines that were torn by a kill are left out."""
    try:
        file = path.open(encoding='utf-8', errors='replace')
    except FileNotFoundError:
        return
    with file:
        for line in file:
            episode = _parse(line)
            if episode is not None:
                yield episode


def _parse(line: str) -> Episode | None:
    try:
        row = json.loads(line)
        if not all(_is_number(row[name]) for name in _FIELDS):
            return None
        names = (field.name for field in dataclasses.fields(Episode))
        optional = {'time': 0.0, 'worker': 0}
        return Episode(**{name: row.get(name, optional.get(name)) for name in names})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class EpisodeLog:
    """`episodes.jsonl`, open for appending; each line is handed to the kernel as it is written."""

    def __init__(self, path: pathlib.Path, resume_frames: int | None = None):
        """Opens the file of a new run (`resume_frames` None), or goes on with an old one.

        A run goes on from its checkpoint, so episodes after the checkpoint's `resume_frames` were
        played by parameters that are lost: they are dropped, as are torn lines, and do not
        stand in the curve beside those that replace them. `kept` are the latest of the others.
        """
        kept = [] if resume_frames is None else list(read_episodes(path))
        kept = [row for row in kept if row.frames <= (resume_frames or 0)]
        self.count = len(kept)
        self.kept = tuple(kept[-REMEMBERED_EPISODES:])
        write_atomically(path, ''.join(_line(row) for row in kept))
        self._file = path.open('a', encoding='utf-8', buffering=1)

    def append(self, episode: Episode) -> None:
        self._file.write(_line(episode))
        self.count += 1

    def close(self) -> None:
        self._file.close()


def _line(episode: Episode) -> str:
    return json.dumps(dataclasses.asdict(episode)) + '\n'


class ScalarWriter:
    """Writes scalars as a TensorBoard event file; the step is the run's emulator frames."""

    def __init__(self, directory: pathlib.Path, start_step: int = 0):
        """Makes a new event file; TensorBoard then hides older events from `start_step` on."""
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer import record_writer

        self._event_pb2, self._summary_pb2 = event_pb2, summary_pb2
        name = f'events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}'
        self._file = (directory / name).open('xb')
        self._records = record_writer.RecordWriter(self._file)
        # 'brain.Event:2' is the mark by which TensorBoard knows the format.
        self._write(event_pb2.Event(wall_time=time.time(), file_version='brain.Event:2'))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(wall_time=time.time(), step=start_step, session_log=start))
        self.flush()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())

    def write(self, step: int, scalars: Mapping[str, float | None], when: float) -> None:
        """Writes the scalars that are not None at `step` frames, `when` seconds since 1970."""
        values = [
            self._summary_pb2.Summary.Value(tag=tag, simple_value=value)
            for tag, value in scalars.items()
            if value is not None
        ]
        if values:
            summary = self._summary_pb2.Summary(value=values)
            self._write(self._event_pb2.Event(wall_time=when, step=step, summary=summary))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def running_mean(values: Sequence[float], window: int = RETURN_WINDOW) -> list[float]:
    """Mean of the last `window` values at each value (of all so far while there are fewer)."""
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
    """Draws return over frames: each episode, the running mean of 100, the final evaluation.

    Args:
      episodes_file: the run's `episodes.jsonl`.
      target: the PNG file to write.
      title: above the curve.
      evaluation: the summary's `evaluation` (its `mean`, `std`, `episodes` are drawn), or None.
      frames: where on the x axis the evaluation stands; None: at the last episode.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(read_episodes(episodes_file))
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
    """A point at `frames` with the evaluation's mean, and a bar of its standard deviation."""
    axes.errorbar(
        frames,
        evaluation['mean'],
        yerr=evaluation['std'],
        fmt='D',
        color='C3',
        capsize=4,
        label=f'evaluation: {evaluation["mean"]:.1f} ({evaluation["episodes"]} episodes)',
    )
