"""Atari games: actions in, preprocessed frames, raw rewards and ends of episodes out.

`ale_py`'s C++ vector environment runs the emulators and the preprocessing of Mnih et al. (2015). It
repeats an action for 4 emulator frames, converts the last two to grey, takes their maximum and
resizes it to 84 x 84, or what `screen_size` says. Actions are the game's minimal set, or all 18.

Frames and rewards equal those of gymnasium's `AtariPreprocessing` bit for bit; no-ops, the limit of
frames and lives differ (tests/agents/test_atari_preprocessing.py shows how). Mnih et al. take the
maximum of each colour before the grey: in 500 random steps of each of nine games, fewer than 0.5 %
of the pixels differ by more than one grey level.

A game starts with 0 to `max_noops` no-ops (emulator frames, uniformly drawn). The environment does
not press FIRE, as in the published code of Mnih et al. (2015): in Breakout the agent learns to
serve the ball.

This module does not import TensorFlow; `agents/py_environment.py` wraps these games for TF-Agents.
"""

from typing import Any

import numpy as np
from ale_py import vector_env
from gymnasium.vector import AutoresetMode

from agents.config import EnvironmentConfig
from agents.environments.frames import Frames, FrameSpec, atari_frame, begun
from agents.games import loaded, rom_id


def make_emulators(
    config: EnvironmentConfig,
    num_environments: int,
    autoreset_mode: AutoresetMode,
    colour: bool = False,
) -> vector_env.AtariVectorEnv:
    """Opens emulators that ignore life loss, do not clip rewards and return one frame per step.

    With `colour` a frame is the screen, uint8 [height, width, 3], the maximum of the last two
    emulator frames. Rewards and ends are those of the grey emulators for equal seeds and actions.

    Raises:
      GameError: `config.game` is unknown or unplayable.
      ValueError: `num_environments` is not an integer of at least 1.
    """
    if not isinstance(num_environments, int) or num_environments < 1:
        raise ValueError(f'num_environments is {num_environments!r}; it must be at least 1')
    size = (config.screen_size, config.screen_size)
    height, width = loaded(config.game).getScreenDims() if colour else size
    return vector_env.AtariVectorEnv(
        rom_id(config.game),
        num_environments,
        # One thread: an actor owns one core, and a second thread saves no CPU time.
        num_threads=1,
        max_num_frames_per_episode=config.max_episode_frames,
        repeat_action_probability=config.sticky_action_probability,
        full_action_space=config.full_action_space,
        autoreset_mode=autoreset_mode,
        img_height=height,
        img_width=width,
        grayscale=not colour,
        stack_num=1,
        frameskip=config.action_repeat,
        # ale_py draws from 0 .. noop_max - 1.
        noop_max=config.max_noops + 1,
        # ale_py's own life loss is indistinguishable from the end of the game.
        life_loss_info=False,
        reward_clipping=False,
        use_fire_reset=False,
    )


def check_actions(action: np.ndarray, num_actions: int) -> None:
    """
    Raises:
      ValueError: an action is outside 0 .. num_actions - 1, on which ale_py would hang.
    """
    if action.min() < 0 or action.max() >= num_actions:
        raise ValueError(f'actions {action.tolist()} must lie in 0 .. {num_actions - 1}.')


def emulator_seeds(seed: int, num_environments: int) -> np.ndarray:
    """Independent seeds int64 [E] below 2^31; neighbouring values of `seed` share no stream."""
    states = np.random.SeedSequence(seed).generate_state(num_environments)
    return (states & 0x7FFF_FFFF).astype(np.int64)


class AtariEnvironment:
    """Steps E games as one batch and restarts each as soon as it ends.

    In training with `config.life_loss_ends_episode`, the loss of a life ends an episode but not its
    game: `life_lost` is set, and the next episode begins without no-ops.
    """

    def __init__(
        self, config: EnvironmentConfig, num_environments: int, seed: int, training: bool = True
    ) -> None:
        """
        Raises:
          GameError: `config.game` is unknown or unplayable.
        """
        self.config = config
        self.num_environments = num_environments
        self._emulators = make_emulators(config, num_environments, AutoresetMode.SAME_STEP)
        self._seeds = emulator_seeds(seed, num_environments)
        self._lives_matter = training and config.life_loss_ends_episode
        self._lives: np.ndarray | None = None  # None before the first reset
        self._never = np.zeros(num_environments, bool)

    @property
    def frame_spec(self) -> FrameSpec:
        """uint8 [screen_size, screen_size]."""
        return atari_frame(self.config.screen_size)

    @property
    def num_actions(self) -> int:
        """Size of the action set: the game's minimal one, or 18."""
        return int(self._emulators.single_action_space.n)

    def reset(self) -> Frames:
        """Starts a new game in every environment, with the same seeds at each call."""
        observation, info = self._emulators.reset(seed=self._seeds)
        self._lives = info['lives']
        return begun(observation[:, 0], self.num_environments)

    def step_frames(self, action: np.ndarray) -> Frames:
        """Takes `action` int32 [E] in each environment.

        Raises:
          RuntimeError: `reset` was never called.
          ValueError: an action is outside the action set.
        """
        if self._lives is None:
            raise RuntimeError('step_frames() before reset(): call reset() first.')
        check_actions(action, self.num_actions)
        observation, reward, terminated, truncated, info = self._emulators.step(action)
        ended = terminated | truncated
        lives = info['lives']
        life_lost = (lives < self._lives) & ~ended & self._lives_matter
        self._lives = lives
        return Frames(
            frame=observation[:, 0],
            reward=reward.astype(np.float32),
            terminated=terminated,
            truncated=truncated,
            life_lost=life_lost,
            first=ended | life_lost,
            last=self._never,
        )

    def close(self) -> None:
        """Ends the emulators' threads."""
        self._emulators.close()

    def __enter__(self) -> 'AtariEnvironment':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
