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
        self._weighted = weighted
        self._online = FlatVariables(model.variables)
        # A separate buffer: target variables keep sharing the memory last assigned through it.
        self._staged_target = FlatVariables(model.variables)
        observation = model.agent.time_step_spec.observation
        frames = tf.TensorSpec([None, *observation.shape], observation.dtype)
        numbers = tf.TensorSpec([None], tf.float32)
        columns = (frames, tf.TensorSpec([None], tf.int32), numbers, numbers, frames)
        signature = (*columns, numbers) if weighted else columns
        self._signature = signature
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
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Clipped gradient float32 [parameters], mean loss float32 [], absolute errors float32 [B].

        The mean loss ignores weights, so it is comparable at any priorities.

        Args:
          transition: a batch of B transitions.
          weights: float32 [B], weights of the rows' losses; required exactly if `weighted`.

        Raises:
          ValueError: the shape or type of a column does not fit the network.
        """
        columns = tuple(transition) if weights is None else (*transition, weights)
        return self._gradient(*columns)

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
        online = self._online.values()
        self._staged_target.assign(*parts)
        self._copy_to_target()
        self._online.assign(online)

    def _initialize(self) -> None:
        self.model.agent.initialize()

    @functools.cached_property
    def _gradient(self) -> ArrayFunction:
        return ArrayFunction(self.flat_gradient, self._signature, device=self.device)

    def flat_gradient(self, *columns: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Like `gradient`, inside a graph: tensors in, tensors out."""
        transition = Transition(*columns[: len(Transition._fields)])
        weights = columns[-1] if self._weighted else None
        variables = self._online.variables
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            losses = self.model.loss(transition, weights)
        gradients = tape.gradient(losses.weighted, variables)
        flat = tf.concat([tf.reshape(gradient, [-1]) for gradient in gradients], axis=0)
        return self._clipped(flat), tf.reduce_mean(losses.rows), losses.error

    def _clipped(self, flat: tf.Tensor) -> tf.Tensor:
        if not self._clip_norm:
            return flat
        # Takes half the time of tf.clip_by_norm, which writes the squares to memory.
        norm = tf.sqrt(2 * tf.nn.l2_loss(flat))
        scale = self._clip_norm / norm
        # Skips the product in the common case of a short gradient: it would rewrite the vector.
        return tf.cond(scale < 1.0, lambda: flat * scale, lambda: flat)
