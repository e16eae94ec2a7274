"""One evaluation game: its rules and a policy in, its score out.

A game depends on nothing but its description: the same one gives the same score in any process and
in any order.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tree
from gymnasium.vector import AutoresetMode

from agents.config import EnvironmentConfig
from agents.environments.atari import check_actions, emulator_seeds, make_emulators
from agents.environments.factory import Opening, open_simulation
from agents.environments.frames import Frames, FrameStack, atari_frame
from pipelines.evaluation.starts import Start, action_codes, indices
from pipelines.experiment.protocols import Protocol

FRAMES_PER_SECOND = 60
"""Of the emulator."""

_REASON_CHARACTERS = 500
_STREAM = 3  # actors' environments and exploration have 1 and 2

Act = Callable[[Any], int]
"""Chooses an action for an observation [1, ...], one array or a nest."""


class CancelledError(Exception):
    """The evaluation was interrupted while the game was played."""


@dataclasses.dataclass(frozen=True)
class Game:
    """A game to play.

    Attributes:
      policy: index of the policy among those of the evaluation.
      episode: number of the game, from 0; games of equal number and seed have equal no-ops.
      seed: of the evaluation.
      environment: in which the policy acts, before the protocol.
      protocol: the rules.
      start: where the score begins; None: at the beginning.
      start_index: its number in the file.
    """

    policy: int
    episode: int
    seed: int
    environment: EnvironmentConfig
    protocol: Protocol
    start: Start | None = None
    start_index: int | None = None


@dataclasses.dataclass(frozen=True)
class Score:
    """The result of a game.

    Attributes:
      policy, episode, seed, start_index: of the `Game`.
      value: sum of raw rewards, after the start point or the no-ops.
      frames: emulator frames, after the start point or the no-ops.
      cut: whether the limit of frames ended it.
    """

    policy: int
    episode: int
    seed: int
    start_index: int | None
    value: float
    frames: int
    cut: bool


@dataclasses.dataclass(frozen=True)
class Failure:
    """A game that could not be played, and why."""

    policy: int
    episode: int
    reason: str

    @classmethod
    def of(cls, game: Game, error: Exception) -> 'Failure':
        """The failure of a game by an error."""
        first = (str(error) or repr(error)).splitlines()[0]
        reason = f'{type(error).__name__}: {first}'[:_REASON_CHARACTERS]
        return cls(game.policy, game.episode, reason)


@dataclasses.dataclass(frozen=True)
class Step:
    """What an observer sees of a step: before the action, the action and its reward."""

    observation: Any
    action: int
    reward: float
    ended: bool


def play(
    game: Game,
    act: Act,
    observe: Callable[[Step], Any] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Score:
    """Plays a game.

    Args:
      game: what to play.
      act: the policy.
      observe: receives each step after the start point.
      cancelled: whether to stop; asked at every step.

    Raises:
      CancelledError: `cancelled()` returned True.
      GameError: the game cannot be played.
      ValueError: the start point does not fit the game.
    """
    rng = np.random.default_rng(seeds(game)[1])
    total = 0.0
    with open_game(game) as emulator:
        while not emulator.ended:
            if cancelled():
                raise CancelledError
            observation = emulator.observation
            explores = rng.random() < game.protocol.epsilon
            explored = int(rng.integers(emulator.num_actions))
            action = explored if explores else act(observation)
            seen = tree.map_structure(np.copy, observation) if observe is not None else None
            reward = emulator.step(action)
            total += reward
            if observe is not None and seen is not None:
                observe(Step(seen, action, reward, emulator.ended))
        frames, cut = emulator.frames, emulator.cut
    return Score(game.policy, game.episode, game.seed, game.start_index, total, frames, cut)


def open_game(game: Game, colour: bool = False) -> 'Screen':
    """Opens a game at its begin, or at its start point; use it in a `with`."""
    return Emulator(game, colour) if game.environment.is_atari else Simulation(game, colour)


def seeds(game: Game) -> tuple[int, int]:
    """Seeds of the environment and of the exploration."""
    emulator, exploration = np.random.SeedSequence(
        [game.seed, _STREAM, game.episode]
    ).generate_state(2)
    return int(emulator), int(exploration)


class Emulator:
    """An emulator at the start point of a game; a context manager.

    Two of the same game stay in step under the same actions.

    Attributes:
      num_actions: size of the action set.
      observation: uint8 [1, S, S, stack] of screen size S; the emulator's own screen uint8
        [height, width, 3] if in colour.
      ended: whether the game has ended.
      cut: whether the limit of frames ended it.
    """

    def __init__(self, game: Game, colour: bool = False):
        rules = game.protocol.environment(game.environment)
        prefix = _prefix(game)
        most = rules.max_episode_frames + len(prefix) * rules.action_repeat
        rules = dataclasses.replace(rules, max_episode_frames=most)
        self._emulator = make_emulators(rules, 1, AutoresetMode.NEXT_STEP, colour)
        self.num_actions = int(self._emulator.single_action_space.n)
        frame_spec = atari_frame(rules.screen_size)
        self._stack = None if colour else FrameStack(1, rules.frame_stack, frame_spec)
        self.ended = self.cut = False
        frame, info = self._emulator.reset(seed=emulator_seeds(seeds(game)[0], 1))
        self._show(frame, info, first=True)
        for action in prefix:
            self.step(int(action))
            if self.ended:
                self.__exit__()
                raise ValueError('the game ends before its start point')
        self._frames_at_start = self._frames

    def step(self, action: int) -> float:
        """Takes an action; returns the raw reward."""
        actions = np.array([action], np.int32)
        check_actions(actions, self.num_actions)
        frame, reward, terminated, truncated, info = self._emulator.step(actions)
        self.cut, self.ended = bool(truncated[0]), bool(terminated[0] or truncated[0])
        self._show(frame, info)
        return float(reward[0])

    @property
    def frames(self) -> int:
        """Emulator frames since the start point, or since the no-ops."""
        return self._frames - self._frames_at_start

    def _show(self, frame: np.ndarray, info: dict[str, Any], first: bool = False) -> None:
        if self._stack is None:
            self.observation = frame[0, 0]
        else:
            self.observation = self._stack.push(frame[:, 0], np.array([first]))
        self._frames = int(info['episode_frame_number'][0])

    def __enter__(self) -> 'Emulator':
        return self

    def __exit__(self, *_: object) -> None:
        self._emulator.close()


class Simulation:
    """An environment other than Atari at the begin of an episode, as an `Emulator`.

    Attributes:
      num_actions: size of the action set.
      observation: of the environment's type, [1, ...] or a nest of such; its picture uint8
        [height, width, 3] if in colour.
      ended: whether the episode has ended.
      cut: whether a limit of steps ended it.
      frames: steps so far.
    """

    def __init__(self, game: Game, colour: bool = False):
        rules = game.protocol.environment(game.environment)
        self._most = rules.max_episode_frames
        opening = Opening(1, training=False, render_mode='rgb_array' if colour else None)
        # One environment gains nothing from a process, whose start would last longer than a game.
        alone = dataclasses.replace(rules, env_processes=False)
        self._environment = open_simulation(alone, seeds(game)[0], opening)
        self.num_actions = self._environment.num_actions
        self._stack = FrameStack(1, rules.frame_stack, self._environment.frame_spec)
        self._colour = colour
        self.ended = self.cut = False
        self.frames = 0
        try:
            self._show(self._environment.reset())
        except BaseException:
            self._environment.close()
            raise

    def step(self, action: int) -> float:
        """Takes an action; returns the reward."""
        result = self._environment.step_frames(np.array([action], np.int32))
        self.frames += 1
        terminated = bool(result.terminated[0])
        self.cut = not terminated and (bool(result.truncated[0]) or self.frames >= self._most)
        self.ended = terminated or self.cut
        self._show(result)
        return float(result.reward[0])

    def _show(self, frames: Frames) -> None:
        if self._colour:
            self.observation = self._environment.render()
        else:
            self.observation = self._stack.push(frames.frame, frames.first)

    def __enter__(self) -> 'Simulation':
        return self

    def __exit__(self, *_: object) -> None:
        self._environment.close()


Screen = Emulator | Simulation


def _prefix(game: Game) -> np.ndarray:
    """Indices int32 [steps] of the actions that lead to the start point."""
    if game.start is None:
        return np.zeros(0, np.int32)
    codes = action_codes(game.environment.game, game.environment.full_action_space)
    return indices(game.start, codes)
