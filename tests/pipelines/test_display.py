"""The display: what is shown, how often, in how many columns; the terminal is given back."""

import contextlib
import dataclasses
import fcntl
import io
import os
import re
import struct
import termios
import threading

import pytest
from rich.console import Console, Group

from pipelines.monitoring import display
from pipelines.monitoring.run_state import RunState
from tests.support.waiting import eventually

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
    learned_per_insert=7.985,
    rejected={'stale': 1234, 'outlier': 56_789, 'invalid': 3},
    restarts={'actor': 2},
    eta_seconds=400_000.0,
    wall_seconds=3_700.0,
)
EVALUATED = RunState(
    game='pong',
    preset='laptop',
    max_frames=1000,
    evaluations={
        'last': {'mean': -3.21, 'updates': 30_000},
        'best': {'mean': 15.1, 'updates': 20_000},
    },
)
EMPTY = RunState(game='pong', preset='laptop', max_frames=1000)


class FakeClock:
    def __init__(self):
        self.now = 50.0

    def __call__(self):
        return self.now


def rendered(state, width, phase='training', lines=24):
    """What is shown, line by line, on a terminal of `width` columns and `lines` lines."""
    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None)
    console.print(Group(display.panel(state, phase, 3700.0, width, lines)))
    return text.getvalue().splitlines()


class TestPanel:
    def test_shows_evaluations_once_there_are_some(self):
        shown = rendered(EVALUATED, 80)
        assert re.search(r'evaluation +-3\.2 +best +15\.1', '\n'.join(shown))
        assert len(shown) == len(rendered(EMPTY, 80))
        assert 'evaluation' not in '\n'.join(rendered(EMPTY, 80))

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
            'drawn/insert 8.01',
            'learned/insert 7.99',
            '1,234 stale 56,789 outlier 3 invalid',
            'restarts 2',
            '1:01:40 training',
            'space_invaders · laptop',
        ):
            assert figure in text

    @pytest.mark.parametrize('width', [40, 50, 60, 70, 80])
    def test_no_figure_is_parted_from_its_name_in_a_narrow_terminal(self, width):
        path = '/data/experiments/of-mine/runs/a-name'
        lines = rendered(STATE, width, f'copying to {path}')
        for whole in (
            'frames 50,000,000 / 200,000,000',
            'ETA 111:06:40',
            '1,234 stale',
            '56,789 outlier',
            '3 invalid',
            'restarts 2',
            'Gorila on Beam · space_invaders',
        ):
            assert any(whole in line for line in lines), whole
        assert len([line for line in lines if '/data' in line or 'of-mine' in line]) == 1

    def test_columns_are_aligned(self):
        lines = rendered(STATE, 80)
        ends = [[m.end() for m in re.finditer(r'\d(?= {2}[a-z]| │)', line)] for line in lines[4:7]]
        assert ends[0] == ends[1] == ends[2]
        assert len(ends[0]) == 3

    def test_a_phase_with_brackets_is_shown_as_it_is(self):
        assert any('[bold]odd[/] 3/5' in line for line in rendered(EMPTY, 80, '[bold]odd[/] 3/5'))

    @pytest.mark.parametrize(('width', 'lines'), [(29, 24), (9, 24), (80, 2)])
    def test_a_terminal_too_small_for_a_panel_gets_one_line(self, width, lines):
        shown = rendered(STATE, width, 'training', lines)
        assert len(shown) == 1
        assert shown[0] == '1:01:40  training' or shown[0].endswith('…')
        assert len(shown[0]) <= width

    def test_the_narrowest_panel_parts_no_word(self):
        text = ' '.join(line.strip('│ ') for line in rendered(STATE, 30)).replace('  ', ' ')
        for whole in ('50,000,000', '200,000,000', 'ETA 111:06:40', 'learned/insert', '1,000,000'):
            assert whole in text


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

    def test_a_line_shows_the_last_and_the_best_evaluation(self):
        assert '| evaluation -3.2 at 30,000 updates | best 15.1 at 20,000 updates | eta' in (
            display.state_line(EVALUATED)
        )

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

    def test_the_clock_goes_on_while_the_runs_own_stands_still(self, plain, stream, clock):
        plain.update(dataclasses.replace(STATE, wall_seconds=100.0))  # resumed after 100 s
        clock.now += 20
        plain.update(dataclasses.replace(STATE, wall_seconds=120.0))  # the training's end
        clock.now += 300
        plain.phase('evaluating 30/30')
        plain.end(dataclasses.replace(STATE, wall_seconds=120.0))
        plain.message('pong: mean return 21.0')
        plain.close()
        lines = stream.getvalue().splitlines()
        assert [line.split('] ')[0] for line in lines] == [
            '[0:01:40',
            '[0:02:00',
            *['[0:07:00'] * 3,
        ]
        assert '] ended | frames 50,000,000' in lines[-2]
        assert lines[-2].endswith('| eta -')  # nothing is left to wait for

    def test_the_last_state_is_not_lost(self, plain, stream, clock):
        plain.update(EMPTY)
        clock.now += 1
        plain.update(STATE)
        plain.close()
        plain.close()
        assert '] ended | frames 50,000,000' in stream.getvalue().splitlines()[-1]
        assert len(stream.getvalue().splitlines()) == 2

    def test_a_run_of_which_nothing_is_known_yet_ends_too(self, plain, stream):
        plain.phase('starting servers')
        plain.close()
        assert stream.getvalue().splitlines()[-1] == '[0:00:00] ended'


