"""Actor: an environment's frames in, rows for the replay and episode results out (paper, 4.1).

parameters -> policy -> action -> environment -> frame, reward -> adder -> replay
                ^                                  |
                +---------- observation -----------+
"""

import dataclasses
from typing import Any, Protocol

import numpy as np

from agents.config import ActorConfig
from agents.environment import AtariEnvironment, FrameStack


class Policy(Protocol):
    """What the actor needs of an agent (see agents/dqn.py)."""

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Greedy actions, int32 [envs], for uint8 [envs, 84, 84, stack]."""

    def set_parameters(self, *parts: Any) -> None:
        """Assigns float32 vectors that make up [parameters] to the network."""


class Adder(Protocol):
    """What the actor needs of the replay (see infra/replay/adder.py)."""

    def add(
        self,
        frame: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        discount: np.ndarray,
        first: np.ndarray,
        truncated: np.ndarray,
    ) -> bool:
        """One row an environment, all arrays [envs, ...]; False: asked to stop while it waited."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """One finished game.

    Attributes:
      raw_return: sum of the game's own rewards.
      clipped_return: sum of the rewards as the agent was given them.
      agent_steps: decisions in the game.
    """

    raw_return: float
    clipped_return: float
    agent_steps: int


def annealed_epsilon(config: ActorConfig, updates: int) -> float:
    """Linear from `epsilon_start` to `epsilon_end` over the global updates (paper, section 5)."""
    progress = min(updates / max(config.epsilon_updates, 1), 1.0)
    return config.epsilon_start + progress * (config.epsilon_end - config.epsilon_start)


class EpisodeTally:
    """Adds up returns and lengths of the games of a batch of environments."""

    def __init__(self, num_environments: int):
        self._raw = np.zeros(num_environments)
        self._clipped = np.zeros(num_environments)
        self._steps = np.zeros(num_environments, np.int64)

    def add(self, raw: np.ndarray, clipped: np.ndarray, ended: np.ndarray) -> list[Episode]:
        """Adds one step's rewards, float32 [envs]; returns the games that `ended`, bool [envs]."""
        self._raw += raw
        self._clipped += clipped
        self._steps += 1
        if not ended.any():
            return []
        finished = [
            Episode(float(self._raw[i]), float(self._clipped[i]), int(self._steps[i]))
            for i in np.flatnonzero(ended)
        ]
        for total in (self._raw, self._clipped, self._steps):
            total[ended] = 0
        return finished


class Actor:
    """Plays a batch of games epsilon-greedily and writes what happens to the replay.

    Its life loss, no-op and reward rules are the environment's and `ActorConfig`'s (paper, 5).
    """

    def __init__(
        self,
        config: ActorConfig,
        environment: AtariEnvironment,
        policy: Policy,
        adder: Adder,
        parameters: Any,
    ):
        """`parameters` is a connected client of the initialised parameter server."""
        self._config = config
        self._environment = environment
        self._policy = policy
        self._adder = adder
        self._parameters = parameters
        num_environments = environment.num_environments
        self._tally = EpisodeTally(num_environments)
        self._stack = FrameStack(num_environments, environment.config.frame_stack)
        self._frames = environment.reset()
        self._uncounted = 0
        self._steps_since_pull = 0
        self.clock: Any = None
        self.look()

    @property
    def epsilon(self) -> float:
        """Today's probability of a random action."""
        return annealed_epsilon(self._config, self.clock.updates)

    def look(self) -> Any:
        """Reports the agent steps made, takes newer parameters if there are any; the clock."""
        counted, self._uncounted = self._uncounted, 0
        snapshot = self._parameters.pull(agent_steps=counted)
        if snapshot.parts is not None:
            self._policy.set_parameters(*snapshot.parts)
        self.clock = snapshot.clock
        self._steps_since_pull = 0
        return self.clock

    def step(self, rng: np.random.Generator) -> list[Episode]:
        """One agent step in every environment; returns the games that ended with it.

        Every `actor_pull_period` steps it looks at the parameter server first.

        Raises:
          ReplayTimeout: the replay took no more rows within its bound (see infra/replay/adder.py).
        """
        if self._steps_since_pull >= self._config.actor_pull_period:
            self.look()
        seen = self._frames
        action = self._select(self._stack.push(seen.frame, seen.first), rng)
        result = self._environment.step_frames(action)
        clipped = np.clip(result.reward, -1.0, 1.0) if self._config.clip_reward else result.reward
        game_over = result.terminated | result.truncated
        episode_end = result.terminated | result.life_lost
        self._adder.add(
            frame=seen.frame,
            action=action,
            reward=clipped,
            discount=np.where(episode_end, 0.0, 1.0).astype(np.float32),
            first=seen.first,
            truncated=result.truncated & ~episode_end,
        )
        self._frames = result
        self._uncounted += len(action)
        self._steps_since_pull += 1
        return self._tally.add(result.reward, clipped, game_over)

    def _select(self, observation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Epsilon-greedy actions, int32 [envs]; the network runs only when one needs it."""
        count = len(observation)
        explore = rng.random(count) < self.epsilon
        action = rng.integers(self._environment.num_actions, size=count, dtype=np.int32)
        if not explore.all():
            action = np.where(explore, action, self._policy.act(observation))
        return action
