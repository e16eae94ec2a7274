"""Priorities of new transitions: an actor's own outputs and rewards in, absolute errors out.

An Ape-X actor computes the error of each transition from the outputs it acted on (Horgan et al.
2018, section 3), so priorities are known before the learner samples a transition. The transition
of step t is complete once the network's outputs for step t + n are known.
"""

import collections

import numpy as np
import tensorflow as tf

from agents.heads import Head, outputs_of
from agents.munchausen import Munchausen
from infra.array_function import ArrayFunction


class InitialPriorities:
    """Computes the errors of the n-step transitions of one actor's E environments."""

    def __init__(
        self, head: Head, n_step: int, gamma: float, munchausen: Munchausen | None = None
    ) -> None:
        """
        Args:
          head: interprets the network's outputs.
          n_step: agent steps of reward before the bootstrap.
          gamma: discount per agent step.
          munchausen: target of the transitions, None if it is the best next action.
        """
        self._n_step = n_step
        self._gamma = gamma
        self._head = head
        self._munchausen = munchausen
        # The last n steps: outputs of all actions, action taken, reward, discount.
        self._steps: collections.deque[tuple[np.ndarray, ...]] = collections.deque(maxlen=n_step)
        outputs = tf.TensorSpec([None, None, *head.output_shape], tf.float32)
        action, number = tf.TensorSpec([None], tf.int32), tf.TensorSpec([None], tf.float32)
        columns = [outputs, action, outputs, action, number, number]
        self._error = ArrayFunction(self._absolute_error, columns)

    def completed(self, outputs: np.ndarray, action: np.ndarray) -> np.ndarray | None:
        """Absolute errors float32 [E] of the transitions that began n steps ago.

        Returns None during the first n steps.

        Args:
          outputs: float32 [E, num_actions, ...] for the current observations.
          action: int32 [E], the greedy actions under these outputs.
        """
        if len(self._steps) < self._n_step:
            return None
        reward = np.zeros(len(outputs), np.float32)
        running = np.ones(len(outputs), np.float32)  # gamma^k times the discounts so far
        for *_, step_reward, step_discount in self._steps:
            reward += running * step_reward
            running *= np.float32(self._gamma) * step_discount
        return self._error(*self._steps[0][:2], outputs, action, reward, running)

    def began(
        self, outputs: np.ndarray, action: np.ndarray, reward: np.ndarray, discount: np.ndarray
    ) -> None:
        """Records one agent step.

        Args:
          outputs: float32 [E, num_actions, ...], those the actions were chosen by.
          action: int32 [E], as taken.
          reward: float32 [E].
          discount: float32 [E], 0.0 where the step ended the episode, else 1.0.
        """
        self._steps.append((outputs, action, reward, discount))

    def _absolute_error(
        self,
        outputs: tf.Tensor,  # [E, num_actions, *output_shape]
        action: tf.Tensor,  # [E]
        next_outputs: tf.Tensor,  # as `outputs`
        best: tf.Tensor,  # [E]
        reward: tf.Tensor,  # [E]
        discount: tf.Tensor,  # [E]
    ) -> tf.Tensor:
        if self._munchausen is None:
            target = outputs_of(next_outputs, best)
        else:
            reward += self._munchausen.bonus(self._head.values(outputs), action)
            values = self._head.values(next_outputs)
            target = self._munchausen.next_outputs(next_outputs, values)
        chosen = outputs_of(outputs, action)
        return tf.abs(self._head.loss(chosen, target, reward, discount)[1])
