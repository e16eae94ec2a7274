"""The display: what is shown, how often, in how many columns; the terminal is given back."""

import contextlib
import dataclasses
import fcntl
import io
import os
import re
import struct
import subprocess
import sys
import termios
import threading

import pytest
from rich.console import Console

from pipelines import display
from pipelines.monitor import RunState

STATE = RunState(
    game='space_invaders',
    preset='laptop',
    max_frames=200_000_000,
    frames=50_000_000,
    agent_steps=12_500_000,
    frames_per_second=12_345.6,
    updates=3_125_000,
    updates_per_second=1234.56,
    episodes=123_456,
    mean_return_100=-18.324,
    last_return=-19.0,
    epsilon=0.5124,
    replay_size=1_000_000,
    samples_per_insert=8.014,
    rejected={'stale': 1234, 'outlier': 56_789, 'invalid': 3},
    restarts={'actor': 2},
    eta_seconds=400_000.0,
    wall_seconds=3_700.0,
)
EMPTY = RunState(game='pong', preset='laptop', max_frames=1000)


class FakeClock:
    def __init__(self):
        self.now = 50.0

    def __call__(self):
        return self.now


def rendered(state, width, phase='training'):
    """The panel's lines on a terminal of `width` columns."""
    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None)
    console.print(display.panel(state, phase, 3700.0, width))
    return text.getvalue().splitlines()


class TestPanel:
    @pytest.mark.parametrize('width', [60, 80, 200])
    @pytest.mark.parametrize('state', [None, EMPTY, STATE])
    def test_it_fits_and_is_never_wider_than_eighty_columns(self, state, width):
        lines = rendered(state, width)
        assert {len(line) for line in lines} == {min(width, 80)}
        assert not any('…' in line for line in lines)  # nothing was cut off

    def test_it_shows_every_figure_of_the_contract(self):
        text = ' '.join(' '.join(rendered(STATE, 80)).split())
        for figure in (
            'frames 50,000,000 / 200,000,000',
            '25%',
            'ETA 111:06:40',  # 400,000 s = 111 h 6 min 40 s
            'frames/s 12346',
            'updates 3,125,000',
            'updates/s 1234.6',
            'episodes 123,456',
            'mean return 100 -18.32',
            'epsilon 0.512',
            'replay 1,000,000',
            '1,234 stale 56,789 outlier 3 invalid',
            'restarts 2',
            '1:01:40 training',
            'space_invaders · laptop',
        ):
            assert figure in text

    def test_columns_are_aligned(self):
        lines = rendered(STATE, 80)
        ends = [[m.end() for m in re.finditer(r'\d(?= {2}[a-z]| │)', line)] for line in lines[4:7]]
        assert ends[0] == ends[1] == ends[2]
        assert len(ends[0]) == 3

    def test_a_phase_with_brackets_is_shown_as_it_is(self):
        assert any('[bold]odd[/] 3/5' in line for line in rendered(EMPTY, 80, '[bold]odd[/] 3/5'))


