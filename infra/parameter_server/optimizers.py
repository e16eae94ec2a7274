"""Optimizers: a gradient slice in, parameters updated in place by TensorFlow's fused kernels.

Each equals the `tf.compat.v1.train` optimizer of the same name, as used by TF-Agents' DQN examples:
`AdagradOptimizer`, `RMSPropOptimizer(centered=True)`, `AdamOptimizer`. They work element by
element, so the slices of a vector make the same step as the whole vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from infra.annealing import linear
from infra.array_function import HOST
from infra.array_variables import aligned_arrays, memory_address, memory_of
from infra.parameter_server.checkpoint import AVERAGE
from infra.parameter_server.config import ParameterServerConfig

AVERAGE_PERIOD = 10
"""Updates between two whose parameters enter the moving average. A window has many of them, and
averaging after every update would take half as long as Adam's step (0.21 ms and 0.38 ms for 683,000
parameters on a Zen 4 core)."""


def learning_rate(config: ParameterServerConfig, update: int) -> float:
    """Step size of global update number `update`, from 1."""
    if not config.learning_rate_updates:
        return config.learning_rate
    start, end = config.learning_rate, config.learning_rate_end
    return linear(start, end, update - 1, config.learning_rate_updates)


def average_rate(window: int, update: int) -> float:
    """Weight of the parameters after global update number `update` in their moving average.

    The average begins as the mean of all parameters so far. After `window` updates it is
    exponential, with a time constant of `window` updates (Polyak and Juditsky 1992). Between the
    updates that enter it, `AVERAGE_PERIOD` apart, the weight is 0; before the first it is 1.
    """
    if not window:
        return 0.0
    if update < AVERAGE_PERIOD:
        return 1.0
    return 0.0 if update % AVERAGE_PERIOD else AVERAGE_PERIOD / min(update, window)


def _scalar(value: float) -> tuple[np.ndarray, tf.Tensor]:
    """A number as an array float32 [], and a tensor on the array's memory for kernels to read."""
    (array,) = aligned_arrays([()])
    array[...] = value
    return array, tf.experimental.dlpack.from_dlpack(array.__dlpack__())


class _Optimizer:
    """Slot variables of the parameters' length, scalars, and one fused step.

    Attributes:
      slots: float32 [n] variables by name.
      scalars: float32 [] arrays by name.
      rate: step size of the next step, float32 [].
    """

    def __init__(self, config: ParameterServerConfig, parameters: tf.Variable) -> None:
        self._parameters = parameters
        # Tensors are created once; a Python number would become a new tensor in every step.
        self.rate, self._rate = _scalar(config.learning_rate)
        self._epsilon = tf.constant(config.optimizer_epsilon, tf.float32)
        self.slots: dict[str, tf.Variable] = {}
        self.scalars: dict[str, np.ndarray] = {}

    def apply(self, gradient: tf.Tensor) -> None:
        """Makes one step in place from a float32 [n] gradient.

        The kernel runs eagerly, because `tf.function` passes it to another thread. It must return
        no tensor to Python (see infra/array_function.py).
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
        self._factors = np.array([config.adam_beta_1, config.adam_beta_2], np.float32)
        self._beta_1, self._beta_2 = map(tf.constant, self._factors)
        self._add_slot('first_moment', 0.0)
        self._add_slot('second_moment', 0.0)
        self.scalars['beta_1_power'], self._beta_1_power = _scalar(self._factors[0])
        self.scalars['beta_2_power'], self._beta_2_power = _scalar(self._factors[1])

    def apply(self, gradient: tf.Tensor) -> None:
        tf.raw_ops.ResourceApplyAdam(
            var=self._parameters.handle,
            m=self.slots['first_moment'].handle,
            v=self.slots['second_moment'].handle,
            beta1_power=self._beta_1_power,
            beta2_power=self._beta_2_power,
            lr=self._rate,
            beta1=self._beta_1,
            beta2=self._beta_2,
            epsilon=self._epsilon,
            grad=gradient,
        )
        self.scalars['beta_1_power'] *= self._factors[0]
        self.scalars['beta_2_power'] *= self._factors[1]


_OPTIMIZERS: dict[str, Any] = {'adagrad': _Adagrad, 'rmsprop': _CenteredRMSProp, 'adam': _Adam}


class OptimizedSlice:
    """A slice of the parameters with its optimizer's state.

    Attributes:
      parameters: float32 [n]; updates change it in place.
      state: everything that updates change, float32 arrays by name: 'parameters', the slots [n],
        the scalars [] and, with `average_updates`, `AVERAGE` [n]. Writing to an array changes the
        state.
      slot_names: of the arrays [n] without 'parameters'.
    """

    def __init__(self, config: ParameterServerConfig, size: int) -> None:
        self._config = config
        with tf.device(HOST):  # `memory_of` needs it
            parameters = tf.Variable(tf.zeros([size], tf.float32))
            self._optimizer = _OPTIMIZERS[config.optimizer](config, parameters)
        self._variables = {'parameters': parameters, **self._optimizer.slots}
        arrays = {name: memory_of(variable) for name, variable in self._variables.items()}
        self.state = {**arrays, **self._optimizer.scalars}
        self.parameters = self.state['parameters']
        averages = (AVERAGE,) if config.average_updates else ()
        self.slot_names = (*self._optimizer.slots, *averages)
        self.state |= {name: np.zeros(size, np.float32) for name in averages}
        self._scratch = np.zeros(size if averages else 0, np.float32)

    def initialise(self, values: np.ndarray) -> None:
        """Sets the first parameters, float32 [n]."""
        np.copyto(self.parameters, values)
        if AVERAGE in self.state:
            np.copyto(self.state[AVERAGE], values)

    def step(self, gradient: tf.Tensor, update: int) -> None:
        """Makes global update number `update`, from 1, in place from a float32 [n] gradient."""
        self._optimizer.rate[...] = learning_rate(self._config, update)
        self._optimizer.apply(gradient)
        if rate := average_rate(self._config.average_updates, update):
            self._include(rate)

    def _include(self, rate: float) -> None:
        """Moves the average towards the parameters, in place."""
        average, change = self.state[AVERAGE], self._scratch
        np.subtract(self.parameters, average, out=change)
        change *= np.float32(rate)
        average += change

    def copy_state(self) -> dict[str, np.ndarray]:
        """Returns a copy of `state`, by name."""
        return {name: array.copy() for name, array in self.state.items()}

    def require_in_place(self) -> None:
        """Checks that `state` is still the memory of TensorFlow's variables.

        For now and then: it creates a tensor for each variable (see infra/array_function.py).

        Raises:
          RuntimeError: TensorFlow has moved a variable, so that `state` no longer holds it.
        """
        for name, variable in self._variables.items():
            if memory_address(variable) != self.state[name].__array_interface__['data'][0]:
                raise RuntimeError(
                    f'{name} of the shard: TensorFlow has moved it. Fix: report it with the version'
                    ' of TensorFlow.'
                )

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Sets `state` to the values of a copy; one without an average starts it anew."""
        saved = {AVERAGE: state['parameters'], **state}
        for name, array in self.state.items():
            np.copyto(array, saved[name])
