"""The actor's half of an agent: observations and parameters in, greedy actions out."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from agents.flat_variables import FlatVariables
from agents.model import Model
from infra.array_function import ArrayFunction


class GreedyPolicy:
    """Computes an agent's greedy actions."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._parameters = FlatVariables(model.variables)

    @property
    def variables(self) -> tuple[tf.Variable, ...]:
        """The variables of the flat vector, in order."""
        return self._parameters.variables

    def act(self, observation: Any) -> np.ndarray:
        """Greedy actions int32 [E] for observations [E, ...], nested as the agent's spec.

        Raises:
          ValueError: the shape or type of `observation` does not fit the network.
        """
        return self._act(observation)

    def evaluate(self, observation: Any) -> tuple[np.ndarray, np.ndarray]:
        """Greedy actions int32 [E], and the outputs of all actions float32 [E, num_actions, ...].

        Raises:
          ValueError: as `act`, or the agent is a user's, whose outputs are unknown.
        """
        return self._evaluate(observation)

    def parameters(self) -> np.ndarray:
        """A copy of the network's parameters, float32 [parameters]."""
        return self._parameters.values()

    def set_parameters(self, *parts: Any) -> None:
        """Sets the network from float32 vectors that concatenate to [parameters]."""
        self._parameters.assign(*parts)

    # Traced on first use, since an actor needs only one of the two.

    @functools.cached_property
    def _act(self) -> ArrayFunction:
        return self._function(self.model.best_action)

    @functools.cached_property
    def _evaluate(self) -> ArrayFunction:
        if self.model.outputs is None or self.model.head is None:
            raise ValueError('the agent is not of this project: its outputs cannot be read')
        return self._function(self._actions_and_outputs)

    def _function(self, function: Callable) -> ArrayFunction:
        return ArrayFunction(function, [self.model.observations], device=self._parameters.device)

    def _actions_and_outputs(self, observation: Any) -> tuple[tf.Tensor, tf.Tensor]:
        outputs = self.model.outputs(observation)  # type: ignore[misc]
        values = self.model.head.values(outputs)  # type: ignore[union-attr]
        return tf.argmax(values, axis=-1, output_type=tf.int32), outputs
