"""The learning curve: what its mean and its minutes are, and what a picture holds."""

import datetime
import json
import types

import numpy as np
import pytest

from pipelines.monitoring import learning_curve
from pipelines.monitoring.learning_curve import smoothed, starts, training_minutes


def test_the_mean_follows_a_trend_without_lag_from_the_first_game():
    line = np.arange(1000) * 0.5 - 21.0
    # A centred mean of a line is the line; at the ends 5 games on one side are missing.
    np.testing.assert_allclose(smoothed(line)[5:-5], line[5:-5])
    assert np.abs(smoothed(line) - line).max() == pytest.approx(2.5 * 0.5)


@pytest.mark.parametrize('length', [0, 1, 7, 250, 1200])
def test_the_mean_equals_a_plain_one(length):
    values = np.random.default_rng(0).normal(size=length)
    plain = []
    for i in range(length):
        half = max(5, min(50, length // 10, i, length - 1 - i))
        plain.append(np.mean(values[max(0, i - half) : i + half + 1]))
    np.testing.assert_allclose(smoothed(values), plain, atol=1e-12)


def launch(time, seconds):
    moment = datetime.datetime.fromtimestamp(time, datetime.UTC)
    return {'time': moment.isoformat(), 'wall_seconds': seconds}


def test_minutes_leave_out_the_pause_before_a_resume():
    # Trained from 1000 to 1300; resumed at 9000 from a checkpoint at 240 s.
    launches = [launch(1000, 0.0), launch(9000, 240.0)]
    minutes = training_minutes([990, 1060, 1240, 9060], starts(launches))
    np.testing.assert_allclose(minutes, [0, 1, 4, 5])
    # Two cores for the first 4 minutes, then three.
    weighted = training_minutes([1060, 9060], starts(launches), [2, 3])
    np.testing.assert_allclose(weighted, [2, 2 * 4 + 3])


@pytest.mark.parametrize('time', [[1], 'yesterday', None, 5, 10**400])
def test_a_launch_without_readable_time_is_skipped(time):
    assert starts([{'time': time}, {}, launch(1000, 'x')]) == [(1000.0, 0.0)]


def test_minutes_of_a_run_without_launches_count_from_its_first_game():
    np.testing.assert_allclose(training_minutes([160, 100], []), [1, 0])
    assert training_minutes([], []).shape == (0,)


def evaluation(frames, updates, seconds, mean, best):
    row = {'frames': frames, 'updates': updates, 'wall_seconds': seconds, 'mean': mean}
    return {**row, 'std': 2.0, 'best': best}


@pytest.fixture
def drawn(directory, monkeypatch):
    """Writes a run's games and evaluations, draws it, and returns the figure."""
    figures = []
    figure_class = __import__('matplotlib.figure', fromlist=['Figure']).Figure

    def kept(*args, **kwargs):
        figures.append(figure_class(*args, **kwargs))
        return figures[-1]

    monkeypatch.setattr('matplotlib.figure.Figure', kept)
    games = [
        {'episode': i, 'time': 60.0 * i, 'frames': 400 * i, 'updates': 10 * i, 'raw_return': i - 21}
        for i in range(1, 21)
    ]
    evaluations = [evaluation(4000, 100, 600, -9.0, True), evaluation('x', 1, 1, 99.0, True)]
    evaluations.append(evaluation(8000, 200, 1200, -12.0, False))
    directory.episodes_file.write_text('\n'.join(map(json.dumps, games)))
    directory.evaluations_file.write_text('\n'.join(map(json.dumps, evaluations)) + '\n{"cut')

    def draw(**arguments):
        learning_curve.draw_learning_curve(directory, 'pong', **arguments)
        return {axes.get_xlabel(): axes for axes in figures[-1].axes}

    return types.SimpleNamespace(draw=draw, file=directory.learning_curve_file)


def test_three_panels_show_games_evaluations_and_the_final_one_from_zero(drawn):
    end = {'frames': 8400.0, 'updates': 210.0, 'minutes': 21.0}
    panels = drawn.draw(evaluation={'mean': 1.0, 'std': 2.0, 'episodes': 30}, end=end)
    assert drawn.file.read_bytes().startswith(b'\x89PNG')
    assert list(panels) == list(learning_curve.AXES.values())
    # Game 20 of 20: 8,000 frames, 200 updates, 19 minutes after the first game.
    for axes, last, evaluated, final in zip(
        panels.values(), (8000, 200, 19), ([4000, 8000], [100, 200], [10, 20]), (8400, 210, 21)
    ):
        assert axes.get_xlim()[0] == 0
        lines = {line.get_label(): line for line in axes.lines}
        assert lines['training game'].get_xdata()[-1] == last
        assert lines['best in training'].get_ydata() == [-9.0]
        during, ending = axes.containers
        assert during.lines[0].get_xdata().tolist() == evaluated
        assert ending.lines[0].get_xdata().tolist() == [final]


def test_a_game_recorded_late_is_drawn_at_its_place(drawn, directory):
    lines = directory.episodes_file.read_text().splitlines()
    directory.episodes_file.write_text('\n'.join([*lines[1:], lines[0]]))
    axes = drawn.draw()['emulator frames']
    assert (np.diff(axes.lines[0].get_xdata()) > 0).all()
    assert axes.lines[0].get_ydata()[0] == -20
