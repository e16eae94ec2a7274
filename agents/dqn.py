"""DQN and double DQN: transitions in, a flat gradient out; observations in, greedy actions out.

Parameters travel as one flat float32 vector: the network's trainable variables in their own order,
each in row-major order. That is the order of the parameter server's `Layout`.

Where the discount is: a `Transition` from our replay carries discount = gamma^n * product of the
episode's discounts, so its loss is taken with gamma = 1. The agent itself is built with the gamma
and n of the configuration, so whoever gives it TF-Agents' own `Trajectory` (or a Transition in
TF-Agents' form, with gamma^(n-1) in it) gets the right loss too, from `train` and from `loss`.
"""

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tf_agents.agents.dqn import dqn_agent
from tf_agents.networks import network as network_lib
from tf_agents.specs import tensor_spec
from tf_agents.trajectories import policy_step, trajectory
from tf_agents.trajectories import time_step as ts
from tf_agents.utils import common

from agents import networks
from agents.config import AgentConfig, NetworkConfig
from infra.array_function import ArrayFunction
from infra.replay.trajectory import Transition

LOSSES = {
    'huber': common.element_wise_huber_loss,  # error^2 / 2 up to 1, then linear
    'squared': common.element_wise_squared_loss,  # error^2
}
# The parameter server rules over the target; TF-Agents' own copying must never come due.
_NEVER = 2**31 - 1


class DqnAgent(dqn_agent.DqnAgent):
    """TF-Agents' DQN (or double DQN) whose `loss` is the one that `train` minimises.

    TF-Agents' `loss` silently takes gamma = 1 and no reward scale, and its DQN runs the target
    network twice per loss (once for the values, once for their argmax).
    """

    def __init__(self, *args: Any, double_dqn: bool = False, **kwargs: Any) -> None:
        self._double_dqn = double_dqn
        super().__init__(*args, **kwargs)

    @property
    def q_network(self) -> network_lib.Network:
        """The network that acts and learns."""
        return self._q_network

    @property
    def target_q_network(self) -> network_lib.Network:
        """The network of the targets."""
        return self._target_q_network

    def _loss(
        self,
        experience: Any,
        td_errors_loss_fn: Any = None,
        gamma: float | None = None,
        reward_scale_factor: float | None = None,
        weights: Any = None,
        training: bool = False,
    ) -> Any:
        return super()._loss(
            experience,
            td_errors_loss_fn,
            self._gamma if gamma is None else gamma,
            self._reward_scale_factor if reward_scale_factor is None else reward_scale_factor,
            weights,
            training,
        )

    def _compute_next_q_values(self, next_time_steps: ts.TimeStep, info: Any) -> tf.Tensor:
        del info
        observation, step_type = next_time_steps.observation, next_time_steps.step_type
        target, _ = self._target_q_network(observation, step_type=step_type)
        if not self._double_dqn:
            return tf.reduce_max(target, axis=-1)
        online, _ = self._q_network(observation, step_type=step_type)
        return tf.gather(target, tf.argmax(online, axis=-1), axis=-1, batch_dims=1)


def make_agent(
    config: AgentConfig,
    network_config: NetworkConfig,
    time_step_spec: ts.TimeStep,
    action_spec: Any,
    seed: int = 0,
) -> DqnAgent:
    """The agent of `config`, its network's first weights given by `seed`, its target equal to it.

    Specs may be array or tensor specs. The agent's own optimizer (SGD with rate 0) changes nothing:
    the parameter server owns the optimizer. Nor does the agent clip: `config.gradient_clip_norm` is
    the norm of the whole gradient and belongs to `DqnLearner`; TF-Agents' clips each variable's.
    """
    time_step_spec = tensor_spec.from_spec(time_step_spec)
    action_spec = tensor_spec.from_spec(action_spec)
    q_network = networks.q_network(time_step_spec.observation, action_spec, network_config, seed)
    agent = DqnAgent(
        time_step_spec,
        action_spec,
        q_network,
        tf.compat.v1.train.GradientDescentOptimizer(0.0),
        n_step_update=config.n_step,
        target_update_period=_NEVER,
        td_errors_loss_fn=LOSSES[config.loss],
        gamma=config.discount,
        train_step_counter=tf.Variable(0, dtype=tf.int64, name='train_step'),
        double_dqn=config.double_dqn,
    )
    agent.initialize()
    return agent


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


