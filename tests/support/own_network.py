"""Networks of a user, for `--q_network`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def of_a_dictionary(observation_spec: Any, seed: int) -> Callable[[Any], tf.Tensor]:
    """Joins the mean colours of a camera with a velocity, as its spec names them."""
    assert set(observation_spec) == {'camera', 'velocity'}
    assert observation_spec['camera'].shape.rank == 3

    def features(observation: Any) -> tf.Tensor:
        camera, velocity = (tf.cast(observation[key], tf.float32) for key in sorted(observation))
        return tf.concat([tf.reduce_mean(camera, axis=[1, 2]), velocity], axis=1)

    return features


def _of_layers(*layers: tf.keras.layers.Layer) -> tf.keras.Sequential:
    return tf.keras.Sequential([tf.keras.layers.Dense(4), *layers])


def dense(observation_spec: Any, seed: int) -> tf.keras.Sequential:
    """One that learns; its Dropout has no effect."""
    return _of_layers(tf.keras.layers.LayerNormalization(), tf.keras.layers.Dropout(0.5))


def convolution(observation_spec: Any, seed: int) -> tf.keras.Sequential:
    """One for pictures."""
    return _of_layers(tf.keras.layers.Conv2D(4, 3))


def three_axes(observation_spec: Any, seed: int) -> tf.keras.Sequential:
    """One whose features are no vector."""
    return _of_layers(tf.keras.layers.Reshape((2, 2)))


def one_row(observation_spec: Any, seed: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """One that joins a batch to one row."""
    return functools.partial(tf.reduce_mean, axis=0, keepdims=True)


def two_results(observation_spec: Any, seed: int) -> Callable[[tf.Tensor], Sequence[tf.Tensor]]:
    """One that returns more than features."""
    return lambda batch: (batch, batch)


def eager_only(observation_spec: Any, seed: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """One that no graph can hold."""
    return lambda batch: tf.constant(batch.numpy())


def nothing(observation_spec: Any, seed: int) -> None:
    """A function that forgets to return."""


def without_seed(observation_spec: Any) -> tf.keras.Sequential:
    """A function of one argument."""
    return _of_layers()


def failing(observation_spec: Any, seed: int) -> None:
    """A function that raises."""
    raise RuntimeError('no\nlicence')


def leaving(observation_spec: Any, seed: int) -> None:
    """A function that ends the process."""
    raise SystemExit(3)


def batch_normalization(observation_spec: Any, seed: int) -> tf.keras.Sequential:
    """One with running statistics."""
    return _of_layers(tf.keras.layers.BatchNormalization())


def frozen(observation_spec: Any, seed: int) -> tf.keras.Sequential:
    """One with a layer that does not learn."""
    return _of_layers(tf.keras.layers.Dense(4, trainable=False))


def hidden(observation_spec: Any, seed: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """One whose variables only its closure holds."""
    network = _of_layers()
    return lambda batch: 2 * network(batch)
