"""Behaviour: observations in, epsilon-greedy actions and errors of completed transitions out.

Epsilon is either annealed over the global updates (Nair et al. 2015, section 5) or fixed for each
environment by a ladder (Horgan et al. 2018, section 4.1).
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from agents.actor_priorities import InitialPriorities
from agents.config import ActorConfig
from infra.annealing import linear


class Policy(Protocol):
    """The part of a policy's interface that `Behaviour` uses (see agents/policy.py)."""

    def act(self, observation: Any) -> np.ndarray:
        """Greedy actions, int32 [envs], for observations [envs, ...], nested or not."""

    def evaluate(self, observation: Any) -> tuple[np.ndarray, np.ndarray]:
        """Greedy actions int32 [envs] and outputs of all actions [envs, num_actions, ...]."""

    def set_parameters(self, *parts: Any) -> None:
        """Assigns float32 vectors that make up [parameters] to the network."""


Epsilon = Callable[[int], np.ndarray]
"""Maps a number of global updates to probabilities of a random action, float [envs]."""


def annealed(config: ActorConfig) -> Epsilon:
    """Anneals epsilon linearly over the global updates, equal in every environment."""

    def epsilon(updates: int) -> np.ndarray:
        value = linear(config.epsilon_start, config.epsilon_end, updates, config.epsilon_updates)
        return np.full(config.envs_per_actor, value)

    return epsilon


def ladder(config: ActorConfig, actor: int, num_actors: int) -> Epsilon:
    """Fixes epsilon at ladder_epsilon^(1 + i / (N - 1) ladder_exponent) for environment i of N.

    N counts the environments of all actors. A single environment has `ladder_epsilon`.
    """
    count = config.envs_per_actor
    place = (actor * count + np.arange(count)) / max(num_actors * count - 1, 1)
    values = config.ladder_epsilon ** (1 + place * config.ladder_exponent)
    return lambda updates: values


class Behaviour:
    """Chooses epsilon-greedy actions of a policy."""

    def __init__(
        self,
        policy: Policy,
        epsilon: Epsilon,
        num_actions: int,
        priorities: InitialPriorities | None = None,
    ) -> None:
        """Without `priorities`, `act` returns no errors and runs the network only if needed."""
        self._policy = policy
        self._epsilon = epsilon
        self._num_actions = num_actions
        self._priorities = priorities
        self._acted: tuple[np.ndarray, np.ndarray] | None = None  # outputs and action of this step

    def epsilon(self, updates: int) -> np.ndarray:
        """Probabilities of a random action after `updates` global updates, float [envs]."""
        return self._epsilon(updates)

    def set_parameters(self, *parts: Any) -> None:
        """Sets the policy's parameters."""
        self._policy.set_parameters(*parts)

    def act(
        self, observation: Any, updates: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Actions int32 [envs] and absolute errors float32 [envs] of the completed transitions.

        The errors are None without `priorities`, and while no transition is complete.
        """
        epsilon = self._epsilon(updates)
        explore = rng.random(len(epsilon)) < epsilon
        action = rng.integers(self._num_actions, size=len(epsilon), dtype=np.int32)
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
        """Records the rewards and discounts of the last actions, float32 [envs] each."""
        if self._priorities is not None and self._acted is not None:
            self._priorities.began(*self._acted, reward, discount)
