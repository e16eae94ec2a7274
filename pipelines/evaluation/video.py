"""A video of a game: its description and a policy in, a file with the emulator's screen out.

A game is determined by its description, so it is played again with a second emulator, in colour,
that takes the same actions.
"""

import contextlib
import dataclasses
import fractions
import functools
import pathlib
from collections.abc import Callable, Sequence
from time import monotonic

import ale_py
import numpy as np

from agents.environments.errors import EnvironmentFailedError
from infra.disk import beside
from pipelines.errors import FailedError, UsageError
from pipelines.evaluation.bounded import HungError, within
from pipelines.evaluation.encoder import SUFFIXES, encoder
from pipelines.evaluation.entrants import Entrant, Request, entrants
from pipelines.evaluation.panel import Panel
from pipelines.evaluation.play import (
    FRAMES_PER_SECOND,
    CancelledError,
    Game,
    Score,
    Screen,
    Step,
    open_game,
    play,
)
from pipelines.evaluation.policies import Policy, Values
from pipelines.evaluation.starts import action_codes
from pipelines.experiment import config as config_lib
from pipelines.experiment.job_settings import JobSettings
from pipelines.storage.outputs import existing, require_new
from pipelines.storage.run_directory import RunDirectory

RUN_SECONDS = 300.0
"""For the video at the end of a run."""

_STEP_FRAMES = 2  # thirty steps a second where no emulator says more
_LEAST_ROWS = 600  # of the picture, three for each of Atari's 210
_RUN_FRAMES = 18_000  # of the emulator, five minutes


@dataclasses.dataclass(frozen=True)
class Film:
    """What to film and where.

    Attributes:
      path: the file, .mp4 or .gif.
      episode: number of the game.
      overlay: whether score, actions and expected returns stand beside the screen.
      new: whether to replace no file.
      hang_seconds: after so long without a step there is no video.
    """

    path: pathlib.Path
    episode: int = 0
    overlay: bool = False
    new: bool = False
    hang_seconds: float = JobSettings.hang_seconds


def new_file(path: str) -> pathlib.Path:
    """Checks that a video can be written to `path`; creates nothing.

    Raises:
      UsageError: it exists, is remote or not writable, or its suffix is unknown.
    """
    file = pathlib.Path(path).absolute()
    if file.suffix.lower() not in SUFFIXES:
        raise UsageError(f'--video {path}: unknown kind. Fix: name a .mp4 or .gif file.')
    require_new(path, '--video')
    return file


def game_of(found: Sequence[Entrant], film: Film) -> Game:
    """The game to film.

    Raises:
      UsageError: there are several policies or games, or too few episodes.
    """
    if len(found) != 1:
        raise UsageError(
            f'--video {film.path}: {len(found)} policies or games. Fix: evaluate one in one game.'
        )
    for game in found[0].games(0):
        if game.episode == film.episode:
            return game
    raise UsageError(
        f'--video_episode {film.episode}: the evaluation has games 0 to'
        f' {found[0].protocol.episodes - 1}. Fix: name one of them, or raise --episodes.'
    )


def record(
    policy: Policy, game: Game, film: Film, cancelled: Callable[[], bool] = lambda: False
) -> Score:
    """Plays a game and films it.

    Args:
      policy: of the game.
      game: what to play; its limit of frames bounds the video.
      film: where to; its directory is created.
      cancelled: whether to stop without a video; asked at every step.

    Raises:
      UsageError: the file cannot be written, or the policy cannot be opened.
      FailedError: a step hangs.
      CancelledError: `cancelled()` returned True.
      ValueError: see `Policy.player` and `play`.

    An error leaves no file.
    """
    temporary = beside(film.path)
    try:
        work = functools.partial(_record, policy, game, film, temporary)
        return within(film.hang_seconds, work, cancelled)
    except HungError as error:
        raise FailedError(f'--video {film.path}: {error}') from error
    finally:
        with contextlib.suppress(OSError):  # work that is left alone cannot remove it
            temporary.unlink(missing_ok=True)


