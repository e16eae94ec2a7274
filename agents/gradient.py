"""The learner's half of an agent: transitions and parameters in, gradients out."""

import functools
from typing import Any

import numpy as np
import tensorflow as tf

from agents.flat_variables import FlatVariables
from agents.model import Model
from infra.array_function import ArrayFunction
from infra.replay.trajectory import Transition


class AgentGradient:
    """Computes the gradient of an agent's loss."""

    def __init__(self, model: Model, gradient_clip_norm: float, weighted: bool = False) -> None:
        """
        Args:
          model: the agent's loss and variables.
          gradient_clip_norm: bound of the gradient's global norm; 0 disables clipping.
          weighted: whether `gradient` receives a weight for each row.
        """
        self.model = model
        self._clip_norm = gradient_clip_norm
        self._online = FlatVariables(model.variables)
        frames, numbers = model.observations, tf.TensorSpec([None], tf.float32)
        self._columns = Transition(
            frames, tf.TensorSpec([None], tf.int32), numbers, numbers, frames
        )
        self._signature = (self._columns, numbers) if weighted else (self._columns,)
        self._copy_to_target = ArrayFunction(self._initialize, device=self.device)

    @property
    def device(self) -> str:
        """TensorFlow's name of the device that holds the agent and computes."""
        return self._online.device

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self._online.size

    @property
    def variables(self) -> tuple[tf.Variable, ...]:
        """The variables of the flat vectors, in order."""
        return self._online.variables

    def gradient(
        self, transition: Any, weights: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Computes a clipped gradient and what the learner reports of it.

        Returns gradient float32 [parameters], mean loss float32 [], absolute errors float32 [B],
        and the factor float32 [] by which the gradient was clipped, 1 if it was not. The mean loss
        ignores weights, so it is comparable at any priorities.

        Args:
          transition: a batch of B transitions.
          weights: float32 [B], weights of the rows' losses; required exactly if `weighted`.

        Raises:
          ValueError: the shape or type of a column does not fit the network.
        """
        return (
            self._gradient(transition) if weights is None else self._gradient(transition, weights)
        )

    def values(self, observation: Any, action: np.ndarray) -> tuple[float, float] | None:
        """Mean expected return of the actions taken, and the largest of any row and action.

        Args:
          observation: [B, ...], as the agent's spec nests it.
          action: int32 [B], actions taken.

        None for a user's agent, whose outputs are unknown.
        """
        if self.model.outputs is None or self.model.head is None:
            return None
        mean, largest = self._values(observation, action)
        return float(mean), float(largest)

    def parameters(self) -> np.ndarray:
        """A copy of the network's parameters, float32 [parameters]."""
        return self._online.values()

    def set_parameters(self, *parts: Any) -> None:
        """Sets the network from float32 vectors that concatenate to [parameters]."""
        self._online.assign(*parts)

    def set_target(self, *parts: Any) -> None:
        """Sets the agent's target from float32 vectors that concatenate to [parameters].

        Loads them into the agent's own network, which TF-Agents' `initialize` copies to the target.
        The network keeps its parameters.
        """
        with self._online.holding(*parts):
            self._copy_to_target()

    def _initialize(self) -> None:
        self.model.agent.initialize()

    @functools.cached_property
    def _gradient(self) -> ArrayFunction:
        return ArrayFunction(self.flat_gradient, self._signature, device=self.device)

    @functools.cached_property
    def _values(self) -> ArrayFunction:
        signature = self._columns.observation, self._columns.action
        return ArrayFunction(self._mean_and_largest, signature, device=self.device)

    def _mean_and_largest(self, observation: Any, action: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        outputs = self.model.outputs(observation)  # type: ignore[misc]
        values = self.model.head.values(outputs)  # type: ignore[union-attr]
        taken = tf.gather(values, action, batch_dims=1)
        return tf.reduce_mean(taken), tf.reduce_max(values)

    def flat_gradient(
        self, transition: Transition, weights: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, ...]:
        """Like `gradient`, inside a graph: tensors in, tensors out."""
        variables = self._online.variables
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            losses = self.model.loss(transition, weights)
        gradients = tape.gradient(losses.weighted, variables)
        flat = tf.concat([tf.reshape(gradient, [-1]) for gradient in gradients], axis=0)
        clipped, factor = self._clipped(flat)
        return clipped, tf.reduce_mean(losses.rows), losses.error, factor

    def _clipped(self, flat: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The gradient after clipping, and the factor that clipping applied."""
        if not self._clip_norm:
            return flat, tf.ones([])
        # Takes half the time of tf.clip_by_norm, which writes the squares to memory.
        norm = tf.sqrt(2 * tf.nn.l2_loss(flat))
        scale = tf.minimum(self._clip_norm / norm, 1.0)
        # Skips the product in the common case of a short gradient: it would rewrite the vector.
        return tf.cond(scale < 1.0, lambda: flat * scale, lambda: flat), scale
