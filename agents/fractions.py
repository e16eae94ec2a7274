"""Fractions at which quantiles are taken: a batch in, random fractions out; and fixed ones."""

from typing import Any

import numpy as np
import tensorflow as tf


def midpoints(count: int) -> np.ndarray:
    """Midpoints of `count` equal parts of [0, 1], float32 [count]."""
    return ((np.arange(count) + 0.5) / count).astype(np.float32)


def drawn(batch: Any, count: int, stream: int) -> tf.Tensor:
    """Uniform fractions float32 [B, count] for a batch [B, ...] of observations, nested or not.

    The seed is a hash of the batch. A gradient thus stays a function of parameters and batch, while
    another batch gets other fractions.

    Args:
      batch: any type.
      count: fractions of a row.
      stream: gives other fractions for the same batch.
    """
    parts = tf.nest.flatten(batch)
    hashes = [tf.fingerprint(tf.reshape(part, (1, -1))) for part in parts]  # bytes [1, 8] each
    hashed = hashes[0] if len(hashes) == 1 else tf.fingerprint(tf.concat(hashes, axis=1))
    seed = tf.bitcast(tf.reshape(hashed, (2, 4)), tf.int32)
    seed = tf.random.experimental.stateless_fold_in(seed, stream)
    return tf.random.stateless_uniform((tf.shape(parts[0])[0], count), seed)
