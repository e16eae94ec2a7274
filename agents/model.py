"""A TF-Agents agent as learner and actor use it: its variables, loss, greedy actions and outputs.

`family_model` builds it from one of this project's agents; agents/custom_agent.py builds it from a
user's agent.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf
from tf_agents.agents import tf_agent
from tf_agents.trajectories import policy_step, trajectory
from tf_agents.trajectories import time_step as ts

from agents.dqn import DqnAgent
from agents.heads import Head
from infra.replay.trajectory import Transition


@dataclasses.dataclass(frozen=True)
class Model:
    """An agent's variables and functions; the functions are called in a graph.

    Attributes:
      agent: its `initialize` copies its networks to its target networks, if it has any.
      variables: the trained variables, in the order of the parameter server's layout.
      loss: maps (transition, weights float32 [B] or None) to `Losses`.
      best_action: maps observations [B, ...], nested as the agent's spec, to greedy actions int32
        [B].
      outputs: maps observations to outputs of all actions float32 [B, num_actions, ...]; None for a
        user's agent, whose outputs are unknown.
      head: interprets the outputs; None for a user's agent.
      precision: numbers of the convolutions, 'float32' (also without any) or 'bfloat16'; None for a
        user's agent or network, where they are unknown.
    """

    agent: tf_agent.TFAgent
    variables: tuple[tf.Variable, ...]
    loss: Callable[[Transition, Any], 'Losses']
    best_action: Callable[[Any], tf.Tensor]
    outputs: Callable[[Any], tf.Tensor] | None = None
    head: Head | None = None
    precision: str | None = None

    @property
    def observations(self) -> Any:
        """Specs of a batch of observations, [None, ...]."""
        return tf.nest.map_structure(
            lambda spec: tf.TensorSpec([None, *spec.shape], spec.dtype),
            self.agent.time_step_spec.observation,
        )


class Losses(NamedTuple):
    """An agent's losses and errors on a batch."""

    weighted: tf.Tensor  # float32 [], the weighted loss that the gradient is taken of
    rows: tf.Tensor  # float32 [B], losses without weights
    error: tf.Tensor  # float32 [B], absolute errors, from which priorities are computed


def family_model(agent: DqnAgent) -> Model:
    """Builds the model of one of this project's agents."""

    def outputs(observation: Any) -> tf.Tensor:
        return agent.q_network(observation)[0]

    def best_action(observation: Any) -> tf.Tensor:
        values = agent.head.values(outputs(observation))
        return tf.argmax(values, axis=-1, output_type=tf.int32)

    def loss(transition: Transition, weights: Any) -> Losses:
        # gamma=1: the transition's discount already holds gamma^n.
        info = agent.loss(
            tf_agents_transition(transition), weights=weights, training=True, gamma=1.0
        )
        return Losses(info.loss, info.extra.td_loss, tf.abs(info.extra.td_error))

    variables = tuple(agent.q_network.trainable_variables)
    precision = getattr(agent.q_network, 'precision', None)  # others' networks have none
    return Model(agent, variables, loss, best_action, outputs, agent.head, precision)


def tf_agents_transition(transition: Any) -> trajectory.Transition:
    """Converts our transition to TF-Agents' type, all rows MID steps, the discount unchanged."""
    reward = transition.reward
    step_type = tf.ones_like(transition.action)
    nothing = tf.zeros_like(reward)
    return trajectory.Transition(
        ts.TimeStep(step_type, nothing, tf.ones_like(reward), transition.observation),
        policy_step.PolicyStep(transition.action, state=(), info=()),
        ts.TimeStep(step_type, reward, transition.discount, transition.next_observation),
    )
