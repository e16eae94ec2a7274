"""Pictures of a run that is going on: how often, what they cost, what their failures cost."""

import threading
import time

import pytest

from pipelines.monitoring.drawing import Drawing
from pipelines.monitoring.monitor import Monitor
from pipelines.monitoring.run_state import MonitorConfig
from tests.support.waiting import eventually


def test_the_learning_curve_is_drawn_while_the_run_goes_on(directory):
    told: list[str] = []
    config = MonitorConfig('pong', 'laptop', seed=1, max_frames=1000)
    with Monitor(directory, config) as monitor:
        with Drawing(monitor.draw_learning_curve, told.append, period_seconds=0.01):
            assert eventually(directory.learning_curve_file.exists)
        assert directory.learning_curve_file.read_bytes().startswith(b'\x89PNG')
    assert told == []


def test_drawing_takes_a_hundredth_of_the_time():
    starts: list[float] = []

    def draw():
        starts.append(time.monotonic())
        time.sleep(0.01)

    with Drawing(draw, print, period_seconds=0.001):
        assert eventually(lambda: len(starts) == 2)
    assert starts[1] - starts[0] >= 1.0  # 100 times 0.01 s


def test_a_failure_is_shown_once_in_one_line_and_ends_nothing():
    tries: list[int] = []
    told: list[str] = []

    def draw():
        tries.append(len(tries))
        raise RuntimeError(f'no font\ntry {len(tries)}')

    with Drawing(draw, told.append, period_seconds=0.001):
        assert eventually(lambda: len(tries) > 2)
    assert told == ['learning curve: not drawn, retrying later (no font)']


@pytest.mark.parametrize('period_seconds', [0.001, 100.0])
def test_the_end_waits_for_no_drawing_that_hangs_and_for_no_period(period_seconds):
    hang, drawing = threading.Event(), threading.Event()

    def draw():
        drawing.set()
        hang.wait(60)

    with Drawing(draw, print, period_seconds, close_seconds=0.1):
        assert period_seconds > 1 or drawing.wait(10)
        start = time.monotonic()
    assert time.monotonic() - start < 10
    hang.set()
