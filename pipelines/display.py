"""Shows the run: a live table in a terminal, one plain line now and then when piped.

In: `RunState`s and the names of phases. Out: text on a stream. Nothing here is needed to train.
"""

import contextlib
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

from pipelines.monitor import RunState

COLUMNS = 80
"""The display is made for a terminal at least this wide, and never wider."""

_REFRESHES_PER_SECOND = 2.0
_PLAIN_INTERVAL_SECONDS = 10.0
_NOT_YET = '-'
_SHOW_CURSOR = b'\x1b[?25h\n'
_CELL_COLUMNS = 24
_GAP = 2


class Display:
    """How a run is shown; a context manager, since it may hold the terminal."""

    def update(self, state: RunState) -> None:
        """Shows the run's present state; cheap enough to be called every second."""
        raise NotImplementedError

    def phase(self, text: str) -> None:
        """Says what the run is doing: 'starting servers', 'filling replay 1200/5000', ..."""
        raise NotImplementedError

    def message(self, text: str) -> None:
        """Prints a line that stays, such as 'actor 0 restarted'."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives the terminal back. Repeated calls do nothing."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Gives the cursor back without waiting for anything: for a handler about to `_exit`."""

    def __enter__(self) -> 'Display':
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_display(
    stream: TextIO | None = None, interval_seconds: float = _PLAIN_INTERVAL_SECONDS
) -> Display:
    """A `LiveDisplay` on a terminal, else a `PlainDisplay` with a line every `interval_seconds`.

    The terminal `stream` (default: standard output) must know Unicode and move its cursor.
    """
    stream = sys.stdout if stream is None else stream
    frames_drawn = (stream.encoding or '').lower().startswith('utf')
    if stream.isatty() and frames_drawn and os.environ.get('TERM', 'dumb') != 'dumb':
        return LiveDisplay(stream)
    return PlainDisplay(stream, interval_seconds)


class PlainDisplay(Display):
    """Lines for a log: each new phase at once, the state every `interval_seconds`."""

    def __init__(
        self,
        stream: TextIO,
        interval_seconds: float = _PLAIN_INTERVAL_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ):
        self._stream, self._interval, self._monotonic = stream, interval_seconds, monotonic
        self._started = monotonic()
        self._due = self._started
        self._kind = self._text = ''
        self._state: RunState | None = None
        self._shown: RunState | None = None

    def update(self, state: RunState) -> None:
        self._state = state
        if self._monotonic() >= self._due:
            self._print_state()

    def phase(self, text: str) -> None:
        kind = re.sub(r'\d+', '#', text)
        self._text = text
        # 'filling replay 1200/5000' and '... 1300/5000' are one phase: the second may wait.
        if kind == self._kind and self._monotonic() < self._due:
            return
        if kind == self._kind and self._state is not self._shown:
            self._print_state()  # a caller that says its phase before each update shows both
            return
        self._kind = kind
        self._print(text)
        self._due = self._monotonic() + self._interval

    def message(self, text: str) -> None:
        self._print(text)

    def close(self) -> None:
        if self._state is not self._shown:
            self._print_state()

    def _print_state(self) -> None:
        if self._state is not None:
            self._print(state_line(self._state, self._text))
        self._shown = self._state
        self._due = self._monotonic() + self._interval

    def _print(self, text: str) -> None:
        state = self._state
        seconds = state.wall_seconds if state else self._monotonic() - self._started
        encoding = self._stream.encoding or 'utf-8'
        text = text.encode(encoding, 'backslashreplace').decode(encoding)
        try:
            print(f'[{duration(seconds)}] {text}', file=self._stream, flush=True)
        except BrokenPipeError:
            # Nobody reads any more (`run.py | head`): no reason to end a training run, nor to
            # fail when the interpreter flushes the stream at exit.
            self._stream = pathlib.Path(os.devnull).open('w')  # noqa: SIM115
            with contextlib.suppress(OSError, ValueError):
                os.dup2(self._stream.fileno(), sys.stdout.fileno())


