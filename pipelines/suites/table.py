"""Shows a suite: a live table in a terminal, lines in a pipe. In: the scheduler's entries."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from agents.config import unit_of
from pipelines.monitoring.display import COLUMNS, Display, LiveDisplay, duration
from pipelines.suites import plan
from pipelines.suites.scheduler import DONE, FAILED, RUNNING, STOPPED, WAITING, Entry

_LINE_SECONDS = 60.0
_FRAME_LINES = 5  # borders, head and the line of counts
_NONE = '-'
_STYLES = {DONE: 'green', RUNNING: 'bold', FAILED: 'bold red', STOPPED: 'yellow', WAITING: 'dim'}
_FIRST_SHOWN = {RUNNING: 0, FAILED: 1, STOPPED: 1, WAITING: 2, DONE: 3}


class Table:
    """Shows the entries on a display; `render` draws them for a live one."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic):
        self._monotonic = monotonic
        self._entries: Sequence[Entry] = ()
        self._parallel = 1
        self._shown: dict[str, str] = {}
        self._due = monotonic() + _LINE_SECONDS

    def update(self, display: Display, entries: Sequence[Entry], parallel: int) -> None:
        """Shows the entries now: in lines, the changes at once and the rest every minute."""
        self._entries, self._parallel = entries, parallel
        if isinstance(display, LiveDisplay):
            return
        due = self._monotonic() >= self._due
        if due:
            self._due = self._monotonic() + _LINE_SECONDS
        for entry in entries:
            before, now = self._shown.get(entry.run.name), _kind(entry)
            self._shown[entry.run.name] = now
            changed = now != before and (before is not None or entry.state != WAITING)
            if changed or (due and entry.state == RUNNING):
                display.message(line(entry, pace(entries)))
        if due:
            display.message(counts(entries, parallel))

    def render(self, _state: Any, _phase: str, seconds: float, width: int, lines: int) -> Any:
        """The table as a rich renderable; see `display.panel`."""
        from rich import box, panel, table

        width = min(width, COLUMNS)
        grid = table.Table(box=None, padding=(0, 1, 0, 0), expand=True)
        for name in ('game', 'preset', 'seed', 'state'):
            grid.add_column(name, no_wrap=True, overflow='ellipsis', ratio=name == 'state' or None)
        units = ', '.join(sorted({unit_of(entry.run.game) for entry in self._entries}))
        for name in (units, 'return', 'score', 'eta'):
            grid.add_column(name, no_wrap=True, justify='right')
        seconds_per_frame = pace(self._entries)
        for entry in visible(self._entries, max(1, lines - _FRAME_LINES)):
            grid.add_row(*_cells(entry, seconds_per_frame), style=_STYLES[entry.state])
        return panel.Panel(
            grid,
            box=box.ROUNDED,
            title='[bold]Gorila on Beam · suite[/bold]',
            title_align='left',
            subtitle=f'{duration(seconds)} · {counts(self._entries, self._parallel)}',
            subtitle_align='left',
            width=width,
            border_style='cyan',
        )


def visible(entries: Sequence[Entry], lines: int) -> list[Entry]:
    """The entries for so many lines, in their order: active ones and failures before the rest."""
    chosen = sorted(entries, key=lambda entry: _FIRST_SHOWN[entry.state])[:lines]
    names = {entry.run.name for entry in chosen}
    return [entry for entry in entries if entry.run.name in names]


def state(entry: Entry) -> str:
    """What a run is doing: `training 43 %`, `failed: reason`, `waiting`."""
    figures = entry.figures
    if entry.state == FAILED:
        return f'{FAILED}: {entry.reason}'
    if entry.state == RUNNING:
        share = (figures.frames or 0) / max(1, entry.run.max_frames)
        return f'training {share:.0%}' if figures.phase == 'training' else figures.phase
    if entry.state == WAITING and figures.phase:
        return f'{WAITING}: {figures.phase}'
    return 'waiting to resume' if entry.state == WAITING and figures.frames else entry.state


