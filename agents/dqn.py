"""The DQN family as one TF-Agents agent: a head turns the network's outputs into values and a loss.

DQN, double DQN, C51, QR-DQN and IQN differ in their head and in the network that chooses the best
next action; Munchausen DQN bootstraps from all of them. The network implements dueling; the replay
implements n-step returns and priorities.

A `Transition` from our replay carries discount = gamma^n * product of the episode's discounts, so
its loss uses gamma = 1. The agent itself is built with the configured gamma and n. `train` and
`loss` are therefore also right for TF-Agents' own `Trajectory`, and for a Transition in TF-Agents'
form, whose discount holds gamma^(n-1).
"""

from typing import Any

import tensorflow as tf
from tf_agents.agents.dqn import dqn_agent
from tf_agents.networks import network as network_lib
from tf_agents.networks import utils as network_utils
from tf_agents.policies import boltzmann_policy, epsilon_greedy_policy, greedy_policy, q_policy
from tf_agents.specs import tensor_spec
from tf_agents.trajectories import time_step as ts

from agents import networks
from agents.config import AgentConfig, NetworkConfig
from agents.fractions import drawn
from agents.heads import Head, QuantileHead, head_of, outputs_of
from agents.munchausen import Munchausen, munchausen_of

# The parameter server sets the target network; TF-Agents' own copy must never be due.
_NEVER = 2**31 - 1


class ActionValues(networks.Network):
    """A network's expected returns, float32 [B, num_actions], as TF-Agents' policies need them."""

    def __init__(self, network: network_lib.Network, head: Head, name: str = 'action_values'):
        super().__init__(network.input_tensor_spec, network.state_spec, name)
        self._network = network
        self._head = head

    def call(
        self, observation: tf.Tensor, step_type: Any = None, network_state: Any = (), **kwargs: Any
    ) -> tuple[tf.Tensor, Any]:
        outputs, state = self._network(
            observation, step_type=step_type, network_state=network_state, **kwargs
        )
        return self._head.values(outputs), state


