"""Heads: what the network's outputs for an action mean, as values and as a loss.

    outputs of the action taken, outputs of the best next action, reward, discount -> loss, error

A head is a few pure functions. `outputs` are float32 [..., *output_shape]: nothing for a value, the
logits of the atoms or the quantiles for a distribution of the return.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
import tensorflow as tf
from tf_agents.utils import common

from agents.config import AgentConfig

LOSSES = {
    'huber': common.element_wise_huber_loss,  # error^2 / 2 up to 1, then linear
    'squared': common.element_wise_squared_loss,  # error^2
}


class Head(Protocol):
    """One way to model the return of an action."""

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
        discount: tf.Tensor,  # [B], 0 behind an end
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Losses float32 [B], and errors float32 [B] whose size says how surprising a row was.

        No gradient flows into `next_outputs`.
        """


@dataclasses.dataclass(frozen=True)
class ValueHead:
    """The expected return itself (Mnih et al. 2015); the error is the TD error."""

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

    The error is the Kullback-Leibler divergence from the target distribution, which is what Rainbow
    prioritizes by (Hessel et al. 2018, section 3); the loss, the cross-entropy, has its gradient.
    """

    num_atoms: int = 51
    v_min: float = -10.0
    v_max: float = 10.0

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.num_atoms,)

    @property
    def support(self) -> np.ndarray:
        """The returns that the atoms stand for, float32 [num_atoms]."""
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

        An atom that falls between two of the support is shared by them, the nearer one having more.
        """
        spacing = (self.v_max - self.v_min) / (self.num_atoms - 1)
        moved = reward[:, None] + discount[:, None] * self.support
        moved = tf.clip_by_value(moved, self.v_min, self.v_max)
        distance = tf.abs(moved[:, None, :] - self.support[:, None]) / spacing  # [B, to, from]
        return tf.linalg.matvec(tf.maximum(1.0 - distance, 0.0), tf.nn.softmax(next_outputs))


@dataclasses.dataclass(frozen=True)
class QuantileHead:
    """QR-DQN: quantiles of the return (Dabney et al. 2018, algorithm 1, QR-DQN-1: kappa = 1).

    The error is that of the mean.
    """

    num_quantiles: int = 200

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.num_quantiles,)

    @property
    def midpoints(self) -> np.ndarray:
        """The probabilities whose quantiles are learned, float32 [num_quantiles]."""
        return ((np.arange(self.num_quantiles) + 0.5) / self.num_quantiles).astype(np.float32)

    def values(self, outputs: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(outputs, axis=-1)

    def loss(
        self, outputs: tf.Tensor, next_outputs: tf.Tensor, reward: tf.Tensor, discount: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        target = tf.stop_gradient(reward[:, None] + discount[:, None] * next_outputs)
        loss = _quantile_huber_loss(outputs, target, tf.constant(self.midpoints))
        return loss, self.values(target) - self.values(outputs)


@tf.custom_gradient
def _quantile_huber_loss(
    quantiles: tf.Tensor,  # [B, N]
    target: tf.Tensor,  # [B, N], as many samples
    midpoints: tf.Tensor,  # [N]
) -> tuple[tf.Tensor, Callable]:
    """Of each row, summed over quantiles and averaged over samples, float32 [B].

    No gradient flows into `target`.
    """
    loss, slope = _compared(quantiles, target, midpoints)
    return loss, lambda dy: (dy[:, None] * slope, None, None)


@tf.function(jit_compile=True, autograph=False)
def _compared(
    quantiles: tf.Tensor, target: tf.Tensor, midpoints: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """The loss float32 [B], and its slope in each quantile float32 [B, N].

    Compiled, and the samples outermost: the compiler then adds up many quantiles at a time. Every
    two of 200 are compared; single operations would write and read 1.3 million numbers ten times.
    """
    difference = tf.transpose(target)[:, :, None] - quantiles  # [sample, B, quantile]
    weight = tf.where(difference < 0.0, 1.0 - midpoints, midpoints)
    clipped = tf.clip_by_value(difference, -1.0, 1.0)
    huber = clipped * (difference - 0.5 * clipped)
    loss = tf.reduce_sum(tf.reduce_mean(weight * huber, axis=0), axis=1)
    return loss, -tf.reduce_mean(weight * clipped, axis=0)


def head_of(config: AgentConfig) -> Head:
    """The head of `config.agent`.

    Raises:
      ValueError: it is none of this project's family.
    """
    heads: dict[str, Head] = {
        'dqn': ValueHead(config.loss),
        'c51': CategoricalHead(config.num_atoms, config.v_min, config.v_max),
        'qr_dqn': QuantileHead(config.num_quantiles),
    }
    if config.agent not in heads:
        raise ValueError(f'agent is {config.agent!r}; it must be one of {", ".join(heads)}')
    return heads[config.agent]
