"""Environments by name: an Atari game, a gymnasium id or `module:function` in, E of them open out.

This module does not import TensorFlow.
"""

import dataclasses
import difflib
import functools
import importlib.metadata
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from agents.config import FACTORY, EnvironmentConfig
from agents.environments.atari import AtariEnvironment, emulator_seeds
from agents.environments.checked import Checked, VectorRules, described
from agents.environments.errors import EnvironmentFailedError, failure_text, opening_failed
from agents.environments.frames import Environment
from agents.environments.processes import in_processes
from agents.environments.vector import VectorEnvironment
from agents.games import GameError, rom_id
from infra.named_function import NoFunctionError, brief, load_function, load_module

_NEAR = 3
_OTHER = re.compile(r'[:/]|-v\d+$')  # in ids, but in no spelling of a game


@dataclasses.dataclass(frozen=True)
class Opening:
    """What a user's factory gets beside the seed.

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
    if text.startswith(':') or text.endswith(':'):
        raise EnvironmentFailedError(f'{text}: not module:function. Fix: name both.')
    if FACTORY.fullmatch(text):
        try:
            load_function(text)
        except NoFunctionError as error:
            raise EnvironmentFailedError(f'{error}. Fix: correct the name.') from error
        return text
    try:
        return rom_id(text)
    except GameError:
        if not _OTHER.search(text) and not _ids_of(text):
            raise
    try:
        _register(text)
        gymnasium.spec(text.rpartition(':')[2])  # the module before it is imported
    except Exception as error:  # of any kind: the import of the package that registers it
        near = _ids_of(text) or difflib.get_close_matches(text, gymnasium.registry, _NEAR)
        missing = isinstance(error, ImportError) or not near
        why = brief(error) if missing else f'did you mean {" or ".join(near)}?'
        raise EnvironmentFailedError(
            f'{text}: unknown ({why}). Fix: correct the id, or install the package that registers'
            ' it (package:Id-v0 imports it first).'
        ) from error
    return text


def _register(name: str) -> None:
    """Imports the package of a name; lets installed packages register theirs for an unknown id."""
    package, _, env_id = name.rpartition(':')
    if package:
        load_module(package)
    if env_id not in gymnasium.registry:
        _register_installed()


@functools.cache
def _register_installed() -> None:
    """Packages name a function for this as an entry point; gymnasium no longer calls it."""
    for point in importlib.metadata.entry_points(group='gymnasium.envs'):
        try:
            register = point.load()
            if point.attr:
                register()
        except Exception as error:  # another package's must not stand in the way
            logging.warning('%s registers no environments: %s', point.value, brief(error))


def _ids_of(name: str) -> list[str]:
    """The newest ids that differ from `name` in case and version only."""
    wanted = name.lower()
    ids = [known for known in gymnasium.registry if known.lower().rpartition('-v')[0] == wanted]
    return sorted(ids, key=lambda known: gymnasium.registry[known].version or 0)[-1:]


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
        _register(name)
        shown = {} if render_mode is None else {'render_mode': render_mode}  # not all know the word
        return gymnasium.make(name, disable_env_checker=True, **shown)  # its own checks only warn
    except Exception as error:  # a missing package raises what it likes
        raise opening_failed(name, error, 'correct it, or choose another') from error


def _vectorised(
    config: EnvironmentConfig, makers: Sequence[Callable[[], gymnasium.Env]], seed: int
) -> VectorEnvironment:
    """Steps environments in turn, or each in a process of its own.

    Raises:
      EnvironmentFailedError: they cannot be made, or differ.
    """
    name, seeds = config.game, _seeds(seed, len(makers))
    checked = [functools.partial(_checked, name, i, make) for i, make in enumerate(makers)]
    environments: VectorEnv
    try:
        if config.env_processes:
            environments = in_processes(checked)
        else:
            environments = SyncVectorEnv(checked, autoreset_mode=AutoresetMode.NEXT_STEP)
    except EnvironmentFailedError:
        raise
    except Exception as error:  # a process that ends, spaces that differ
        text = failure_text(error)
        raise EnvironmentFailedError(f'{name}: {text}. Fix: {_remedy(error)}.') from error
    return _stepped(name, environments, seeds)


def _remedy(error: Exception) -> str:
    """What to do about environments that cannot be stepped together."""
    bootstrapping = 'bootstrapping phase' in str(error)  # Python's word for a child that has none
    if bootstrapping or isinstance(error, (EOFError, ConnectionError)):
        return "correct what ended it; a script opens it below if __name__ == '__main__'"
    if re.search(r'(observation|action)[ _]space', str(error)):
        return 'let each seed make an environment of the same spaces'
    return 'correct it'


def _stepped(
    name: str, environments: VectorEnv, seed: int | list[int], rules: VectorRules | None = None
) -> VectorEnvironment:
    try:
        return VectorEnvironment(name, environments, seed, rules)
    except BaseException:
        environments.close()
        raise


def _seeds(seed: int, count: int) -> list[int]:
    return [int(each) for each in emulator_seeds(seed, count)]


def _of_the_user(config: EnvironmentConfig, seed: int, opening: Opening) -> Simulated:
    """What the user's factory makes, as environments.

    Raises:
      EnvironmentFailedError: it raises an error, or makes something else.
    """
    name, count = config.game, opening.num_environments
    seeds = _seeds(seed, count)
    makers = [functools.partial(_call, name, opening, each) for each in seeds]
    first = makers[0]()
    if isinstance(first, gymnasium.Env):
        if config.env_processes:
            first.close()
            return _vectorised(config, makers, seed)
        return _vectorised(config, [lambda: first, *makers[1:]], seed)
    if isinstance(first, VectorEnv):
        _require_no_processes(config, first)
        spaces_of_one = ('single_observation_space', 'single_action_space')
        _require_spaces(name, first, 'observation_space', *spaces_of_one)
        _require_count(name, first.num_envs, count)
        return _stepped(name, first, seeds[0], VectorRules(first))
    from tf_agents.environments import py_environment

    from agents.environments.tf_agents import TfAgentsEnvironment

    if isinstance(first, py_environment.PyEnvironment):
        _require_no_processes(config, first)
        if not first.batched:
            return TfAgentsEnvironment(name, [first, *(make() for make in makers[1:])])
        _require_count(name, first.batch_size or 1, count)
        return TfAgentsEnvironment(name, [first])
    raise EnvironmentFailedError(
        f'{name}: returned {type(first).__name__}. Fix: return a gymnasium.Env, a'
        ' gymnasium.vector.VectorEnv or a PyEnvironment of TF-Agents.'
    )


def _require_no_processes(config: EnvironmentConfig, made: Any) -> None:
    """
    Raises:
      EnvironmentFailedError: `env_processes` is set, which needs environments one by one.
    """
    if config.env_processes:
        made.close()
        raise EnvironmentFailedError(
            f'{config.game}: --env_processes has no effect on a {type(made).__name__}, which steps'
            ' its environments itself. Fix: omit it, or return a gymnasium.Env.'
        )


def _call(name: str, opening: Opening, seed: int) -> Any:
    try:
        return load_function(name)(seed, opening)
    except Exception as error:  # the user's code may raise anything
        remedy = (
            'correct the function, which gets a seed and an Opening (num_environments, training,'
            ' render_mode)'
        )
        raise opening_failed(name, error, remedy) from error


def _checked(name: str, number: int, make: Callable[[], gymnasium.Env]) -> gymnasium.Env:
    made = make()
    _require_spaces(name, made, 'observation_space', 'action_space')
    return Checked(made, name, number)


def _require_spaces(name: str, made: Any, *attributes: str) -> None:
    """
    Raises:
      EnvironmentFailedError: the environment lacks a space.
    """
    for attribute in attributes:
        held = getattr(made, attribute, None)
        if not isinstance(held, gymnasium.Space):
            raise EnvironmentFailedError(
                f'{name}: {attribute} is {described(held)}, not a space. Fix: set it to a space of'
                ' gymnasium.spaces.'
            )


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
