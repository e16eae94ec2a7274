"""Shows the run: a live table in a terminal, a line every 10 s in a pipe.

In: `RunState`s and names of phases. Out: text on a stream. Training does not depend on it.
"""

import contextlib
import dataclasses
import os
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TextIO

from infra.output import last_words
from pipelines.monitoring.run_state import RunState

COLUMNS = 80
"""Greatest width of the display."""

ENDED = 'ended'
"""The last phase."""

Renderer = Callable[[RunState | None, str, float, int, int], Any]
"""Draws like `panel`: state, phase, seconds, columns and lines in, a rich renderable out."""

_REFRESHES_PER_SECOND = 2.0
_PLAIN_INTERVAL_SECONDS = 10.0
_NOT_YET = '-'
_SHOW_CURSOR = '\x1b[?25h\n'
_CELL_COLUMNS = 24
_GAP = 2
_LEAST_BAR_COLUMNS = 4
_FRAME_COLUMNS = 4  # the panel's borders and padding
_LEAST_COLUMNS = 30  # for a panel; a narrower terminal shows one line
_LEAST_LINES = 3
_LINES = 24  # if the terminal does not report its size
_CLOSE_SECONDS = 2.0


class Display:
    """Shows a run; a context manager, since it may control the terminal."""

    _stream: TextIO
    _text = ''
    _state: RunState | None = None

    def update(self, state: RunState) -> None:
        """Shows the run's state; cheap enough for a call per second."""
        raise NotImplementedError

    def phase(self, text: str) -> None:
        """Shows what the run is doing: 'starting servers', 'filling replay 1200/5000', ..."""
        raise NotImplementedError

    def message(self, text: str) -> None:
        """Prints a permanent line, such as 'actor 0 restarted'."""
        raise NotImplementedError

    def end(self, state: RunState | None = None) -> None:
        """Shows that the run has ended, with its last state (default: the last shown)."""
        last = state or self._state
        self._state = last and dataclasses.replace(last, eta_seconds=None)  # nothing is left
        self._text = ENDED

    def close(self) -> None:
        """Ends the display and restores the terminal. Repeated calls do nothing."""
        if self._text != ENDED:
            self.end()

    def abandon(self, text: str) -> None:
        """Prints a last line from a signal handler before `_exit`; restores the cursor."""
        last_words(self._stream, f'{text}\n')

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
    stream: TextIO | None = None,
    interval_seconds: float = _PLAIN_INTERVAL_SECONDS,
    render: Renderer | None = None,
) -> Display:
    """A `LiveDisplay` on a terminal, else a `PlainDisplay` with a line every `interval_seconds`.

    `render` draws the live display; None: `panel`.

    The terminal `stream` (default: standard output) must support Unicode and cursor movement. Its
    errors are not caught here: see `infra/output.py`.
    """
    stream = sys.stdout if stream is None else stream
    frames_drawn = (stream.encoding or '').lower().startswith('utf')
    if stream.isatty() and frames_drawn and os.environ.get('TERM', 'dumb') != 'dumb':
        return LiveDisplay(stream, render=render)
    return PlainDisplay(stream, interval_seconds)


class Clock:
    """Seconds since a run's launch, earlier sessions included.

    Unlike a state's `wall_seconds`, it includes the evaluation.
    """

    def __init__(self, monotonic: Callable[[], float]):
        self._monotonic, self._started, self._before = monotonic, monotonic(), 0.0

    def __call__(self) -> float:
        return self._before + self._monotonic() - self._started

    def record(self, state: RunState) -> None:
        """Adds the length of the earlier sessions, which a state contains."""
        self._before += max(0.0, state.wall_seconds - self())


class PlainDisplay(Display):
    """Lines for a log: each new phase at once, the state every `interval_seconds`."""

    def __init__(
        self,
        stream: TextIO,
        interval_seconds: float = _PLAIN_INTERVAL_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ):
        self._stream, self._interval, self._monotonic = stream, interval_seconds, monotonic
        self._clock = Clock(monotonic)
        self._due = monotonic()
        self._kind = ''
        self._shown: RunState | None = None

    def update(self, state: RunState) -> None:
        self._state = state
        self._clock.record(state)
        if self._monotonic() >= self._due:
            self._print_state()

    def phase(self, text: str) -> None:
        kind = re.sub(r'\d+', '#', text)
        self._text = text
        # 'filling replay 1200/5000' and '... 1300/5000' are one phase: the second can wait.
        if kind == self._kind and self._monotonic() < self._due:
            return
        if kind == self._kind and self._state is not self._shown:
            self._print_state()  # a caller that sets its phase before each update shows both
            return
        self._kind = kind
        self._print(text)
        self._due = self._monotonic() + self._interval

    def message(self, text: str) -> None:
        self._print(text)

    def end(self, state: RunState | None = None) -> None:
        super().end(state)
        if self._state is None:
            self._print(ENDED)
        self._print_state()

    def _print_state(self) -> None:
        if self._state is not None:
            self._print(state_line(self._state, self._text))
        self._shown = self._state
        self._due = self._monotonic() + self._interval

    def _print(self, text: str) -> None:
        encoding = self._stream.encoding or 'utf-8'
        text = text.encode(encoding, 'backslashreplace').decode(encoding)
        print(f'[{duration(self._clock())}] {text}', file=self._stream, flush=True)


