"""Environments by name: an Atari game, a gymnasium id or `module:function` in, E of them open out.

This module does not import TensorFlow.
"""

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import logging
import os
import re
from collections.abc import Callable
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from agents.config import FACTORY, EnvironmentConfig
from agents.environments.atari import AtariEnvironment, emulator_seeds
from agents.environments.checked import Checked
from agents.environments.errors import EnvironmentFailedError
from agents.environments.frames import Environment
from agents.environments.vector import VectorEnvironment
from agents.games import GameError, rom_id
from infra.named_function import NoFunctionError, brief, load_function

_NEAR = 3
_OTHER = re.compile(r'[:/]|-v\d+$')  # in ids, but in no spelling of a game


@dataclasses.dataclass(frozen=True)
class Opening:
    """What a user's factory is told, beside the seed.

    Attributes:
      num_environments: of a vector or batched environment.
      training: false in an evaluation.
      render_mode: 'rgb_array' if pictures will be asked for, else None.
    """

    num_environments: int
    training: bool = True
    render_mode: str | None = None


class Simulated(Environment, Protocol):
    """Environments that can show a picture."""

    def render(self) -> np.ndarray:
        """The picture of the first environment, uint8 [height, width, 3]."""


def check_name(text: str) -> str:
    """The name of the game or environment that a user's spelling means.

    Raises:
      GameError: there is no such game, and the text is no name of another environment.
      EnvironmentFailedError: no environment or function has that name.
    """
    if FACTORY.fullmatch(text):
        try:
            load_function(text)
        except NoFunctionError as error:
            raise EnvironmentFailedError(f'{error}. Fix: correct the name.') from error
        return text
    try:
        return rom_id(text)
    except GameError:
        if not _OTHER.search(text):
            raise
    package, _, env_id = text.rpartition(':')
    try:
        if package:
            importlib.import_module(package)
        _register(env_id)
        gymnasium.spec(env_id)
    except Exception as error:  # of any kind: the import of the package that registers it
        raise EnvironmentFailedError(
            f'{text}: unknown ({brief(error)}){_nearest(text)}. Fix: correct the id, or install the'
            ' package that registers it (package:Id-v0 imports it first).'
        ) from error
    return text


def _register(env_id: str) -> None:
    """Lets installed packages register their environments if none has this id.

    Packages name a function for this as an entry point; gymnasium no longer calls it.
    """
    if env_id in gymnasium.registry:
        return
    for point in importlib.metadata.entry_points(group='gymnasium.envs'):
        logging.debug('registering the environments of %s', point.name)
        point.load()()


def _nearest(text: str) -> str:
    near = difflib.get_close_matches(text, gymnasium.registry, _NEAR)
    return f'; did you mean {" or ".join(near)}?' if near else ''


def open_environment(config: EnvironmentConfig, num_environments: int, seed: int) -> Environment:
    """Opens environments for training; equal seeds give equal ones.

    Args:
      config: which, and how.
      num_environments: E.
      seed: of all.

    Raises:
      GameError: the Atari game cannot be played.
      EnvironmentFailedError: the environment cannot be opened or used.
    """
    if config.is_atari:
        return AtariEnvironment(config, num_environments, seed)
    return open_simulation(config, seed, Opening(num_environments))


def open_simulation(config: EnvironmentConfig, seed: int, opening: Opening) -> Simulated:
    """Opens environments other than Atari's; equal seeds give equal ones.

    Raises:
      EnvironmentFailedError: the environment cannot be opened or used.
    """
    if opening.render_mode is not None:  # pygame draws without a screen and plays no sound
        os.environ.setdefault('SDL_VIDEODRIVER', 'dummy')
        os.environ.setdefault('SDL_AUDIODRIVER', 'dummy')
    if FACTORY.fullmatch(config.game):
        return _of_the_user(config, seed, opening)
    make = functools.partial(_made, config.game, opening.render_mode)
    return _vectorised(config, [make] * opening.num_environments, seed)


def _made(name: str, render_mode: str | None) -> gymnasium.Env:
    """One environment of a gymnasium id.

    Raises:
      EnvironmentFailedError: it cannot be made.
    """
    try:
        _register(name.rpartition(':')[2])
        # Its own checks only warn.
        env = gymnasium.make(name, render_mode=render_mode, disable_env_checker=True)
    except Exception as error:  # a missing package raises what it likes
        raise EnvironmentFailedError(
            f'{name}: {brief(error)}. Fix: install what it needs, or choose another.'
        ) from error
    return Checked(env, name)


def _vectorised(
    config: EnvironmentConfig, makers: list[Callable[[], gymnasium.Env]], seed: int
) -> VectorEnvironment:
    """Steps environments in turn, or each in a process of its own."""
    mode = AutoresetMode.NEXT_STEP
    environments: VectorEnv
    if config.env_processes:
        # A fork of a process with TensorFlow's and gRPC's threads may hang.
        environments = AsyncVectorEnv(makers, autoreset_mode=mode, context='spawn')
    else:
        environments = SyncVectorEnv(makers, autoreset_mode=mode)
    return VectorEnvironment(config.game, environments, seed)


def _of_the_user(config: EnvironmentConfig, seed: int, opening: Opening) -> Simulated:
    """What the user's factory makes, as environments.

    Raises:
      EnvironmentFailedError: it raises an error, or makes something else.
    """
    name, count = config.game, opening.num_environments
    make = functools.partial(_call, name, opening)
    seeds = [int(each) for each in emulator_seeds(seed, count)]
    first = make(seed=seeds[0])
    if isinstance(first, gymnasium.Env):
        if not config.env_processes:
            makers = [lambda: Checked(first, name)]
        else:
            first.close()
            makers = [functools.partial(_checked, name, make, seeds[0])]
        makers += [functools.partial(_checked, name, make, each) for each in seeds[1:]]
        return _vectorised(config, makers, seed)
    if isinstance(first, VectorEnv):
        _require_count(name, first.num_envs, count)
        return VectorEnvironment(name, first, seed)
    from tf_agents.environments import py_environment

    from agents.environments.tf_agents import TfAgentsEnvironment

    if isinstance(first, py_environment.PyEnvironment):
        if not first.batched:
            return TfAgentsEnvironment(name, [first, *(make(seed=each) for each in seeds[1:])])
        _require_count(name, first.batch_size or 1, count)
        return TfAgentsEnvironment(name, [first])
    raise EnvironmentFailedError(
        f'{name}: returned {type(first).__name__}. Fix: return a gymnasium.Env, a'
        ' gymnasium.vector.VectorEnv or a PyEnvironment of TF-Agents.'
    )


def _call(name: str, opening: Opening, seed: int) -> Any:
    try:
        return load_function(name)(seed, opening)
    except Exception as error:  # the user's code may raise anything
        raise EnvironmentFailedError(
            f'{name}: {brief(error)}. Fix: correct the function, which gets a seed and an Opening'
            ' (num_environments, training, render_mode).'
        ) from error


def _checked(name: str, make: Callable[..., gymnasium.Env], seed: int) -> gymnasium.Env:
    return Checked(make(seed=seed), name)


def _require_count(name: str, held: int, wanted: int) -> None:
    """
    Raises:
      EnvironmentFailedError: a vector environment is of another size.
    """
    if held != wanted:
        raise EnvironmentFailedError(
            f'{name}: holds {held} environments, not {wanted}. Fix: make as many as'
            ' Opening.num_environments says, or set --envs_per_actor.'
        )
