"""Videos: what they show, and what is left if one cannot be written."""

import contextlib
import dataclasses
import fractions
import os
import pathlib
import resource
import signal
import time
from collections.abc import Iterator

import av
import numpy as np
import pytest
from ale_py import ALEInterface
from PIL import Image, ImageSequence

from agents.config import EnvironmentConfig
from agents.games import loaded
from pipelines import evaluate
from pipelines.errors import FailedError, UsageError
from pipelines.evaluation import panel, video
from pipelines.evaluation.encoder import encoder
from pipelines.evaluation.play import CancelledError, Emulator, Game, Step, play
from pipelines.evaluation.policies import Policy, of_chance
from pipelines.evaluation.starts import Start
from pipelines.experiment import builders, presets
from pipelines.experiment.protocols import PROTOCOLS, Protocol

SHORT = Protocol('noop', epsilon=1.0, max_frames=120)
STILL = dataclasses.replace(SHORT, max_noops=0, epsilon=0.0)
PONG = EnvironmentConfig(game='pong')
CHANCE = of_chance('pong', full_action_space=False)


def game(rules=SHORT, environment=PONG, **values) -> Game:
    return Game(0, 2, 7, environment, rules, **values)


def decoded(path: pathlib.Path) -> list[np.ndarray]:
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format='rgb24') for frame in file.decode(video=0)]


@contextlib.contextmanager
def full_after(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestAVideo:
    def test_is_h264_that_a_browser_plays_in_real_time(self, tmp_path):
        path = tmp_path / 'pong.mp4'
        video.record(CHANCE, game(), video.Film(path))
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt) == ('h264', 'yuv420p')
            assert stream.average_rate == 15  # 60 frames a second, of which an action takes four
            assert (stream.width, stream.height) == (480, 630)  # three times 160 x 210
        content = path.read_bytes()
        assert content.index(b'moov') < content.index(b'mdat')  # plays before it is loaded whole
        assert [file.name for file in tmp_path.iterdir()] == ['pong.mp4']

    def test_has_a_picture_for_each_step_and_one_at_the_end(self, tmp_path):
        path = tmp_path / 'pong.mp4'
        video.record(CHANCE, game(), video.Film(path))
        assert len(decoded(path)) == 120 / 4 + 1

    @pytest.mark.parametrize(
        'played',
        [
            game(dataclasses.replace(PROTOCOLS['machado'], epsilon=1.0, max_frames=400)),
            game(dataclasses.replace(SHORT, max_frames=4000), EnvironmentConfig(game='breakout')),
            game(dataclasses.replace(PROTOCOLS['human'], epsilon=1.0, max_frames=400),
                 start=Start(b'\x03' * 50)),
        ],
        ids=['sticky', 'to its end', 'from a start point'],
    )  # fmt: skip
    def test_shows_the_game_that_is_evaluated(self, played, tmp_path):
        # `record` raises if a reward or the end of the game differs between the two emulators.
        name = played.environment.game
        chance = of_chance(name, played.environment.full_action_space)
        score = video.record(chance, played, video.Film(tmp_path / 'a.mp4'))
        assert score == play(played, chance.player()())

    def test_shows_the_emulators_screen(self, tmp_path):
        path = tmp_path / 'pong.gif'
        video.record(CHANCE_THAT_WAITS, game(STILL), video.Film(path))
        pictures = gif_pictures(path)
        for step in (0, 10, 29):
            expected = screen_after(step).repeat(3, 0).repeat(3, 1)
            np.testing.assert_array_equal(pictures[step], expected)

    def test_that_takes_too_long_leaves_no_file(self, tmp_path):
        with pytest.raises(CancelledError):
            video.record(CHANCE, game(), video.Film(tmp_path / 'a.mp4'), lambda: True)
        assert list(tmp_path.iterdir()) == []

    def test_that_hangs_fails_and_leaves_no_file(self, tmp_path):
        film = video.Film(tmp_path / 'a' / 'a.mp4', hang_seconds=0.5)
        with pytest.raises(FailedError, match=r'--video .*a\.mp4: no step for 0\.5 s') as failed:
            video.record(CHANCE_THAT_HANGS, game(STILL), film)
        assert failed.value.exit_code == 1
        assert list(film.path.parent.iterdir()) == []

    @pytest.mark.parametrize('name', ['a.mp4', 'a.gif'])
    def test_without_space_is_one_line_and_leaves_no_file(self, name, tmp_path):
        rules = dataclasses.replace(SHORT, max_frames=400)
        with full_after(2048), pytest.raises(UsageError) as refused:
            video.record(CHANCE, game(rules), video.Film(tmp_path / name))
        assert str(refused.value) == (
            f'--video {tmp_path / name}: cannot be written (File too large). Fix: free disk space,'
            ' or name another file.'
        )
        assert list(tmp_path.iterdir()) == []


