"""Munchausen DQN: values of all actions in, a bonus for the action taken and a soft value out.

The policy is pi = softmax(values / temperature) of the target network (Vieillard et al. 2020,
section 2). Values are float32 [..., num_actions].
"""

import dataclasses

import tensorflow as tf

from agents.config import AgentConfig
from agents.heads import outputs_of


@dataclasses.dataclass(frozen=True)
class Munchausen:
    """Adds the scaled log-policy of the action taken to the reward, and bootstraps softly.

    Attributes:
      temperature: tau, in units of the return; the smaller, the greedier the policy.
      scale: alpha, the share of the log-policy that is added.
      lowest: l0, bound of temperature * log pi, in units of the return.
    """

    temperature: float = 0.03
    scale: float = 0.9
    lowest: float = -1.0

    def bonus(self, values: tf.Tensor, action: tf.Tensor) -> tf.Tensor:
        """What the action taken adds to its reward: scale * max(temperature * log pi, lowest).

        The rewards of later steps of an n-step transition get none: their states are not sampled.
        """
        log_policy = self.temperature * outputs_of(self._log_policy(values), action)
        return self.scale * tf.maximum(log_policy, self.lowest)

    def next_outputs(self, outputs: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
        """Sum over actions of pi * (outputs - temperature * log pi), float32 [..., *output_shape].

        Of quantiles it is the quantiles' (same paper, section 4, M-IQN).
        """
        log_policy = self._log_policy(values)
        for _ in range(outputs.shape.rank - values.shape.rank):
            log_policy = log_policy[..., None]
        soft = tf.exp(log_policy) * (outputs - self.temperature * log_policy)
        return tf.reduce_sum(soft, axis=values.shape.rank - 1)

    def _log_policy(self, values: tf.Tensor) -> tf.Tensor:
        return tf.nn.log_softmax(values / self.temperature)


def munchausen_of(config: AgentConfig) -> Munchausen | None:
    """The Munchausen target of `config`, None if it bootstraps from the best next action."""
    if not config.munchausen:
        return None
    return Munchausen(
        config.munchausen_temperature, config.munchausen_scale, config.munchausen_lowest
    )
