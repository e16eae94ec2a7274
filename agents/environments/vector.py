"""Gymnasium's vector environments: actions in, observations, rewards and ends of episodes out."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import tree
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv

from agents.environments.atari import check_actions
from agents.environments.checked import VectorRules, brief_space
from agents.environments.errors import EnvironmentFailedError, failure_text
from agents.environments.frames import Frames, begun
from agents.environments.observations import MOST_VALUES, Observations
from agents.environments.processes import close_processes, lost
from infra.named_function import brief


class VectorEnvironment:
    """E environments of gymnasium, in a `with`; their frames are those of `Observations`.

    With next-step resets, which gymnasium's own vector environments have by default, the last
    observation of an episode is a frame of its own, from which a truncated episode bootstraps.
    Same-step resets and none show the next episode at once: a transition that would bootstrap from
    a truncated episode's last observation is left out.
    """

    def __init__(
        self,
        name: str,
        environments: VectorEnv,
        seed: int | list[int],
        rules: VectorRules | None = None,
    ) -> None:
        """
        Args:
          name: stands in errors.
          environments: to step; closed with this object.
          seed: of all, or one for each, which not every vector environment takes.
          rules: what they must obey; None if each is `Checked`.

        Raises:
          EnvironmentFailedError: its actions, observations or resets are of an unknown kind.
        """
        self._name = name
        self._envs = environments
        self._mode = mode_of(name, environments)
        self._start, self._num_actions = actions_of(name, environments.single_action_space)
        self._observations = Observations(name, environments.single_observation_space)
        self._rules = rules
        self.num_environments = environments.num_envs
        self._seed = seed
        self._last = np.zeros(self.num_environments, bool)
        self._steps = 0

    @property
    def num_actions(self) -> int:
        """Size of the action set."""
        return self._num_actions

    @property
    def frame_spec(self) -> Any:
        """Of the frames, a `FrameSpec` or a nest of them."""
        return self._observations.frame_spec

    def reset(self) -> Frames:
        """Starts an episode in every environment, with the same seeds at each call.

        Raises:
          EnvironmentFailedError: it raises an error, or shows what its space does not contain.
        """
        self._last, self._steps = np.zeros(self.num_environments, bool), 0
        observation, _ = self._call(self._envs.reset, seed=self._seed)
        return begun(self._frame(observation), self.num_environments)

    def step_frames(self, action: np.ndarray) -> Frames:
        """Takes `action` int32 [E].

        Raises:
          ValueError: an action is outside the action set.
          EnvironmentFailedError: it raises an error, or shows what its space does not contain.
        """
        check_actions(action, self._num_actions)
        self._steps += 1
        actions = action.astype(np.int64) + self._start
        observation, reward, terminated, truncated, _ = self._call(self._envs.step, actions)
        if self._rules is not None and (fault := self._rules.broken_by_rewards(reward)):
            raise self._failed(*fault)
        ended = terminated | truncated
        next_step = self._mode == AutoresetMode.NEXT_STEP
        frame = self._frame(observation)
        if self._mode == AutoresetMode.DISABLED and ended.any():
            frame = self._reset(ended, frame)
        first = self._last if next_step else ended
        self._last = ended if next_step else np.zeros_like(ended)
        return Frames(
            frame=frame,
            reward=np.array(reward, np.float32),
            terminated=terminated,
            truncated=truncated,
            life_lost=np.zeros_like(ended),
            first=first,
            last=self._last,
        )

    def render(self) -> np.ndarray:
        """The picture of the first environment, uint8 [height, width, 3].

        Raises:
          EnvironmentFailedError: it draws none.
        """
        picture, reason = np.asarray(None), ''
        try:
            if pictures := self._envs.render():
                picture = np.asarray(pictures[0])
        except Exception as error:  # the user's code, or a missing package, may raise anything
            reason = f' ({brief(error)})'
        if picture.dtype.kind == 'f':
            picture = np.round(255 * picture).astype(np.uint8)
        if picture.dtype != np.uint8 or picture.ndim != 3:
            raise EnvironmentFailedError(
                f'{self._name}: draws no picture{reason}. Fix: let it take render_mode rgb_array,'
                ' or install what it draws with, or film nothing (--no-video).'
            )
        return picture

    def close(self) -> None:
        """Closes the environments; processes of their own end within seconds."""
        inner = self._envs.unwrapped
        if isinstance(inner, AsyncVectorEnv):
            close_processes(inner)
        self._envs.close()

    def __enter__(self) -> 'VectorEnvironment':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _reset(self, ended: np.ndarray, frame: Any) -> Any:
        """Starts the next episode where one has `ended` bool [E]; returns the frames.

        Raises:
          EnvironmentFailedError: others start, too.
        """
        options = {'reset_mask': ended.copy()}
        observation, _ = self._call(self._envs.reset, options=options)
        started = self._frame(observation)
        pairs = zip(tree.flatten(started), tree.flatten(frame))
        if not all(np.array_equal(after[~ended], before[~ended]) for after, before in pairs):
            what = 'reset starts episodes outside reset_mask'
            raise self._failed(what, 'reset only those that options["reset_mask"] names')
        return started

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
          EnvironmentFailedError: the method raises an error.
        """
        try:
            return method(*args, **kwargs)
        except EnvironmentFailedError:
            raise
        except Exception as error:  # the user's code may raise anything
            called = method.__name__
            inner = self._envs.unwrapped
            if isinstance(inner, AsyncVectorEnv) and inner.closed:
                # Which error comes of it depends on how far the call was.
                what = f'{called} did not end before close() ({failure_text(error)})'
                raise self._failed(what, f'call close() after the last {called}()') from error
            broken = isinstance(error, (EOFError, ConnectionError))
            number = lost(inner) if broken and isinstance(inner, AsyncVectorEnv) else None
            what = f'{called} {failure_text(error)}'
            raise self._failed(what, f'correct its {called}()', number) from error

    def _frame(self, observation: Any) -> Any:
        """A copy of the observations, as frames.

        Raises:
          EnvironmentFailedError: one breaks the rules.
        """
        if self._rules is not None and (fault := self._rules.broken_by(observation)):
            raise self._failed(*fault)
        return self._observations.frames(observation)

    def _failed(self, what: str, remedy: str, number: int | None = None) -> EnvironmentFailedError:
        which = '' if number is None else f', environment {number}'
        where = f'{self._name}{which}, step {self._steps}'
        return EnvironmentFailedError(f'{where}: {what}. Fix: {remedy}.')


