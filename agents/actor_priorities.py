"""Priorities of new transitions: an actor's own outputs and rewards in, absolute errors out.

An Ape-X actor computes the error of each transition from the outputs it acted on (Horgan et al.
2018, section 3), so priorities are known before the learner samples a transition. The transition
of step t is complete once the network's outputs for step t + n are known.
"""

import collections

import numpy as np
import tensorflow as tf

from agents.heads import Head
from infra.array_function import ArrayFunction


class InitialPriorities:
    """Computes the errors of the n-step transitions of one actor's E environments."""

    def __init__(self, head: Head, n_step: int, gamma: float) -> None:
        """
        Args:
          head: interprets the network's outputs.
          n_step: agent steps of reward before the bootstrap.
          gamma: discount per agent step.
        """
        self._n_step = n_step
        self._gamma = gamma
        # The last n steps: outputs of the action taken, reward, discount.
        self._steps: collections.deque[tuple[np.ndarray, ...]] = collections.deque(maxlen=n_step)
        numbers = tf.TensorSpec([None], tf.float32)
        chosen = tf.TensorSpec([None, *head.output_shape], tf.float32)
        self._error = ArrayFunction(
            lambda *columns: tf.abs(head.loss(*columns)[1]), [chosen, chosen, numbers, numbers]
        )

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
        for _, step_reward, step_discount in self._steps:
            reward += running * step_reward
            running *= np.float32(self._gamma) * step_discount
        began = self._steps[0][0]
        return self._error(began, outputs[np.arange(len(action)), action], reward, running)

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
        self._steps.append((outputs[np.arange(len(action)), action], reward, discount))
