"""Behaviour: observations in, epsilon-greedy actions out, with the priorities of what is completed.

Epsilon is either annealed by the global updates (Nair et al. 2015, section 5) or one of a ladder,
for each environment its own (Horgan et al. 2018, section 4.1).
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from agents.config import ActorConfig
from agents.initial_priorities import InitialPriorities


class Policy(Protocol):
    """What behaviour needs of an agent (see agents/policy.py)."""

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Greedy actions, int32 [envs], for uint8 [envs, 84, 84, stack]."""

    def evaluate(self, observation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Greedy actions, int32 [envs], and outputs of all actions [envs, num_actions, ...]."""

    def set_parameters(self, *parts: Any) -> None:
        """Assigns float32 vectors that make up [parameters] to the network."""


Epsilon = Callable[[int], np.ndarray]
"""Probabilities of a random action, float [envs], after so many global updates."""


def annealed(config: ActorConfig) -> Epsilon:
    """Linear from `epsilon_start` to `epsilon_end` over the global updates, alike everywhere."""

    def epsilon(updates: int) -> np.ndarray:
        progress = min(updates / max(config.epsilon_updates, 1), 1.0)
        value = config.epsilon_start + progress * (config.epsilon_end - config.epsilon_start)
        return np.full(config.envs_per_actor, value)

    return epsilon


def ladder(config: ActorConfig, actor: int, num_actors: int) -> Epsilon:
    """ladder_epsilon^(1 + i / (N - 1) ladder_exponent) for environment i of all N, fixed.

    Environments are numbered through all actors; a single one has ladder_epsilon.
    """
    count = config.envs_per_actor
    place = (actor * count + np.arange(count)) / max(num_actors * count - 1, 1)
    values = config.ladder_epsilon ** (1 + place * config.ladder_exponent)
    return lambda updates: values


class Behaviour:
    """Epsilon-greedy over a policy."""

    def __init__(
        self,
        policy: Policy,
        epsilon: Epsilon,
        num_actions: int,
        priorities: InitialPriorities | None = None,
    ) -> None:
        """Without `priorities` none are computed, and the network runs only when it is needed."""
        self._policy = policy
        self._epsilon = epsilon
        self._num_actions = num_actions
        self._priorities = priorities
        self._acted: tuple[np.ndarray, np.ndarray] | None = None  # outputs and action of this step

    def epsilon(self, updates: int) -> np.ndarray:
        """Today's probabilities of a random action, float [envs]."""
        return self._epsilon(updates)

    def set_parameters(self, *parts: Any) -> None:
        """Sets the policy's parameters."""
        self._policy.set_parameters(*parts)

    def act(
        self, observation: np.ndarray, updates: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Actions int32 [envs], and |error| float32 [envs] of the transitions completed by what is
        seen now; None: none are, or none are computed."""
        count = len(observation)
        explore = rng.random(count) < self._epsilon(updates)
        action = rng.integers(self._num_actions, size=count, dtype=np.int32)
        if self._priorities is None:
            if not explore.all():
                action = np.where(explore, action, self._policy.act(observation))
            return action, None
        best, outputs = self._policy.evaluate(observation)
        error = self._priorities.completed(outputs, best)
        action = np.where(explore, action, best)
        self._acted = outputs, action
        return action, error

    def rewarded(self, reward: np.ndarray, discount: np.ndarray) -> None:
        """Takes what the actions brought, float32 [envs] each."""
        if self._priorities is not None and self._acted is not None:
            self._priorities.began(*self._acted, reward, discount)
