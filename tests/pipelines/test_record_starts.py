"""The recorder of start points: whose play it records, and what its file is good for."""

import dataclasses
import errno
import json
import os
import signal

import numpy as np
import pygame
import pytest

from agents.config import EnvironmentConfig
from pipelines import evaluate, record_starts
from pipelines.evaluation import person, starts
from pipelines.evaluation.play import Game, Step, play
from pipelines.experiment.protocols import PROTOCOLS
from pipelines.storage import outputs

SHORT = dataclasses.replace(record_starts._RULES, max_frames=400)
PONG = EnvironmentConfig(game='pong')
CODES = starts.action_codes('pong', full_action_space=False)
RANDOM_PONG = ['--policy=random', '--game=pong']


@pytest.fixture(autouse=True)
def short_games(monkeypatch):
    monkeypatch.setattr(record_starts, '_RULES', SHORT)


@pytest.fixture
def window(monkeypatch):
    """A window without a screen, and without waiting between its pictures."""
    monkeypatch.setenv('SDL_VIDEODRIVER', 'dummy')
    monkeypatch.setattr(person, 'FRAMES_PER_SECOND', 0)
    pygame.display.init()
    pygame.event.clear()


def press(*keys: int) -> None:
    for key in keys:
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key))


def observations(game: Game, act) -> list[np.ndarray]:
    steps: list[Step] = []
    play(game, act, steps.append)
    return [step.observation for step in steps]


def test_recorded_points_lead_to_what_was_seen_there(tmp_path):
    path = tmp_path / 'new' / 'pong.json'
    flags = [*RANDOM_PONG, '--count=20', '--games_played=2', f'--output={path}', '--seed=3']
    assert record_starts.main(flags) == 0
    points = starts.read(path, 'pong', 4).starts
    assert len(set(points)) == 20
    # The same two games again, with what was seen at each step by the actions before it.
    seen: dict[bytes, np.ndarray] = {}
    for number in range(2):
        taken = b''
        game = Game(0, number, 3, PONG, dataclasses.replace(SHORT, epsilon=1.0))
        steps: list[Step] = []
        play(game, lambda _: 0, steps.append)
        for step in steps:
            seen[taken] = step.observation
            taken += bytes([CODES[step.action]])
    human = dataclasses.replace(PROTOCOLS['human'], max_frames=4)
    for point in points[::5]:
        there = observations(Game(0, 0, 99, PONG, human, point), lambda _: 0)[0]
        np.testing.assert_array_equal(there, seen[point.actions])


def test_a_recorded_file_is_evaluated_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert record_starts.main([*RANDOM_PONG, '--count=2', '--output=starts.json']) == 0
    flags = ['--protocol=human', '--starts=starts.json', '--output=result.json']
    assert evaluate.main(['--policy=random', '--games=pong', *flags]) == 0
    result = json.loads((tmp_path / 'result.json').read_text())
    starts = {'file': 'starts.json', 'source': 'random', 'count': 2}
    assert (result['episodes'], result['starts']) == (2, starts)


def test_a_signal_is_one_line_and_leaves_no_file(tmp_path, monkeypatch, capsys):
    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(record_starts, 'play', stop)
    assert record_starts.main([*RANDOM_PONG, f'--output={tmp_path / "a.json"}']) == 143
    said = 'record_starts.py: SIGTERM: stopped. No start points are written.\n'
    assert capsys.readouterr().err == said
    assert list(tmp_path.iterdir()) == []