class TestWrapping:
    def test_words_stay_whole_and_a_path_is_left_to_the_terminal(self):
        path = '/data/' + 'a-long-name/' * 8
        text = f'actor 0 ended with exit code 1; its log is {path} and ends:\n  OSError: no licence'
        lines = display.wrapped(text, 30)
        assert lines == [
            'actor 0 ended with exit code',
            '1; its log is',
            path,
            'and ends:',
            '  OSError: no licence',
        ]


class Terminal:
    """A pseudo-terminal of 80 columns; `text` is what was written to it."""

    def __init__(self):
        self._master, slave = os.openpty()
        self._slave = slave
        self.resize(80)
        self.stream = os.fdopen(slave, 'w')
        self._parts = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def resize(self, columns):
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))

    @property
    def so_far(self):
        return b''.join(self._parts).decode(errors='replace')

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
            assert eventually(lambda: 'filling replay 1200/5000' in terminal.so_far)
        last = terminal.text.rpartition('╭')[2]
        assert 'ended' in last
        assert '123,456' in last

    def test_the_cursor_is_given_back_after_an_exception(self, terminal):
        with pytest.raises(KeyboardInterrupt), display.open_display(terminal.stream) as shown:
            shown.update(STATE)
            raise KeyboardInterrupt
        hidden, given_back = terminal.text.rfind('\x1b[?25l'), terminal.text.rfind('\x1b[?25h')
        assert 0 <= hidden < given_back

    def test_the_cursor_can_be_given_back_from_a_signal_handler(self, terminal):
        shown = display.open_display(terminal.stream)
        shown.abandon('stopped at once')
        assert 'stopped at once\n' in terminal.text.replace('\r', '')
        hidden, given_back = terminal.text.rfind('\x1b[?25l'), terminal.text.rfind('\x1b[?25h')
        assert 0 <= hidden < given_back

    def test_a_message_is_printed_as_it_is(self, terminal):
        with display.open_display(terminal.stream) as shown:
            shown.message('actor [0] restarted [/]')
        assert 'actor [0] restarted [/]' in terminal.text

    def test_a_narrower_terminal_gets_a_new_panel_on_an_empty_screen(self, terminal):
        with display.open_display(terminal.stream) as shown:
            shown.update(STATE)
            assert eventually(lambda: '─' * 40 in terminal.so_far)
            terminal.resize(50)
            # The last of 24 lines, so many further, and the first: all before is above the screen.
            cleared = '\x1b[24H' + '\r\n' * 24 + '\x1b[H'
            assert eventually(lambda: '╰' in terminal.so_far.partition(cleared)[2])
        after = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', terminal.text.partition(cleared)[2])
        lines = [line for line in re.split('[\r\n]', after) if line]
        assert {len(line) for line in lines} == {50}

    def test_the_last_picture_says_that_the_run_has_ended(self, terminal):
        with display.open_display(terminal.stream) as shown:
            shown.phase('evaluating 29/30')
            shown.update(EMPTY)
            shown.end(STATE)
        last = terminal.text.rpartition('╭')[2]
        assert 'ended' in last
        assert '123,456' in last

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
