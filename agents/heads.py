"""Heads: network outputs for an action in, expected returns and losses out.

    outputs of the action taken, outputs of the best next action, reward, discount -> loss, error

A head consists of pure functions. `outputs` are float32 [..., *output_shape]. A value has the shape
(); a distribution of the return has one output per logit of an atom, or per quantile.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
import tensorflow as tf
from tf_agents.utils import common

from agents.config import AgentConfig
from agents.fractions import midpoints

LOSSES = {
    'huber': common.element_wise_huber_loss,  # error^2 / 2 up to 1, then linear
    'squared': common.element_wise_squared_loss,  # error^2
}


class Head(Protocol):
    """A model of an action's return."""

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the network's outputs for one action."""

    def values(self, outputs: tf.Tensor) -> tf.Tensor:
        """Expected returns float32 [...] of outputs float32 [..., *output_shape]."""

    def loss(
        self,
        outputs: tf.Tensor,  # [B, *output_shape], of the action taken
        next_outputs: tf.Tensor,  # [B, *output_shape], of the best next action, from the target
        reward: tf.Tensor,  # [B]
        discount: tf.Tensor,  # [B], 0 after the end of an episode
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Losses float32 [B] and errors float32 [B]; the absolute error is a row's priority.

        No gradient flows into `next_outputs`.
        """


@dataclasses.dataclass(frozen=True)
class ValueHead:
    """Models the expected return (Mnih et al. 2015); the error is the TD error."""

    loss_name: str = 'huber'

    @property
    def output_shape(self) -> tuple[int, ...]:
        return ()

    def values(self, outputs: tf.Tensor) -> tf.Tensor:
        return outputs

    def loss(
        self, outputs: tf.Tensor, next_outputs: tf.Tensor, reward: tf.Tensor, discount: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        target = tf.stop_gradient(reward + discount * next_outputs)
        return LOSSES[self.loss_name](target, outputs), target - outputs


@dataclasses.dataclass(frozen=True)
class CategoricalHead:
    """C51: logits of fixed, equally spaced returns (Bellemare et al. 2017, algorithm 1).

    The error is the Kullback-Leibler divergence from the target distribution, the priority of
    Rainbow (Hessel et al. 2018, section 3). The loss is the cross-entropy, which has the same
    gradient.
    """

    num_atoms: int = 51
    v_min: float = -10.0
    v_max: float = 10.0

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.num_atoms,)

    @property
    def support(self) -> np.ndarray:
        """Returns of the atoms, float32 [num_atoms]."""
        return np.linspace(self.v_min, self.v_max, self.num_atoms, dtype=np.float32)

    def values(self, outputs: tf.Tensor) -> tf.Tensor:
        return tf.linalg.matvec(tf.nn.softmax(outputs), self.support)

    def loss(
        self, outputs: tf.Tensor, next_outputs: tf.Tensor, reward: tf.Tensor, discount: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        target = tf.stop_gradient(self.projected(next_outputs, reward, discount))
        cross_entropy = tf.nn.softmax_cross_entropy_with_logits(target, outputs)
        entropy = -tf.reduce_sum(tf.math.xlogy(target, target), axis=-1)
        return cross_entropy, cross_entropy - entropy

    def projected(
        self, next_outputs: tf.Tensor, reward: tf.Tensor, discount: tf.Tensor
    ) -> tf.Tensor:
        """Probabilities float32 [B, num_atoms] of reward + discount * return, on the support.

        Splits an atom between its two neighbours on the support; the nearer one receives more.
        """
        spacing = (self.v_max - self.v_min) / (self.num_atoms - 1)
        moved = reward[:, None] + discount[:, None] * self.support
        moved = tf.clip_by_value(moved, self.v_min, self.v_max)
        distance = tf.abs(moved[:, None, :] - self.support[:, None]) / spacing  # [B, to, from]
        return tf.linalg.matvec(tf.maximum(1.0 - distance, 0.0), tf.nn.softmax(next_outputs))


@dataclasses.dataclass(frozen=True)
class QuantileHead:
    """QR-DQN: quantiles of the return (Dabney et al. 2018, algorithm 1, QR-DQN-1: kappa = 1).

    IQN (Dabney et al. 2018b, equation 3 with kappa = 1) learns from quantiles at drawn fractions.
    The error is the TD error of the mean.

    Attributes:
      num_quantiles: at the midpoints of as many fractions, whose mean is the value.
      num_drawn: quantiles drawn for a loss, N and N' of IQN; 0 without.
    """

    num_quantiles: int = 200
    num_drawn: int = 0

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.num_quantiles,)

    def values(self, outputs: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(outputs, axis=-1)

    def loss(
        self,
        outputs: tf.Tensor,
        next_outputs: tf.Tensor,
        reward: tf.Tensor,
        discount: tf.Tensor,
        fractions: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """As every head's; `fractions` float32 [B, N] of `outputs`, None if at the midpoints."""
        target = tf.stop_gradient(reward[:, None] + discount[:, None] * next_outputs)
        if fractions is None:
            fractions = tf.constant(midpoints(self.num_quantiles))
        loss = _quantile_huber_loss(outputs, target, fractions)
        return loss, self.values(target) - self.values(outputs)


@tf.custom_gradient
def _quantile_huber_loss(
    quantiles: tf.Tensor,  # [B, N]
    target: tf.Tensor,  # [B, N'], samples
    fractions: tf.Tensor,  # [N] or [B, N]
) -> tuple[tf.Tensor, Callable]:
    """Losses float32 [B], summed over quantiles and averaged over samples.

    No gradient flows into `target`.
    """
    loss, slope = _compared(quantiles, target, fractions)
    return loss, lambda dy: (dy[:, None] * slope, None, None)


@tf.function(jit_compile=True, autograph=False)
def _compared(
    quantiles: tf.Tensor, target: tf.Tensor, fractions: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Losses float32 [B] and their derivatives by the quantiles, float32 [B, N].

    XLA compiles it. With the samples outermost it adds many quantiles at a time. 200 quantiles make
    1.3 million pairs in a batch of 32; uncompiled operations would write and read them ten times.
    """
    difference = tf.transpose(target)[:, :, None] - quantiles  # [sample, B, quantile]
    weight = tf.where(difference < 0.0, 1.0 - fractions, fractions)
    clipped = tf.clip_by_value(difference, -1.0, 1.0)
    huber = clipped * (difference - 0.5 * clipped)
    loss = tf.reduce_sum(tf.reduce_mean(weight * huber, axis=0), axis=1)
    return loss, -tf.reduce_mean(weight * clipped, axis=0)


def outputs_of(outputs: tf.Tensor, action: tf.Tensor) -> tf.Tensor:
    """Selects the outputs for given actions.

    outputs [..., num_actions, *output_shape], action [...] -> [..., *output_shape]
    """
    return tf.gather_nd(outputs, action[..., None], batch_dims=action.shape.rank)


def head_of(config: AgentConfig) -> Head:
    """Builds the head of `config.agent`.

    Raises:
      ValueError: `config.agent` is not in `AGENTS`.
    """
    heads: dict[str, Head] = {
        'dqn': ValueHead(config.loss),
        'c51': CategoricalHead(config.num_atoms, config.v_min, config.v_max),
        'qr_dqn': QuantileHead(config.num_quantiles),
        'iqn': QuantileHead(config.num_acting_fractions, config.num_fractions),
    }
    if config.agent not in heads:
        raise ValueError(f'--agent {config.agent!r}: must be one of {", ".join(heads)}')
    return heads[config.agent]