class FlatVariables:
    """A network's trainable variables as one float32 vector [parameters]."""

    def __init__(self, variables: Sequence[tf.Variable]) -> None:
        self.variables = tuple(variables)
        self.size = sum(variable.shape.num_elements() for variable in self.variables)
        # On pages of its own TensorFlow takes it over: a variable may share this memory, and never
        # that of a part, which is only lent.
        memory = mmap.mmap(-1, self.size * np.dtype(np.float32).itemsize)
        self._flat = np.frombuffer(memory, np.float32)
        self._assign = ArrayFunction(self._assign_all, [tf.TensorSpec([self.size], tf.float32)])

    def values(self) -> np.ndarray:
        """A copy of all parameters, float32 [parameters]."""
        return np.concatenate([variable.numpy().ravel() for variable in self.variables])

    def assign(self, *parts: Any) -> None:
        """Sets all variables from float32 vectors that make up [parameters], in order.

        Not while another thread computes with the variables: it could see some of both.

        Raises:
          ValueError: the parts have another size or type together; nothing was set.
        """
        arrays = [np.asarray(part) for part in parts]
        sizes, types = [array.shape for array in arrays], {array.dtype for array in arrays}
        if any(len(size) != 1 for size in sizes) or sum(size[0] for size in sizes) != self.size:
            raise ValueError(self._misfit(f'of shapes {sizes}'))
        if types != {np.dtype(np.float32)}:
            raise ValueError(self._misfit(f'of types {sorted(map(str, types))}'))
        np.concatenate(arrays, out=self._flat)
        self._assign(self._flat)

    def _misfit(self, what: str) -> str:
        return (
            f'parameters {what} given, the network takes float32[{self.size}]: they belong to'
            ' another game or network.'
        )

    def _assign_all(self, flat: tf.Tensor) -> None:
        begin = 0
        for variable in self.variables:
            end = begin + variable.shape.num_elements()
            variable.assign(tf.reshape(flat[begin:end], variable.shape))
            begin = end


class DqnLearner:
    """The learner's half of an agent: the gradient of its loss at parameters from outside."""

    def __init__(self, agent: DqnAgent, gradient_clip_norm: float) -> None:
        """`gradient_clip_norm` bounds the global norm of the gradient; 0: not clipped."""
        self.agent = agent
        self._clip_norm = gradient_clip_norm
        self._online = FlatVariables(agent.q_network.trainable_variables)
        self._target = FlatVariables(agent.target_q_network.trainable_variables)
        observation = agent.time_step_spec.observation
        frames = tf.TensorSpec([None, *observation.shape], observation.dtype)
        numbers = tf.TensorSpec([None], tf.float32)
        signature = (frames, tf.TensorSpec([None], tf.int32), numbers, numbers, frames)
        self._gradient = ArrayFunction(self._flat_gradient, signature)

    @property
    def variables(self) -> tuple[tf.Variable, ...]:
        """What the flat vectors hold, in their order."""
        return self._online.variables

    def gradient(self, transition: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float32 [parameters] clipped gradient, float32 [] mean loss, float32 [B] |TD error|.

        Raises:
          ValueError: a column of `transition` has another shape or type than the network takes.
        """
        return self._gradient(*transition)

    def parameters(self) -> np.ndarray:
        """A copy of the network's parameters, float32 [parameters]."""
        return self._online.values()

    def set_parameters(self, *parts: Any) -> None:
        """Sets the network from float32 vectors that make up [parameters], in order."""
        self._online.assign(*parts)

    def set_target(self, *parts: Any) -> None:
        """Sets the target network from float32 vectors that make up [parameters], in order."""
        self._target.assign(*parts)

    def _flat_gradient(self, *columns: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        transition = Transition(*columns)
        variables = self._online.variables
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            # gamma=1: the transition's discount already holds gamma^n.
            info = self.agent.loss(tf_agents_transition(transition), training=True, gamma=1.0)
        gradients = tape.gradient(info.loss, variables)
        flat = tf.concat([tf.reshape(gradient, [-1]) for gradient in gradients], axis=0)
        if self._clip_norm:
            # Half the time of tf.clip_by_norm, which writes the squares to memory.
            norm = tf.sqrt(2 * tf.nn.l2_loss(flat))
            scale = self._clip_norm / norm
            # Mostly it is within the norm: no product then, which would write it all again.
            flat = tf.cond(scale < 1.0, lambda: flat * scale, lambda: flat)
        return flat, info.loss, tf.abs(info.extra.td_error)


class GreedyPolicy:
    """The actor's half of an agent: a Q-network's best actions at parameters from outside."""

    def __init__(self, q_network: network_lib.Network) -> None:
        self._network = q_network
        self._parameters = FlatVariables(q_network.trainable_variables)
        spec = q_network.input_tensor_spec
        frames = tf.TensorSpec([None, *spec.shape], spec.dtype)
        self._act = ArrayFunction(self._best_action, [frames])

    @property
    def variables(self) -> tuple[tf.Variable, ...]:
        """What the flat vector holds, in its order."""
        return self._parameters.variables

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Greedy actions int32 [E] for uint8 [E, 84, 84, stack].

        Raises:
          ValueError: `observation` has another shape or type than the network takes.
        """
        return self._act(observation)

    def parameters(self) -> np.ndarray:
        """A copy of the network's parameters, float32 [parameters]."""
        return self._parameters.values()

    def set_parameters(self, *parts: Any) -> None:
        """Sets the network from float32 vectors that make up [parameters], in order."""
        self._parameters.assign(*parts)

    def _best_action(self, observation: tf.Tensor) -> tf.Tensor:
        q_values, _ = self._network(observation)
        return tf.argmax(q_values, axis=-1, output_type=tf.int32)
