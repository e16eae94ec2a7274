"""Actor: an environment's frames in, rows for the replay and episode results out (paper, 4.1).

parameters -> policy -> action -> environment -> frame, reward -> adder -> replay
                ^                                  |
                +---------- observation -----------+
"""

import dataclasses
from typing import Any, Protocol

import numpy as np

from agents.config import ActorConfig
from agents.environments.frames import Environment, FrameStack
from agents.exploration import Behaviour
from infra.replay.trajectory import Steps


class Adder(Protocol):
    """The part of the replay's interface that the actor uses (see infra/replay/adder.py)."""

    def add(self, steps: Steps, truncated: np.ndarray, error: np.ndarray | None = None) -> bool:
        """Adds one row per environment, arrays [envs, ...]; False if stopped while waiting."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """One finished game.

    Attributes:
      raw_return: sum of the game's own rewards.
      clipped_return: sum of the rewards the agent learns from.
      agent_steps: decisions in the game.
      epsilon: probability of a random action at the end of the game.
    """

    raw_return: float
    clipped_return: float
    agent_steps: int
    epsilon: float


class EpisodeTally:
    """Sums returns and lengths of the games in a batch of environments."""

    def __init__(self, num_environments: int):
        self._raw = np.zeros(num_environments)
        self._clipped = np.zeros(num_environments)
        self._steps = np.zeros(num_environments, np.int64)

    def add(
        self,
        raw: np.ndarray,
        clipped: np.ndarray,
        ended: np.ndarray,
        epsilon: np.ndarray,
        decided: np.ndarray | int = 1,
    ) -> list[Episode]:
        """Adds one step's rewards and returns the games that ended with it.

        Args:
          raw, clipped: rewards float32 [envs].
          ended: bool [envs], true where a game is over.
          epsilon: float [envs], recorded in the returned episodes.
          decided: bool [envs], whether the step was a decision.
        """
        self._raw += raw
        self._clipped += clipped
        self._steps += decided
        if not ended.any():
            return []
        finished = [
            Episode(
                float(self._raw[i]), float(self._clipped[i]), int(self._steps[i]), float(epsilon[i])
            )
            for i in np.flatnonzero(ended)
        ]
        for total in (self._raw, self._clipped, self._steps):
            total[ended] = 0
        return finished


class Actor:
    """Plays a batch of games and writes their rows to the replay.

    Attributes:
      agent_steps: decisions so far.
      clock: of the parameter server, at the last sync.

    `EnvironmentConfig` and `ActorConfig` set the rules for lives, no-ops and rewards (paper, 5).
    """

    def __init__(
        self,
        config: ActorConfig,
        environment: Environment,
        behaviour: Behaviour,
        adder: Adder,
        parameters: Any,
        frame_stack: int = 4,
    ):
        """
        Args:
          config, environment, behaviour, adder: of the actor.
          parameters: a connected client of the initialised parameter server.
          frame_stack: frames of an observation.
        """
        self._config = config
        self._environment = environment
        self._behaviour = behaviour
        self._adder = adder
        self._parameters = parameters
        num_environments = environment.num_environments
        self._tally = EpisodeTally(num_environments)
        self._stack = FrameStack(num_environments, frame_stack, environment.frame_spec)
        self.agent_steps = 0
        self._frames = environment.reset()
        self._uncounted = 0
        self._steps_since_pull = 0
        self.clock: Any = None
        self.sync()

    @property
    def epsilon(self) -> float:
        """Current probability of a random action, averaged over the environments."""
        return float(self._behaviour.epsilon(self.clock.updates).mean())

    @property
    def run_agent_steps(self) -> int:
        """Estimates the run's agent steps: the clock last pulled plus this actor's steps since.

        Misses at most one pull period of steps of each other actor.
        """
        return self.clock.agent_steps + self._uncounted

    def sync(self) -> Any:
        """Syncs with the parameter server and returns the clock.

        Reports this actor's steps and pulls newer parameters.
        """
        counted, self._uncounted = self._uncounted, 0
        snapshot = self._parameters.pull(agent_steps=counted)
        if snapshot.parts is not None:
            self._behaviour.set_parameters(*snapshot.parts)
        self.clock = snapshot.clock
        self._steps_since_pull = 0
        return self.clock

    def step(self, rng: np.random.Generator) -> list[Episode]:
        """Takes one agent step in every environment and returns the games that ended with it.

        Syncs with the parameter server first, once every `actor_pull_period` steps.

        Raises:
          ReplayTimeout: the replay accepts no rows within its bound (see infra/replay/adder.py).
        """
        if self._steps_since_pull >= self._config.actor_pull_period:
            self.sync()
        seen, updates = self._frames, self.clock.updates
        observation = self._stack.push(seen.frame, seen.first)
        action, error = self._behaviour.act(observation, updates, rng)
        result = self._environment.step_frames(action)
        clipped = np.clip(result.reward, -1.0, 1.0) if self._config.clip_reward else result.reward
        episode_end = result.terminated | result.life_lost
        discount = np.where(episode_end, 0.0, 1.0).astype(np.float32)
        self._behaviour.rewarded(clipped, discount)
        steps = Steps(seen.frame, action, clipped, discount, seen.first)
        # No transition begins at an episode's last observation or reaches over it; one that ends at
        # it bootstraps from it. Where it is not shown, none reaches to the episode's end.
        cut = seen.last | (result.truncated & ~result.last & ~episode_end)
        self._adder.add(steps, cut, error)
        self._frames = result
        self._count(int(np.count_nonzero(~seen.last)))
        game_over = result.terminated | result.truncated
        epsilon = self._behaviour.epsilon(updates)
        return self._tally.add(result.reward, clipped, game_over, epsilon, ~seen.last)

    def _count(self, decisions: int) -> None:
        self.agent_steps += decisions
        self._uncounted += decisions
        self._steps_since_pull += 1