class TestPlain:
    @pytest.fixture
    def clock(self):
        return FakeClock()

    @pytest.fixture
    def stream(self):
        return io.StringIO()

    @pytest.fixture
    def plain(self, stream, clock):
        return display.PlainDisplay(stream, 10.0, clock)

    def test_the_state_is_printed_once_each_interval(self, plain, stream, clock):
        for _ in range(25):  # 25 s, a state each second: at 0, 10, 20 s
            plain.update(STATE)
            clock.now += 1
        assert len(stream.getvalue().splitlines()) == 3

    def test_a_caller_that_repeats_its_phase_still_sees_the_state(self, plain, stream, clock):
        for _ in range(25):  # seconds; the interval is 10
            plain.phase('training')
            plain.update(dataclasses.replace(STATE))  # each second a new one
            clock.now += 1.0
        lines = stream.getvalue().splitlines()
        assert lines[0].endswith('training')
        assert sum('updates 3,125,000' in line for line in lines) >= 2

    def test_a_line_shows_every_figure_of_the_contract(self, plain, stream):
        plain.update(STATE)
        assert stream.getvalue().splitlines() == [
            '[1:01:40] frames 50,000,000/200,000,000 (12346/s) | updates 3,125,000 (1234.6/s)'
            ' | episodes 123,456 | return -18.32 | epsilon 0.512 | replay 1,000,000'
            ' | rejected 1234 stale, 56789 outlier, 3 invalid | restarts 2 | eta 111:06:40'
        ]

    def test_what_is_not_known_yet_is_a_dash(self):
        assert 'return - | epsilon - | replay -' in display.state_line(EMPTY)

    def test_a_new_phase_is_printed_at_once_and_a_counting_one_now_and_then(
        self, plain, stream, clock
    ):
        plain.phase('starting servers')
        for filled in range(0, 2500, 100):  # 25 s: at 0, 10, 20 s
            plain.phase(f'filling replay {filled}/5000')
            clock.now += 1
        plain.phase('training')
        assert [line.split('] ')[1] for line in stream.getvalue().splitlines()] == [
            'starting servers',
            'filling replay 0/5000',
            'filling replay 1000/5000',
            'filling replay 2000/5000',
            'training',
        ]

    def test_a_log_of_another_encoding_gets_escapes_instead_of_an_error(self):
        log = io.BytesIO()
        plain = display.PlainDisplay(io.TextIOWrapper(log, 'ascii'), 10.0, FakeClock())
        plain.update(STATE)
        plain.message('runs/é is full')
        assert b'runs/\\xe9 is full' in log.getvalue()

    def test_the_last_state_is_not_lost(self, plain, stream, clock):
        plain.update(EMPTY)
        clock.now += 1
        plain.update(STATE)
        plain.close()
        plain.close()
        assert 'frames 50,000,000' in stream.getvalue().splitlines()[-1]
        assert len(stream.getvalue().splitlines()) == 2

    def test_a_reader_that_goes_away_ends_neither_the_run_nor_its_exit_code(self):
        program = (
            'import sys, time\n'
            'from pipelines import display\n'
            'with display.open_display() as shown:\n'
            '    shown.phase("first")\n'
            '    sys.stdin.readline()\n'
            '    for text in "abc":\n'
            '        shown.phase(text)\n'
            'print("unread")\n'
            'sys.exit(7)\n'
        )
        process = subprocess.Popen(
            [sys.executable, '-c', program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert b'first' in process.stdout.readline()
        process.stdout.close()
        process.stdin.write(b'\n')
        process.stdin.close()
        assert process.stderr.read() == b''
        process.stderr.close()
        assert process.wait(30) == 7


class Terminal:
    """A pseudo-terminal of 80 columns; `text` is what was written to it."""

    def __init__(self):
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
        self.stream = os.fdopen(slave, 'w')
        self._parts = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # EIO: the other end was closed
            while part := os.read(self._master, 65536):
                self._parts.append(part)

    def close(self):
        if not self.stream.closed:
            self.stream.close()
            self._reader.join(10)
            os.close(self._master)

    @property
    def text(self):
        self.close()
        return b''.join(self._parts).decode()


class TestLive:
    @pytest.fixture
    def terminal(self, monkeypatch):
        monkeypatch.setenv('TERM', 'xterm-256color')
        monkeypatch.setenv('COLUMNS', '80')
        monkeypatch.setenv('LINES', '24')
        terminal = Terminal()
        yield terminal
        terminal.close()

    def test_a_terminal_gets_the_live_display_and_a_pipe_plain_lines(self, terminal, monkeypatch):
        with display.open_display(terminal.stream) as shown:
            assert isinstance(shown, display.LiveDisplay)
        assert isinstance(display.open_display(io.StringIO()), display.PlainDisplay)
        monkeypatch.setenv('TERM', 'dumb')  # no cursor to move
        assert isinstance(display.open_display(terminal.stream), display.PlainDisplay)

    def test_the_last_state_stays_on_the_screen(self, terminal):
        with display.open_display(terminal.stream) as shown:
            shown.phase('filling replay 1200/5000')
            shown.update(STATE)
        assert 'filling replay 1200/5000' in terminal.text
        assert '123,456' in terminal.text

    def test_the_cursor_is_given_back_after_an_exception(self, terminal):
        with pytest.raises(KeyboardInterrupt), display.open_display(terminal.stream) as shown:
            shown.update(STATE)
            raise KeyboardInterrupt
        hidden, given_back = terminal.text.rfind('\x1b[?25l'), terminal.text.rfind('\x1b[?25h')
        assert 0 <= hidden < given_back

    def test_the_cursor_can_be_given_back_from_a_signal_handler(self, terminal):
        shown = display.open_display(terminal.stream)
        shown.abandon()
        hidden, given_back = terminal.text.rfind('\x1b[?25l'), terminal.text.rfind('\x1b[?25h')
        assert 0 <= hidden < given_back
        shown.close()  # whose terminal is gone by now

    def test_a_message_is_printed_as_it_is(self, terminal):
        with display.open_display(terminal.stream) as shown:
            shown.message('actor [0] restarted [/]')
        assert 'actor [0] restarted [/]' in terminal.text

    def test_closing_twice_is_harmless(self, terminal):
        shown = display.open_display(terminal.stream)
        shown.close()
        shown.close()

    def test_its_thread_does_not_outlive_it(self, terminal):
        before = set(threading.enumerate())
        with display.open_display(terminal.stream):
            started = set(threading.enumerate()) - before
        assert len(started) == 1
        for thread in started:  # told to end; it may be drawing a last time
            thread.join(10)
            assert not thread.is_alive()
