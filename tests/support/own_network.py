"""Networks of a user, for `--q_network`."""

from collections.abc import Callable
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