def line(entry: Entry, seconds_per_frame: float | None = None) -> str:
    """An entry on one line, for a log; see `pace`."""
    *_, mean_return, score, eta = _cells(entry, seconds_per_frame)
    unit = unit_of(entry.run.game)
    frames = f'{unit} {entry.figures.frames or 0:,}/{entry.run.max_frames:,}'
    return (
        f'{entry.run.name}: {state(entry)} | {frames} | return {mean_return} | score {score}'
        f' | eta {eta}'
    )


def rules(entries: Sequence[Entry]) -> list[str]:
    """The line that says under which rules the scores were taken; none without a score."""
    used = {entry.figures.rules for entry in entries if entry.figures.score is not None}
    if not used:
        return []
    said = used.pop() if len(used) == 1 else ''
    return [f'scores: {said or "each by the rules in the summary.json of its run"}']


def counts(entries: Sequence[Entry], parallel: int) -> str:
    """`2 of 9 done, 1 failed, eta 5:12:00`."""
    states = [entry.state for entry in entries]
    failed = f', {states.count(FAILED)} failed' if FAILED in states else ''
    left = eta_seconds(entries, parallel)
    eta = '' if left is None else f', eta {duration(left)}'
    return f'{states.count(DONE)} of {len(entries)} done{failed}{eta}'


def eta_seconds(entries: Sequence[Entry], parallel: int) -> float | None:
    """Seconds that the suite still needs; None: not known yet."""
    if (seconds_per_frame := pace(entries)) is None:
        return None
    left = [_left_seconds(e, seconds_per_frame) for e in entries if e.state in (WAITING, RUNNING)]
    return max(*left, sum(left) / parallel) if left else None


def pace(entries: Sequence[Entry]) -> float | None:
    """Seconds that a run takes for a frame; None: not known yet.

    Those of finished runs include start, evaluation and video; before the first, it is the time of
    training alone.
    """
    whole = [
        entry
        for entry in entries
        if entry.state == DONE and entry.seconds and 2 * entry.frames_before < entry.run.max_frames
    ]
    if whole:
        frames = sum(entry.run.max_frames - entry.frames_before for entry in whole)
        return sum(entry.seconds for entry in whole) / frames
    rates = [e.figures.frames_per_second for e in entries if e.figures.frames_per_second]
    return len(rates) / sum(rates) if rates else None


def _left_seconds(entry: Entry, seconds_per_frame: float) -> float:
    """Seconds that a waiting or active run still needs."""
    training = max(0, entry.run.max_frames - (entry.figures.frames or 0)) * seconds_per_frame
    if entry.state != RUNNING:
        return training
    attempt = (entry.run.max_frames - entry.frames_before) * seconds_per_frame
    return max(training, attempt - entry.seconds)


def _kind(entry: Entry) -> str:
    """Changes when a line is due at once: without numbers that count up."""
    return f'{entry.state} {entry.figures.phase.partition(" ")[0]}'


def _cells(entry: Entry, seconds_per_frame: float | None) -> tuple[str, ...]:
    figures = entry.figures
    eta = None
    if entry.state == RUNNING and seconds_per_frame is not None:
        eta = _left_seconds(entry, seconds_per_frame)
    return (
        entry.run.game,
        plan.label(entry.run),
        str(entry.run.seed),
        state(entry),
        _NONE if figures.frames is None else _short(figures.frames),
        _NONE if figures.mean_return is None else f'{figures.mean_return:.1f}',
        _NONE if figures.score is None else f'{figures.score:.1f}',
        _NONE if eta is None else duration(eta),
    )


def _short(number: int) -> str:
    """`1.23M`, `505.6k`, `800`."""
    for unit, name in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if number >= unit:
            return f'{number / unit:.4g}{name}'
    return str(number)