def mode_of(name: str, environments: VectorEnv) -> AutoresetMode:
    """When the environments start the next episode.

    Raises:
      EnvironmentFailedError: they do not say.
    """
    # gymnasium's own write it to metadata that all environments of a class share.
    own = getattr(environments.unwrapped, 'autoreset_mode', None)
    declared = own or environments.metadata.get('autoreset_mode')
    if isinstance(declared, AutoresetMode):
        return declared
    modes = ' or '.join(str(mode) for mode in AutoresetMode)
    raise EnvironmentFailedError(
        f"{name}: metadata['autoreset_mode'] is {declared!r}. Fix: set it to {modes}."
    )


def actions_of(name: str, space: gymnasium.Space) -> tuple[int, int]:
    """First and number of a space's actions.

    Raises:
      EnvironmentFailedError: they are not numbered, or too many.
    """
    if not isinstance(space, spaces.Discrete):
        raise EnvironmentFailedError(
            f'{name}: actions {brief_space(space)} are not discrete. Fix: choose an environment'
            ' with a Discrete action space, or wrap it to have one.'
        )
    require_few_actions(name, int(space.n))
    return int(space.start), int(space.n)


def require_few_actions(name: str, count: int) -> None:
    """
    Raises:
      EnvironmentFailedError: a network cannot have an output for each action.
    """
    if count > MOST_VALUES:
        raise EnvironmentFailedError(
            f'{name}: {count:,} actions are more than {MOST_VALUES:,}. Fix: wrap the environment to'
            ' have fewer.'
        )