class DqnAgent(dqn_agent.DqnAgent):
    """TF-Agents' DQN with any head; `loss` computes what `train` minimises.

    TF-Agents' own `loss` silently uses gamma = 1 and no reward scale. Its DQN runs the target
    network twice per loss, once for the values and once for their argmax. Its C51 ignores weights,
    accepts no `Transition` and reports no errors.
    """

    def __init__(
        self,
        time_step_spec: ts.TimeStep,
        action_spec: Any,
        q_network: network_lib.Network,
        optimizer: Any,
        head: Head,
        double_dqn: bool = False,
        munchausen: Munchausen | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
          time_step_spec, action_spec: tensor specs without batch dimension.
          q_network: returns outputs float32 [B, num_actions, *head.output_shape]; if the head draws
            quantiles, it takes their `fractions` float32 [B, N], too.
          optimizer: applied by `train`.
          head: interprets the outputs.
          double_dqn: whether `q_network` chooses the best next action, not the target network.
          munchausen: replaces the best next action; `double_dqn` then has no effect.
          **kwargs: further arguments of TF-Agents' `DqnAgent`.

        Raises:
          ValueError: `kwargs` has an argument that has no effect here.
        """
        for name in ('td_errors_loss_fn', 'observation_and_action_constraint_splitter'):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f'{name} is not taken: the head has the loss, every action is legal'
                )
        self._head = head
        self._double_dqn = double_dqn and munchausen is None
        self._munchausen = munchausen
        self._drawn_head: QuantileHead | None = None
        if isinstance(head, QuantileHead) and head.num_drawn:
            self._drawn_head = head
        super().__init__(time_step_spec, action_spec, q_network, optimizer, **kwargs)

    @property
    def head(self) -> Head:
        """Interprets the networks' outputs."""
        return self._head

    @property
    def q_network(self) -> network_lib.Network:
        """The network that acts and learns."""
        return self._q_network

    @property
    def target_q_network(self) -> network_lib.Network:
        """The network that values the best next action."""
        return self._target_q_network

    def _check_network_output(self, net: network_lib.Network, label: str) -> None:
        network_utils.check_single_floating_network_output(
            net.create_variables(),
            expected_output_shape=(self._num_actions, *self._head.output_shape),
            label=label,
        )

    def _setup_policy(
        self,
        time_step_spec: ts.TimeStep,
        action_spec: Any,
        boltzmann_temperature: Any,
        emit_log_probability: bool,
    ) -> tuple[Any, Any]:
        values = ActionValues(self._q_network, self._head)
        policy = q_policy.QPolicy(
            time_step_spec, action_spec, values, emit_log_probability=emit_log_probability
        )
        if boltzmann_temperature is None:
            explore = epsilon_greedy_policy.EpsilonGreedyPolicy(policy, self._epsilon_greedy)
        else:
            explore = boltzmann_policy.BoltzmannPolicy(policy, boltzmann_temperature)
        return greedy_policy.GreedyPolicy(policy), explore

    def _loss(
        self,
        experience: Any,
        td_errors_loss_fn: Any = None,
        gamma: float | None = None,
        reward_scale_factor: float | None = None,
        weights: Any = None,
        training: bool = False,
    ) -> Any:
        gamma = self._gamma if gamma is None else gamma
        scale = self._reward_scale_factor if reward_scale_factor is None else reward_scale_factor
        if self._munchausen is not None:
            experience = self._with_bonus(experience, scale, self._munchausen)
            scale = 1.0
        return super()._loss(experience, td_errors_loss_fn, gamma, scale, weights, training)

    def _with_bonus(self, experience: Any, scale: float, munchausen: Munchausen) -> Any:
        """A Transition whose rewards are scaled and hold the bonus of the actions taken."""
        transition = self._as_transition(experience)
        steps, policy_steps, next_steps = transition
        outputs, _ = self._target_q_network(steps.observation, step_type=steps.step_type)
        values = self._head.values(outputs)
        bonus = munchausen.bonus(values, policy_steps.action)
        next_steps = next_steps._replace(reward=scale * next_steps.reward + bonus)
        return transition._replace(next_time_step=next_steps)

    def _compute_q_values(
        self, time_steps: ts.TimeStep, actions: tf.Tensor, training: bool = False
    ) -> tf.Tensor:
        """Outputs float32 [B, *output_shape] for the actions taken.

        The shape is [B, T, *output_shape] for a recurrent network, here and below. Drawn quantiles
        come with their fractions, float32 [2, B, N].
        """
        observation, step_type = time_steps.observation, time_steps.step_type
        fractions = self._fractions(observation, stream=0)
        outputs, _ = self._q_network(
            observation, step_type=step_type, training=training, **fractions
        )
        chosen = outputs_of(outputs, actions)
        return tf.stack([chosen, *fractions.values()]) if fractions else chosen

    def _compute_next_q_values(self, next_time_steps: ts.TimeStep, info: Any) -> tf.Tensor:
        """The target network's outputs float32 [B, *output_shape] to bootstrap from."""
        del info
        observation, step_type = next_time_steps.observation, next_time_steps.step_type
        fractions = self._fractions(observation, stream=1)
        target, _ = self._target_q_network(observation, step_type=step_type, **fractions)
        judge = target
        if self._double_dqn or fractions:
            network = self._q_network if self._double_dqn else self._target_q_network
            judge, _ = network(observation, step_type=step_type)
        values = self._head.values(judge)
        if self._munchausen is not None:
            return self._munchausen.next_outputs(target, values)
        return outputs_of(target, tf.argmax(values, axis=-1))

    def _fractions(self, observation: Any, stream: int) -> dict[str, tf.Tensor]:
        """The argument of a network whose quantiles are drawn, empty for others."""
        if self._drawn_head is None:
            return {}
        return {'fractions': drawn(observation, self._drawn_head.num_drawn, stream)}

    def _td_loss(
        self,
        q_values: tf.Tensor,
        next_q_values: tf.Tensor,
        rewards: tf.Tensor,
        discounts: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        if self._drawn_head is not None:
            quantiles, fractions = tf.unstack(q_values)
            return self._drawn_head.loss(quantiles, next_q_values, rewards, discounts, fractions)
        steps = network_utils.BatchSquash(rewards.shape.rank)  # heads take [B, ...] only
        columns = map(steps.flatten, (q_values, next_q_values, rewards, discounts))
        loss, error = self._head.loss(*columns)
        return steps.unflatten(loss), steps.unflatten(error)


def make_agent(
    config: AgentConfig,
    network_config: NetworkConfig,
    time_step_spec: ts.TimeStep,
    action_spec: Any,
    seed: int = 0,
) -> DqnAgent:
    """Builds the agent of `config`; `seed` sets its first weights, which the target copies.

    Specs may be array or tensor specs. The agent's optimizer (SGD with rate 0) has no effect: the
    parameter server owns the optimizer. `AgentGradient` clips, since TF-Agents clips per variable.

    Raises:
      ValueError: `config.agent` is not in `AGENTS`.
    """
    head = head_of(config)
    time_step_spec = tensor_spec.from_spec(time_step_spec)
    action_spec = tensor_spec.from_spec(action_spec)
    observation = time_step_spec.observation
    num_cosines = config.num_cosines if config.agent == 'iqn' else 0
    q_network = networks.q_network(
        observation, action_spec, network_config, seed, head.output_shape, num_cosines
    )
    agent = DqnAgent(
        time_step_spec,
        action_spec,
        q_network,
        tf.compat.v1.train.GradientDescentOptimizer(0.0),
        head,
        config.double_dqn,
        munchausen_of(config),
        n_step_update=config.n_step,
        target_update_period=_NEVER,
        gamma=config.discount,
        train_step_counter=_train_step(),
    )
    agent.initialize()
    return agent


def _train_step() -> tf.Variable:
    aggregation = tf.VariableAggregation.ONLY_FIRST_REPLICA
    return tf.Variable(0, dtype=tf.int64, name='train_step', aggregation=aggregation)
