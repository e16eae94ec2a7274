"""Optimizers: a gradient slice in, parameters updated in place by TensorFlow's fused kernels.

Each equals the `tf.compat.v1.train` optimizer of the same name, as used by TF-Agents' DQN examples:
`AdagradOptimizer`, `RMSPropOptimizer(centered=True)`, `AdamOptimizer`. They work element by
element, so the slices of a vector make the same step as the whole vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from infra.array_function import ArrayFunction
from infra.parameter_server.config import ParameterServerConfig


class _Optimizer:
    """Slot variables of the parameters' length, scalar variables, and one fused step.

    Attributes:
      slots: float32 [n] variables by name.
      scalars: float32 [] variables by name.
    """

    def __init__(self, config: ParameterServerConfig, parameters: tf.Variable) -> None:
        self._parameters = parameters
        # Tensors are created once; a Python number would become a new tensor in every step.
        self._rate = tf.constant(config.learning_rate, tf.float32)
        self._epsilon = tf.constant(config.optimizer_epsilon, tf.float32)
        self.slots: dict[str, tf.Variable] = {}
        self.scalars: dict[str, tf.Variable] = {}

    def apply(self, gradient: tf.Tensor) -> None:
        """Makes one step in place from a float32 [n] gradient.

        A single kernel runs eagerly, because `tf.function` doubles the time by passing it to
        another thread. It must return no tensor to Python (see infra/array_function.py).
        """
        raise NotImplementedError

    def _add_slot(self, name: str, value: float) -> None:
        first = tf.constant(value, tf.float32)  # a configuration may hold an integer
        self.slots[name] = tf.Variable(tf.fill(self._parameters.shape, first))


class _Adagrad(_Optimizer):
    """AdaGrad, as in the paper: p -= rate * g / sqrt(sum of g^2), without epsilon."""

    def __init__(self, config: ParameterServerConfig, parameters: tf.Variable) -> None:
        super().__init__(config, parameters)
        self._add_slot('accumulator', config.adagrad_initial_accumulator)

    def apply(self, gradient: tf.Tensor) -> None:
        tf.raw_ops.ResourceApplyAdagrad(
            var=self._parameters.handle,
            accum=self.slots['accumulator'].handle,
            lr=self._rate,
            grad=gradient,
        )


class _CenteredRMSProp(_Optimizer):
    """Centered RMSProp (DQN 2015): the step is g / sqrt(mean of g^2 - (mean of g)^2 + epsilon)."""

    def __init__(self, config: ParameterServerConfig, parameters: tf.Variable) -> None:
        super().__init__(config, parameters)
        self._decay = tf.constant(config.optimizer_decay, tf.float32)
        self._momentum = tf.constant(config.optimizer_momentum, tf.float32)
        self._add_slot('mean', 0.0)
        # As in TensorFlow's RMSPropOptimizer, the mean square starts at 1: first steps are small.
        self._add_slot('mean_square', 1.0)
        self._add_slot('momentum', 0.0)

    def apply(self, gradient: tf.Tensor) -> None:
        tf.raw_ops.ResourceApplyCenteredRMSProp(
            var=self._parameters.handle,
            mg=self.slots['mean'].handle,
            ms=self.slots['mean_square'].handle,
            mom=self.slots['momentum'].handle,
            lr=self._rate,
            rho=self._decay,
            momentum=self._momentum,
            epsilon=self._epsilon,
            grad=gradient,
        )


class _Adam(_Optimizer):
    """Adam (Kingma and Ba 2015)."""

    def __init__(self, config: ParameterServerConfig, parameters: tf.Variable) -> None:
        super().__init__(config, parameters)
        self._beta_1 = tf.constant(config.adam_beta_1, tf.float32)
        self._beta_2 = tf.constant(config.adam_beta_2, tf.float32)
        self._add_slot('first_moment', 0.0)
        self._add_slot('second_moment', 0.0)
        self.scalars['beta_1_power'] = tf.Variable(config.adam_beta_1, dtype=tf.float32)
        self.scalars['beta_2_power'] = tf.Variable(config.adam_beta_2, dtype=tf.float32)
        # In a function, because eager code would return the powers to Python as tensors.
        signature = [tf.TensorSpec(parameters.shape, tf.float32)]
        step = tf.function(self._apply_and_multiply, input_signature=signature, autograph=False)
        self._step = step.get_concrete_function()

    def apply(self, gradient: tf.Tensor) -> None:
        self._step(gradient)

    def _apply_and_multiply(self, gradient: tf.Tensor) -> None:
        beta_1_power, beta_2_power = self.scalars['beta_1_power'], self.scalars['beta_2_power']
        tf.raw_ops.ResourceApplyAdam(
            var=self._parameters.handle,
            m=self.slots['first_moment'].handle,
            v=self.slots['second_moment'].handle,
            beta1_power=beta_1_power,
            beta2_power=beta_2_power,
            lr=self._rate,
            beta1=self._beta_1,
            beta2=self._beta_2,
            epsilon=self._epsilon,
            grad=gradient,
        )
        beta_1_power.assign(beta_1_power * self._beta_1)
        beta_2_power.assign(beta_2_power * self._beta_2)


_OPTIMIZERS: dict[str, Any] = {'adagrad': _Adagrad, 'rmsprop': _CenteredRMSProp, 'adam': _Adam}


class OptimizedSlice:
    """A slice of the parameters with its optimizer's state.

    Attributes:
      parameters: float32 [n].
      state: all variables of the slice by name: 'parameters', the slots and the scalars.
    """

    def __init__(self, config: ParameterServerConfig, size: int) -> None:
        self.parameters = tf.Variable(tf.zeros([size], tf.float32))
        self._optimizer = _OPTIMIZERS[config.optimizer](config, self.parameters)
        self._read = ArrayFunction(self.parameters.read_value)
        self.slot_names = tuple(self._optimizer.slots)
        self.state = {
            'parameters': self.parameters,
            **self._optimizer.slots,
            **self._optimizer.scalars,
        }
        self._read_state = ArrayFunction(
            lambda: {name: variable.read_value() for name, variable in self.state.items()}
        )

    def step(self, gradient: tf.Tensor) -> None:
        """Makes one update in place from a float32 [n] gradient tensor."""
        self._optimizer.apply(gradient)

    def copy_state(self) -> dict[str, np.ndarray]:
        """Returns a copy of `state`, by name."""
        return {name: np.array(array) for name, array in self._read_state().items()}

    def copy_parameters(self, out: np.ndarray) -> None:
        """Copies the parameters to `out`, float32 [n]."""
        # Releases the array at once, because an update copies parameters that Python still holds.
        np.copyto(out, self._read())
