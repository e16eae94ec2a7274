"""Small agents of the family and random transitions, for tests."""

import dataclasses
from typing import Any

import numpy as np

from agents import dqn, py_environment
from agents.config import AgentConfig, EnvironmentConfig, NetworkConfig
from agents.flat_variables import FlatVariables
from agents.gradient import AgentGradient
from agents.model import family_model
from infra.replay.trajectory import Transition

NUM_ACTIONS = 3
NETWORK = NetworkConfig('dqn2013')
ENVIRONMENT = EnvironmentConfig()
FAMILY: dict[str, dict[str, Any]] = {
    'dqn': {},
    'c51': {'agent': 'c51'},
    'qr_dqn': {'agent': 'qr_dqn', 'num_quantiles': 5},
    'iqn': {'agent': 'iqn', 'num_fractions': 3, 'num_acting_fractions': 5, 'num_cosines': 4},
    'munchausen_iqn': {'agent': 'iqn', 'munchausen': True, 'munchausen_temperature': 0.5},
    'munchausen': {'munchausen': True, 'munchausen_temperature': 0.5},
}
"""Values of `AgentConfig` that make each member."""


def make(seed: int = 0, dueling: bool = False, **values: Any) -> dqn.DqnAgent:
    """An agent for three actions; `values` are those of its configuration."""
    return dqn.make_agent(
        AgentConfig(**values),
        dataclasses.replace(NETWORK, dueling=dueling),
        py_environment.time_step_spec(ENVIRONMENT),
        py_environment.action_spec(NUM_ACTIONS),
        seed=seed,
    )


def gradient(clip_norm: float = 0.0, weighted: bool = False, **values: Any) -> AgentGradient:
    """Of an agent whose target is not its network, and whose values spread over some units."""
    result = AgentGradient(family_model(make(**values)), clip_norm, weighted)
    result.set_parameters(3 * result.parameters())
    other = make(**{**values, 'seed': 1}).q_network.trainable_variables
    result.set_target(3 * FlatVariables(other).values())
    return result


def agent_of(result: AgentGradient) -> dqn.DqnAgent:
    """The agent behind a gradient."""
    agent = result.model.agent
    assert isinstance(agent, dqn.DqnAgent)
    return agent


def frames(seed: int, *shape: int) -> np.ndarray:
    """Random observations, uint8 [*shape, 84, 84, 4]."""
    return np.random.default_rng(seed).integers(256, size=(*shape, 84, 84, 4), dtype=np.uint8)


def transition(batch_size: int = 6, gamma_n: float = 0.9) -> Transition:
    """Rewards on both sides of the Huber loss's corner; the last row is terminal."""
    random = np.random.default_rng(2)
    discount = np.full(batch_size, gamma_n, np.float32)
    discount[-1] = 0.0
    return Transition(
        observation=frames(3, batch_size),
        action=random.integers(NUM_ACTIONS, size=batch_size).astype(np.int32),
        reward=random.normal(scale=2, size=batch_size).astype(np.float32),
        discount=discount,
        next_observation=frames(4, batch_size),
    )