class LiveDisplay(Display):
    """A panel, redrawn in place by a thread."""

    def __init__(
        self,
        stream: TextIO,
        monotonic: Callable[[], float] = time.monotonic,
        render: Renderer | None = None,
    ):
        """`render` is called by that thread; None: `panel`."""
        from rich import console

        self._stream = stream
        self._render = render or panel
        self._clock = Clock(monotonic)
        self._text = 'starting'
        self._console = console.Console(file=stream)
        self._set_size(terminal_size(stream))
        self._start()
        self._drawing = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._redraw, name='display', daemon=True)
        self._thread.start()

    def update(self, state: RunState) -> None:
        self._state = state
        self._clock.record(state)

    def phase(self, text: str) -> None:
        self._text = text

    def message(self, text: str) -> None:
        with self._drawing:
            self._fit()
            lines = '\n'.join(wrapped(text, self._console.width))
            self._console.print(lines, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        super().close()
        if not self._closed.is_set():
            self._closed.set()
            self._thread.join(_CLOSE_SECONDS)
            self._draw()
            self._live.stop()

    def abandon(self, text: str) -> None:
        super().abandon(f'{_SHOW_CURSOR}{text}')

    def _start(self) -> None:
        """Starts drawing at the cursor."""
        from rich import live

        self._live = live.Live(
            get_renderable=self._panel,
            console=self._console,
            auto_refresh=False,
            vertical_overflow='crop',
        )
        self._live.start(refresh=True)

    def _set_size(self, size: tuple[int, int]) -> None:
        from rich import console

        # By itself, rich asks other streams and trusts an outdated COLUMNS.
        self._console.size = console.ConsoleDimensions(*size)

    def _redraw(self) -> None:
        while not self._closed.wait(1.0 / _REFRESHES_PER_SECOND):
            self._draw()

    def _draw(self) -> None:
        with self._drawing:
            self._fit()
            self._live.refresh()

    def _fit(self) -> None:
        """Adapts to the terminal's current size."""
        size = terminal_size(self._stream)
        narrower = size[0] < min(COLUMNS, self._console.width)
        self._set_size(size)
        if narrower and self._live.is_started:
            self._make_room(size[1])

    def _make_room(self, lines: int) -> None:
        """Clears a terminal that has become narrower by scrolling, and redraws.

        Terminals wrap or cut the panel's lines, so its first line is at an unknown position.
        """
        self._live.stop()
        self._stream.write(f'\x1b[{lines}H' + '\n' * lines + '\x1b[H')
        self._start()

    def _panel(self) -> Any:
        return self._render(self._state, self._text, self._clock(), *self._console.size)


def terminal_size(stream: TextIO) -> tuple[int, int]:
    """Columns and lines of the terminal behind a stream; a default if it does not report them."""
    with contextlib.suppress(OSError, ValueError):
        columns, lines = os.get_terminal_size(stream.fileno())
        if columns and lines:
            return columns, lines
    return COLUMNS, _LINES


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns; longer words, such as paths, stay whole for copying."""
    lines: list[str] = []
    for line in text.splitlines():
        indent = ' ' * (len(line) - len(line.lstrip()))
        lines += textwrap.wrap(
            line,
            width,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or ['']
    return lines


def panel(
    state: RunState | None, phase: str, seconds: float, width: int = COLUMNS, lines: int = _LINES
) -> Any:
    """The live display as a rich renderable; one line if a panel does not fit.

    Args:
      state: of the run; None: not known yet.
      phase: what the run is doing.
      seconds: since its launch.
      width: columns of the terminal; at most `COLUMNS` are used.
      lines: of the terminal.
    """
    from rich import box, console, panel, text

    width = min(width, COLUMNS)
    inner = width - _FRAME_COLUMNS
    head = text.Text(f'{duration(seconds)}  ', style='dim', no_wrap=True, overflow='ellipsis')
    working = phase not in ('training', ENDED)
    head.append(phase, style='bold yellow' if working else 'bold green')
    if width < _LEAST_COLUMNS or lines < _LEAST_LINES:
        return head
    rows = [head]
    title = 'Gorila on Beam'
    if state is not None:
        names = (f'{title} · {state.game} · {state.preset}', f'{title} · {state.game}', title)
        title = next(name for name in names if len(name) < inner or name == title)
        rows += [*_progress(state, inner), text.Text(''), _figures(state, inner)]
    return panel.Panel(
        console.Group(*rows),
        box=box.ROUNDED,
        title=f'[bold]{title}[/bold]',
        title_align='left',
        width=width,
        border_style='cyan',
    )


def _progress(state: RunState, width: int) -> list[Any]:
    """`frames 1,234,567 / 4,000,000  ━━━━━━━  31 %  ETA 1:02:03`, on one line or two."""
    from rich import progress_bar, table, text

    share = min(1.0, state.frames / state.max_frames)
    eta = _NOT_YET if state.eta_seconds is None else duration(state.eta_seconds)
    left = text.Text.from_markup(
        f'{state.unit} [bold]{state.frames:,}[/bold] / {state.max_frames:,}'
    )
    right = text.Text(f'{share:4.0%}  ETA {eta:>7}', no_wrap=True)
    one_line = width - len(left) - len(right) - 2 * _GAP >= _LEAST_BAR_COLUMNS
    used = len(right) + _GAP + (len(left) + _GAP if one_line else 0)
    bar = progress_bar.ProgressBar(
        total=1.0, completed=share, width=max(_LEAST_BAR_COLUMNS, width - used)
    )
    grid = table.Table.grid(padding=(0, _GAP, 0, 0))
    grid.add_row(*([left] if one_line else []), bar, right)
    return [grid] if one_line else [left, grid]


def _figures(state: RunState, width: int) -> Any:
    """The figures in as many columns as fit into `width`; rejections on a last line."""
    from rich import text

    cells = (
        (f'{state.unit}/s', _number(state.frames_per_second, '.0f')),
        ('updates', f'{state.updates:,}'),
        ('episodes', f'{state.episodes:,}'),
        ('replay', _number(state.replay_size, ',')),
        ('updates/s', _number(state.updates_per_second, '.1f')),
        ('mean return 100', _number(state.mean_return_100, '.2f')),
        ('drawn/insert', _number(state.samples_per_insert, '.2f')),
        ('epsilon', _number(state.epsilon, '.3f')),
        ('last return', _number(state.last_return, '.1f')),
        ('learned/insert', _number(state.learned_per_insert, '.2f')),
        *((name, f'{row["mean"]:.1f}') for name, row in _evaluations(state)),
    )
    columns = max(1, min(3, (width + _GAP) // (_CELL_COLUMNS + _GAP)))
    cell_width = (width + _GAP) // columns - _GAP
    lines = text.Text()
    for index, (label, value) in enumerate(cells):
        if index:
            lines.append(' ' * _GAP if index % columns else '\n')
        lines.append(label, style='dim')
        lines.append(f'{value:>{max(1, cell_width - len(label))}}', style='bold')
    lines.append('\n')
    return lines.append(_tallies(state, width))


def _evaluations(state: RunState) -> list[tuple[str, Mapping[str, Any]]]:
    """The last evaluation during training and the best, by name; empty before the first."""
    rows = {'evaluation': state.evaluations.get('last'), 'best': state.evaluations.get('best')}
    return [(name, row) for name, row in rows.items() if row is not None]


def _tallies(state: RunState, width: int) -> Any:
    """Rejections and restarts; never breaks a line between a figure and its name."""
    from rich import text

    parts = [text.Text('rejected', style='dim')]
    for reason, count in state.rejected.items():
        style = 'bold' if count else ''
        parts.append(text.Text.assemble((f'{count:,} ', style), (reason, 'dim')))
    if restarts := sum(state.restarts.values()):
        parts.append(text.Text.assemble(('restarts ', 'dim'), (f'{restarts}', 'bold red')))
    lines, used = text.Text(), 0
    for part in parts:
        fits = used + _GAP + len(part) <= width
        lines.append((' ' * _GAP if fits else '\n') if used else '').append(part)
        used = (used + _GAP if fits and used else 0) + len(part)
    return lines


def state_line(state: RunState, phase: str = '') -> str:
    """The state on one line, for a log."""
    rejected = ', '.join(f'{count} {reason}' for reason, count in state.rejected.items())
    eta = _NOT_YET if state.eta_seconds is None else duration(state.eta_seconds)
    parts = [
        f'{state.unit} {state.frames:,}/{state.max_frames:,}'
        f' ({_number(state.frames_per_second, ".0f")}/s)',
        f'updates {state.updates:,} ({_number(state.updates_per_second, ".1f")}/s)',
        f'episodes {state.episodes:,}',
        f'return {_number(state.mean_return_100, ".2f")}',
        f'epsilon {_number(state.epsilon, ".3f")}',
        f'replay {_number(state.replay_size, ",")}',
        f'rejected {rejected}',
        f'eta {eta}',
    ]
    for name, row in _evaluations(state):
        parts.insert(-1, f'{name} {row["mean"]:.1f} at {row["updates"]:,} updates')
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