class Waits(Policy):
    """Takes action 0 always."""

    def opened(self):
        return (lambda: lambda observation: 0), None


class Hangs(Policy):
    """Takes five seconds for its first action."""

    def opened(self):
        return (lambda: lambda observation: time.sleep(5)), None


CHANCE_THAT_WAITS = Waits('waits', PONG)
CHANCE_THAT_HANGS = Hangs('hangs', PONG)


def gif_pictures(path: pathlib.Path) -> list[np.ndarray]:
    with Image.open(path) as image:
        return [np.asarray(frame.convert('RGB')) for frame in ImageSequence.Iterator(image)]


def screen_after(steps: int) -> np.ndarray:
    """The maximum of the last two screens after `steps` no-ops of four frames."""
    emulator: ALEInterface = loaded('pong')
    emulator.setFloat('repeat_action_probability', 0.0)
    emulator.reset_game()
    screens = [emulator.getScreenRGB()] * 2
    for _ in range(4 * steps):
        emulator.act(0)
        screens = [screens[-1], emulator.getScreenRGB()]
    return np.maximum(*screens)


class TestAnEncoder:
    def test_of_gifs_keeps_each_colour_and_the_time(self, tmp_path):
        rng = np.random.default_rng(0)
        # 300 colours in two pictures: the palette is begun again.
        colours = rng.integers(256, size=(300, 3)).astype(np.uint8)
        pictures = [colours[rng.integers(low, low + 150, (20, 30))] for low in (0, 150)]
        with encoder(tmp_path / 'a.gif', tmp_path / 'b', fractions.Fraction(15)) as add:
            for picture in [*pictures, pictures[0]]:
                add(picture)
        found = gif_pictures(tmp_path / 'a.gif')
        for expected, picture in zip([*pictures, pictures[0]], found, strict=True):
            np.testing.assert_array_equal(picture, expected)

    def test_of_gifs_reduces_more_than_256_colours_to_the_nearest(self, tmp_path):
        picture = np.random.default_rng(0).integers(256, size=(20, 30, 3)).astype(np.uint8)
        with encoder(tmp_path / 'a.gif', tmp_path / 'b', fractions.Fraction(15)) as add:
            add(picture)
        (found,) = gif_pictures(tmp_path / 'a.gif')
        # Of 8 bits 3, 3 and 2 are kept.
        assert (picture - found).max() < 64
        assert len(np.unique(found.reshape(-1, 3), axis=0)) <= 256

    def test_replaces_no_file_that_came_meanwhile(self, tmp_path):
        path, black = tmp_path / 'a.gif', np.zeros((20, 30, 3), np.uint8)
        with pytest.raises(FileExistsError):
            with encoder(path, tmp_path / 'b', fractions.Fraction(15), new=True) as add:
                add(black)
                path.write_text("another command's")
        assert [file.name for file in tmp_path.iterdir()] == ['a.gif']
        assert path.read_text() == "another command's"

    @pytest.mark.parametrize('suffix', ['.mp4', '.gif'])
    def test_is_complete_or_fails_wherever_the_space_ends(self, suffix, tmp_path):
        path = tmp_path / f'a{suffix}'
        pictures = np.random.default_rng(0).integers(9, size=(5, 32, 32, 3)).astype(np.uint8)

        def encode() -> None:
            with encoder(path, tmp_path / 'b', fractions.Fraction(15)) as add:
                for picture in pictures:
                    add(picture)

        encode()
        size = path.stat().st_size
        path.unlink()
        for limit in (0, size // 2, size - 1):
            with full_after(limit), pytest.raises(OSError):
                encode()
            assert list(tmp_path.iterdir()) == [], limit
        with full_after(size):
            encode()
        assert len(decoded(path)) == 5


class TestThePanel:
    def test_stands_beside_the_picture(self, tmp_path):
        path = tmp_path / 'pong.mp4'
        video.record(CHANCE, game(), video.Film(path, overlay=True))
        assert decoded(path)[0].shape == (630, 480 + panel.WIDTH, 3)

    def test_has_a_longer_bar_for_a_higher_value_and_marks_the_action(self):
        drawn = panel.Panel(630, ['NOOP', 'FIRE', 'UP']).draw(
            3.0, 40, 1, np.array([0.5, 2.0, 1.0], np.float32)
        )
        bars = [(drawn == colour).all(-1).sum() for colour in (panel._TAKEN, panel._BAR)]
        assert bars[0] > bars[1] / 2 > 0  # FIRE's is the highest; those of the others are shorter
        unknown = panel.Panel(630, ['NOOP', 'FIRE', 'UP']).draw(3.0, 40, 1, None)
        assert not (unknown == panel._BAR).all(-1).any()

    @pytest.mark.parametrize('height', [630, 750])
    def test_has_room_for_all_actions(self, height):
        drawn = panel.Panel(height, ['DOWNRIGHTFIRE'] * 18).draw(0.0, 0, None, np.arange(18.0))
        last = drawn[-120:]  # has the highest value
        assert (last == panel._BAR).all(-1).any()

    @pytest.mark.parametrize('agent', ['qr_dqn', 'iqn'])
    def test_shows_the_values_that_the_policy_acts_by(self, agent):
        experiment = presets.experiment('laptop', {'screen_size': 84, 'agent': agent})
        network = builders.build_policy(experiment)
        policy = Policy('run', experiment.environment, experiment, network.parameters())
        player, values = policy.opened()
        assert values is not None
        steps: list[Step] = []
        play(game(dataclasses.replace(SHORT, epsilon=0.0)), player(), steps.append)
        for step in steps:
            assert values(step.observation).shape == (6,)
            assert int(values(step.observation).argmax()) == step.action


class TestTheCommand:
    def refused(self, flags, tmp_path, capsys, monkeypatch) -> str:
        """The one line of a refusal before anything is played or written."""
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.rglob('*'))
        assert evaluate.main(['--policy=random', *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert sorted(tmp_path.rglob('*')) == before
        return line

    def test_films_the_game_that_is_asked_for(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        flags = ['--games=breakout', '--episodes=2', '--video=new/a.mp4', '--video_episode=1']
        assert evaluate.main(['--policy=random', *flags]) == 0
        said, *_ = [line for line in capsys.readouterr().out.splitlines() if 'a.mp4' in line]
        assert 'a.mp4: game 1, score' in said
        assert len(decoded(tmp_path / 'new' / 'a.mp4')) > 100
        assert len(list((tmp_path / 'evaluations').iterdir())) == 1

    def test_refuses_what_it_cannot_film(self, tmp_path, capsys, monkeypatch):
        given = (tmp_path, capsys, monkeypatch)
        (tmp_path / 'file').touch()
        (tmp_path / 'old.mp4').touch()
        one = ['--games=pong', '--episodes=2']
        assert 'unknown kind' in self.refused([*one, '--video=a.avi'], *given)
        assert 'already exists' in self.refused([*one, '--video=old.mp4'], *given)
        assert 'cannot be written' in self.refused([*one, '--video=file/a.mp4'], *given)
        assert 'not on this machine' in self.refused([*one, '--video=gs://b/a.mp4'], *given)
        two = self.refused(['--games=pong,breakout', '--video=a.mp4'], *given)
        assert '2 policies or games' in two
        late = self.refused([*one, '--video=a.mp4', '--video_episode=2'], *given)
        assert 'the evaluation has games 0 to 1' in late

    def test_keeps_the_scores_of_a_video_without_space(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with full_after(8192):
            flags = ['--games=breakout', '--episodes=1', '--video=a.mp4', '--output=a.json']
            assert evaluate.main(['--policy=random', *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert 'cannot be written (File too large)' in line
        assert line.endswith(' Written: a.json.')
        assert [file.name for file in tmp_path.iterdir()] == ['a.json']

    def test_that_a_signal_stops_keeps_the_scores(self, tmp_path, capsys, monkeypatch):
        def stop(*arguments):
            os.kill(os.getpid(), signal.SIGINT)
            return play(*arguments)

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(video, 'play', stop)
        flags = ['--games=breakout', '--episodes=1', '--video=a.mp4', '--output=a.json']
        assert evaluate.main(['--policy=random', *flags]) == 130
        assert capsys.readouterr().err == 'evaluate.py: SIGINT: stopped. Written: a.json.\n'
        assert [file.name for file in tmp_path.iterdir()] == ['a.json']


def test_the_emulators_in_grey_and_colour_are_the_same_game():
    sticky = dataclasses.replace(PROTOCOLS['machado'], max_frames=800)
    with Emulator(game(sticky)) as grey, Emulator(game(sticky), colour=True) as colour:
        rng = np.random.default_rng(0)
        while not grey.ended:
            action = int(rng.integers(grey.num_actions))
            assert grey.step(action) == colour.step(action)
            assert (grey.frames, grey.ended) == (colour.frames, colour.ended)
        assert colour.observation.shape == (210, 160, 3)