def _record(
    policy: Policy,
    game: Game,
    film: Film,
    temporary: pathlib.Path,
    cancelled: Callable[[], bool],
) -> Score:
    player, values = policy.opened()
    repeat = game.environment.action_repeat if game.environment.is_atari else _STEP_FRAMES
    rate = fractions.Fraction(FRAMES_PER_SECOND, repeat)
    try:
        film.path.parent.mkdir(parents=True, exist_ok=True)
        with (
            open_game(game, colour=True) as screen,
            encoder(film.path, temporary, rate, film.new) as add,
        ):
            view = _View(screen, _action_names(game, screen), values, film.overlay)

            def observe(step: Step) -> None:
                add(view.picture(step))
                view.advance(step)

            score = play(game, player(), observe, cancelled)
            add(view.picture(None))
    except EnvironmentFailedError as error:
        raise UsageError(f'--video {film.path}: {error}') from error
    except FileExistsError as error:  # another command's
        raise existing(str(film.path), '--video') from error
    except OSError as error:
        raise _not_written(film.path, error) from error
    return score


def record_run(run_dir: str, hang_seconds: float, notify: Callable[[str], None]) -> None:
    """Films the first evaluation game of a run's best policy, or of its newest, as `video.mp4`.

    Does nothing if the run's setting `video` is false.

    Args:
      run_dir: its directory, on this machine.
      hang_seconds: after so long without a step there is no video.
      notify: receives a line for each damaged checkpoint that is skipped.

    Raises:
      UsageError: the file cannot be written, or the run is not readable.
      FailedError: it takes too long, or a step hangs.
    """
    directory = RunDirectory.existing(run_dir)
    if not config_lib.load(directory.config_file).run.video:
        return
    checkpoint = 'best' if directory.best.is_dir() else 'newest'
    (entrant,) = entrants(Request(run_dirs=[run_dir], checkpoint=checkpoint), notify)
    game = next(entrant.games(0))
    frames = min(game.protocol.max_frames, _RUN_FRAMES)
    shown = dataclasses.replace(game.protocol, max_frames=frames)
    film = Film(directory.video, overlay=True, hang_seconds=hang_seconds)
    deadline = monotonic() + RUN_SECONDS
    try:
        game = dataclasses.replace(game, protocol=shown)
        record(entrant.policy, game, film, lambda: monotonic() > deadline)
    except CancelledError as error:
        raise FailedError(f'not made within {RUN_SECONDS:g} s') from error


def _not_written(path: str | pathlib.Path, error: OSError) -> UsageError:
    return UsageError(
        f'--video {path}: cannot be written ({error.strerror or error}). Fix: free disk space, or'
        ' name another file.'
    )


def _action_names(game: Game, screen: Screen) -> Sequence[str]:
    if not game.environment.is_atari:
        return [f'action {number}' for number in range(screen.num_actions)]
    codes = action_codes(game.environment.game, game.environment.full_action_space)
    return [ale_py.Action(code).name for code in codes]


class _View:
    """What the video shows at each step."""

    def __init__(
        self, screen: Screen, actions: Sequence[str], values: Values | None, overlay: bool
    ):
        rows = screen.observation.shape[0]
        self._scale = max(1, -(-_LEAST_ROWS // rows))
        height = rows * self._scale
        self._screen = screen
        self._values = values
        self._panel = Panel(height, actions) if overlay else None
        self._score = 0.0

    def picture(self, step: Step | None) -> np.ndarray:
        """The picture before a step uint8 [height, width, 3]; None: after the last one."""
        enlarged = self._screen.observation.repeat(self._scale, 0).repeat(self._scale, 1)
        if self._panel is None:
            return enlarged
        action = values = None
        if step is not None:
            action = step.action
            values = self._values(step.observation) if self._values is not None else None
        panel = self._panel.draw(self._score, self._screen.frames, action, values)
        return np.concatenate([enlarged, panel], axis=1)

    def advance(self, step: Step) -> None:
        """
        Raises:
          RuntimeError: the screen does not show the game that is played.
        """
        reward = self._screen.step(step.action)
        if (reward, self._screen.ended) != (step.reward, step.ended):
            raise RuntimeError('the screen is out of step with the game')
        self._score += reward
