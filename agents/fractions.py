"""Fractions at which quantiles are taken: a batch in, random fractions out; and fixed ones."""

import numpy as np
import tensorflow as tf


def midpoints(count: int) -> np.ndarray:
    """Midpoints of `count` equal parts of [0, 1], float32 [count]."""
    return ((np.arange(count) + 0.5) / count).astype(np.float32)


def drawn(batch: tf.Tensor, count: int, stream: int) -> tf.Tensor:
    """Uniform fractions float32 [B, count] for a batch [B, ...] of observations.

    The seed is a hash of the batch. A gradient thus stays a function of parameters and batch, while
    another batch gets other fractions.

    Args:
      batch: any type.
      count: fractions of a row.
      stream: gives other fractions for the same batch.
    """
    hashed = tf.reshape(tf.fingerprint(tf.reshape(batch, (1, -1))), (2, 4))  # bytes
    seed = tf.random.experimental.stateless_fold_in(tf.bitcast(hashed, tf.int32), stream)
    return tf.random.stateless_uniform((tf.shape(batch)[0], count), seed)