class LiveDisplay(Display):
    """A panel, redrawn in place."""

    def __init__(self, stream: TextIO, monotonic: Callable[[], float] = time.monotonic):
        from rich import console, live

        self._stream, self._monotonic = stream, monotonic
        self._started = monotonic()
        self._text = 'starting'
        self._state: RunState | None = None
        self._state_at = self._started
        self._console = console.Console(file=stream)
        self._live = live.Live(
            get_renderable=self._panel,
            console=self._console,
            refresh_per_second=_REFRESHES_PER_SECOND,
            vertical_overflow='crop',
        )
        self._live.start()

    def update(self, state: RunState) -> None:
        self._state, self._state_at = state, self._monotonic()

    def phase(self, text: str) -> None:
        self._text = text

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal itself may be gone
            self._live.stop()

    def abandon(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            os.write(self._stream.fileno(), _SHOW_CURSOR)

    def _panel(self) -> Any:
        state, now = self._state, self._monotonic()
        if state is None:
            return panel(None, self._text, now - self._started, self._console.width)
        # The clock goes on between two states, so that a busy launcher does not look dead.
        seconds = state.wall_seconds + now - self._state_at
        return panel(state, self._text, seconds, self._console.width)


def panel(state: RunState | None, phase: str, seconds: float, width: int = COLUMNS) -> Any:
    """The live display as a rich renderable.

    Args:
      state: the run; None: nothing is known yet.
      phase: what it is doing.
      seconds: since its launch.
      width: columns of the terminal; at most `COLUMNS` are used.
    """
    from rich import box, console, panel, text

    width = min(width, COLUMNS)
    head = text.Text(f'{duration(seconds)}  ', style='dim')
    head.append(phase, style='bold yellow' if phase != 'training' else 'bold green')
    rows = [head]
    title = 'Gorila on Beam'
    if state is not None:
        title += f' · {state.game} · {state.preset}'
        rows += [_progress(state, width - 4), text.Text(''), _figures(state, width - 4)]
    return panel.Panel(
        console.Group(*rows),
        box=box.ROUNDED,
        title=f'[bold]{title}[/bold]',
        title_align='left',
        width=width,
        border_style='cyan',
    )


def _progress(state: RunState, width: int) -> Any:
    """`frames 1,234,567 / 4,000,000  ━━━━━━━  31 %  ETA 1:02:03`, as wide as `width`."""
    from rich import progress_bar, table

    grid = table.Table.grid(padding=(0, 2, 0, 0))
    share = min(1.0, state.frames / state.max_frames)
    left = f'frames [bold]{state.frames:,}[/bold] / {state.max_frames:,}'
    eta = _NOT_YET if state.eta_seconds is None else duration(state.eta_seconds)
    right = f'{share:4.0%}  ETA {eta:>7}'
    used = len(f'frames {state.frames:,} / {state.max_frames:,}') + len(right) + 2 * 2
    bar = progress_bar.ProgressBar(total=1.0, completed=share, width=max(4, width - used))
    grid.add_row(left, bar, right)
    return grid


def _figures(state: RunState, width: int) -> Any:
    """The figures in aligned columns (as many as fit into `width`), rejections on a last line."""
    from rich import text

    cells = (
        ('frames/s', _number(state.frames_per_second, '.0f')),
        ('updates', f'{state.updates:,}'),
        ('episodes', f'{state.episodes:,}'),
        ('replay', _number(state.replay_size, ',')),
        ('updates/s', _number(state.updates_per_second, '.1f')),
        ('mean return 100', _number(state.mean_return_100, '.2f')),
        ('samples/insert', _number(state.samples_per_insert, '.2f')),
        ('epsilon', _number(state.epsilon, '.3f')),
        ('last return', _number(state.last_return, '.1f')),
    )
    columns = max(1, min(3, (width + _GAP) // (_CELL_COLUMNS + _GAP)))
    cell_width = (width + _GAP) // columns - _GAP
    lines = text.Text()
    for index, (label, value) in enumerate(cells):
        if index:
            lines.append(' ' * _GAP if index % columns else '\n')
        lines.append(label, style='dim')
        lines.append(f'{value:>{max(1, cell_width - len(label))}}', style='bold')
    lines.append('\nrejected', style='dim')
    for reason, count in state.rejected.items():
        lines.append(f'  {count:,}', style='bold' if count else '')
        lines.append(f' {reason}', style='dim')
    if any(state.restarts.values()):
        lines.append('  restarts', style='dim')
        lines.append(f'  {sum(state.restarts.values())}', style='bold red')
    return lines


def state_line(state: RunState, phase: str = '') -> str:
    """The state on one line, for a log."""
    rejected = ', '.join(f'{count} {reason}' for reason, count in state.rejected.items())
    eta = _NOT_YET if state.eta_seconds is None else duration(state.eta_seconds)
    parts = [
        f'frames {state.frames:,}/{state.max_frames:,}'
        f' ({_number(state.frames_per_second, ".0f")}/s)',
        f'updates {state.updates:,} ({_number(state.updates_per_second, ".1f")}/s)',
        f'episodes {state.episodes:,}',
        f'return {_number(state.mean_return_100, ".2f")}',
        f'epsilon {_number(state.epsilon, ".3f")}',
        f'replay {_number(state.replay_size, ",")}',
        f'rejected {rejected}',
        f'eta {eta}',
    ]
    if any(state.restarts.values()):
        parts.insert(-1, f'restarts {sum(state.restarts.values())}')
    return ' | '.join(([phase] if phase else []) + parts)


def duration(seconds: float) -> str:
    """`1:02:03`, days as hours."""
    minutes, second = divmod(int(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f'{hours}:{minute:02d}:{second:02d}'


def _number(value: float | None, form: str) -> str:
    return _NOT_YET if value is None else format(value, form)
