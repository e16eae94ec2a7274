"""What learner and actor need of a TF-Agents agent, whoever wrote it: variables, loss, outputs.

Built from one of this project's agents by `family_model`, from anybody else's by agents/foreign.py.
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
    """An agent as learner and actor see it; the functions are called in a graph.

    Attributes:
      agent: whose `initialize` makes its target networks, if it has any, equal to its own.
      variables: those that the loss trains, in the order in which they travel.
      loss: (transition, weights float32 [B] or None) to `Losses`.
      best_action: observations uint8 [B, ...] to greedy actions int32 [B].
      outputs: observations to the outputs of all actions float32 [B, num_actions, ...]; None: the
        agent has none that this project can read.
      head: what the outputs mean; None: likewise.
    """

    agent: tf_agent.TFAgent
    variables: tuple[tf.Variable, ...]
    loss: Callable[[Transition, Any], 'Losses']
    best_action: Callable[[tf.Tensor], tf.Tensor]
    outputs: Callable[[tf.Tensor], tf.Tensor] | None = None
    head: Head | None = None


class Losses(NamedTuple):
    """What an agent's loss says of a batch."""

    weighted: tf.Tensor  # float32 [], the mean whose gradient is taken, weights included
    rows: tf.Tensor  # float32 [B], without weights
    error: tf.Tensor  # float32 [B], not negative: how surprising a row was


def family_model(agent: DqnAgent) -> Model:
    """The model of one of this project's agents."""

    def outputs(observation: tf.Tensor) -> tf.Tensor:
        return agent.q_network(observation)[0]

    def best_action(observation: tf.Tensor) -> tf.Tensor:
        values = agent.head.values(outputs(observation))
        return tf.argmax(values, axis=-1, output_type=tf.int32)

    def loss(transition: Transition, weights: Any) -> Losses:
        # gamma=1: the transition's discount already holds gamma^n.
        info = agent.loss(
            tf_agents_transition(transition), weights=weights, training=True, gamma=1.0
        )
        return Losses(info.loss, info.extra.td_loss, tf.abs(info.extra.td_error))

    variables = tuple(agent.q_network.trainable_variables)
    return Model(agent, variables, loss, best_action, outputs, agent.head)


def tf_agents_transition(transition: Any) -> trajectory.Transition:
    """Our transition in TF-Agents' type, all rows MID steps; its discount is left as it is."""
    reward = transition.reward
    step_type = tf.ones_like(transition.action)
    nothing = tf.zeros_like(reward)
    return trajectory.Transition(
        ts.TimeStep(step_type, nothing, tf.ones_like(reward), transition.observation),
        policy_step.PolicyStep(transition.action, state=(), info=()),
        ts.TimeStep(step_type, reward, transition.discount, transition.next_observation),
    )