class TestAPerson:
    def test_plays_with_the_keyboard_until_the_game_ends(self, window, tmp_path):
        press(pygame.K_RIGHT, pygame.K_SPACE)
        path = tmp_path / 'pong.json'
        flags = ['--person', '--game=pong', '--count=5', '--games_played=1', f'--output={path}']
        assert record_starts.main(flags) == 0
        file = starts.read(path, 'pong', 4)
        assert file.source == 'person'
        right_fire = bytes([11])  # ALE's code
        assert all(point.actions == right_fire * len(point.actions) for point in file.starts)
        assert max(len(point.actions) for point in file.starts) < 100  # 400 frames

    def test_sees_the_picture_and_the_score(self, window, monkeypatch):
        shown: list[np.ndarray] = []
        flip = pygame.display.flip

        def look():
            shown.append(pygame.surfarray.array3d(pygame.display.get_surface()))
            flip()

        monkeypatch.setattr(pygame.display, 'flip', look)
        game = Game(0, 0, 1, PONG, dataclasses.replace(SHORT, max_frames=40))
        ((taken, score),) = person.play_in_window([game], CODES)
        assert (taken, score) == ([0] * 10, 0.0)
        assert shown[-1].shape == (640, 840, 3)  # columns first, four times 160 x 210
        assert len(np.unique(shown[-1].reshape(-1, 3), axis=0)) >= 3

    @pytest.mark.parametrize('ending', ['escape', 'close'])
    def test_ends_the_session_and_keeps_what_was_played(self, window, ending):
        if ending == 'escape':
            press(pygame.K_ESCAPE)
        else:
            pygame.event.post(pygame.event.Event(pygame.QUIT))
        games = [Game(0, number, 1, PONG, SHORT) for number in range(3)]
        assert list(person.play_in_window(games, CODES)) == [([0], 0.0)]

    def test_needs_a_display(self, monkeypatch, tmp_path, capsys):
        for name in person._DISPLAYS:
            monkeypatch.delenv(name, raising=False)
        flags = ['--person', '--game=pong', f'--output={tmp_path / "a.json"}']
        assert record_starts.main(flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert 'no window can be opened (none of DISPLAY and WAYLAND_DISPLAY is set)' in line
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ('held', 'name'),
        [
            ([], 'NOOP'),
            ([pygame.K_a], 'LEFT'),
            ([pygame.K_LEFT, pygame.K_SPACE], 'LEFTFIRE'),
            ([pygame.K_UP, pygame.K_RIGHT], 'RIGHT'),  # Pong has no UP
            ([pygame.K_q], 'NOOP'),
        ],
    )
    def test_asks_for_an_action_that_the_game_has(self, held, name):
        names = ['NOOP', 'FIRE', 'RIGHT', 'LEFT', 'RIGHTFIRE', 'LEFTFIRE']
        assert names[person.action_of(frozenset(held), names)] == name


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        (['--policy=random'], 'no game is named'),
        (['--person'], 'no game is named'),
        (['--person', '--game=pogn'], 'did you mean pong'),
        ([*RANDOM_PONG, '--count=0'], '--count 0: must be from 1 to 100000. Fix: '),
        ([*RANDOM_PONG, '--count=1e12'], '--count 1000000000000: must be from 1 to'),
        ([*RANDOM_PONG, '--games_played=1e14'], '--games_played 100000000000000: must be'),
        (['--policy=nowhere', '--epsilon=2'], '--epsilon 2.0: must be from 0 to 1'),
        (['--policy=nowhere', '--epsilon=nan'], '--epsilon nan: must be from 0 to 1'),
        ([*RANDOM_PONG, '--epsilon=0.1'], '--epsilon 0.1: no effect without a trained policy'),
        (
            ['--person', '--game=pong', '--epsilon=0.1'],
            '--epsilon 0.1: no effect without a trained',
        ),
        ([*RANDOM_PONG, '--checkpoint=best'], '--checkpoint best: no effect without --run_dir'),
        ([*RANDOM_PONG, '--seed=-1'], '--seed -1: must be from 0 to'),
        ([*RANDOM_PONG, '--output=gs://a/b'], '--output gs://a/b: not on this machine'),
        (
            [*RANDOM_PONG, '--output=old.json/new.json'],
            'cannot be written (Not a directory). Fix: ',
        ),
        ([*RANDOM_PONG, '--output=old.json'], 'already exists'),
        ([*RANDOM_PONG, '--games_played=1', '--count=101'], 'only 100 steps were played'),
        (['--policy=nowhere', '--game=pong'], 'not a SavedModel'),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'old.json').touch()
    assert record_starts.main(['--output=new.json', *flags]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert [file.name for file in tmp_path.iterdir()] == ['old.json']


def test_a_file_that_cannot_be_written_is_refused_before_any_game(tmp_path, monkeypatch):
    monkeypatch.setattr(record_starts, 'record', lambda _: pytest.fail('the play has begun'))
    (tmp_path / 'file').touch()
    assert record_starts.main([*RANDOM_PONG, f'--output={tmp_path / "file" / "a.json"}']) == 2
    assert [file.name for file in tmp_path.iterdir()] == ['file']


def test_a_full_disk_is_one_line_without_names_of_temporary_files(tmp_path, monkeypatch, capsys):
    def full(path, _):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path.with_name('.temporary'))

    monkeypatch.setattr(outputs, 'write_atomically', full)
    output = tmp_path / 'pong.json'
    flags = ['--count=2', '--games_played=1', f'--output={output}']
    assert record_starts.main([*RANDOM_PONG, *flags]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    problem = f'{output}: cannot be written (No space left on device)'
    assert line == f'record_starts.py: {problem}. Fix: name another file as --output.'
    assert list(tmp_path.iterdir()) == []
