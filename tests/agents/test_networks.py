"""Networks: the same numbers and gradients as TensorFlow's own layers, shapes, seeds."""

import hashlib

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.specs import tensor_spec

from agents import config, networks
from agents.config import NetworkConfig

_NUM_ACTIONS = 6
# Weights and biases. Nature: 8*8*4*32 + 32 + 4*4*32*64 + 64 + 3*3*64*64 + 64
#   + 7*7*64*512 + 512 + 512*6 + 6; DQN 2013: 8*8*4*16 + 16 + 4*4*16*32 + 32
#   + 9*9*32*256 + 256 + 256*6 + 6.
_PARAMETERS = {'nature': 1_687_206, 'dqn2013': 677_686}


def _network(torso: str = 'nature', seed: int = 0, center_input: bool = False) -> networks.QNetwork:
    observation = tensor_spec.BoundedTensorSpec((84, 84, 4), tf.uint8, 0, 255)
    action = tensor_spec.BoundedTensorSpec((), tf.int32, 0, _NUM_ACTIONS - 1)
    config = NetworkConfig(torso, center_input)
    return networks.q_network(observation, action, config, seed)


def _stock_network(torso: str) -> tf.keras.Sequential:
    """The same network out of Keras's layers, channels last, kernels [in, out]."""
    keras = tf.keras.layers
    layers = [keras.Rescaling(1 / 255, input_shape=(84, 84, 4))]
    for filters, size, stride in networks.TORSOS[torso].convolutions:
        layers.append(keras.Conv2D(filters, size, stride, activation='relu'))
    layers += [keras.Flatten(), keras.Dense(networks.TORSOS[torso].dense_units, 'relu')]
    return tf.keras.Sequential([*layers, keras.Dense(_NUM_ACTIONS)])


def _keras_order(network: networks.QNetwork, values: list) -> list[np.ndarray]:
    """`values` of the network's trainable variables as Keras's `get_weights` would list them."""
    by_name = {}
    for variable, value in zip(network.trainable_variables, values):
        layer, kind = variable.name.removesuffix(':0').split('/')[-2:]
        array = np.asarray(value)
        by_name[layer, kind] = array.T if array.ndim == 2 else array
    count = sum(kind == 'bias' for _, kind in by_name) - 2
    order = [f'convolution_{index + 1}' for index in range(count)] + ['dense', 'q_values']
    return [by_name[layer, kind] for layer in order for kind in ('kernel', 'bias')]


def _observation(batch_size: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.integers(256, size=(batch_size, 84, 84, 4), dtype=np.uint8)


@pytest.mark.parametrize('torso', sorted(networks.TORSOS))
class TestQNetwork:
    def test_values_and_gradients_equal_those_of_stock_layers(self, torso):
        network, stock = _network(torso), _stock_network(torso)
        stock.set_weights(_keras_order(network, network.trainable_variables))
        observation = _observation(5)
        weights = tf.constant(np.random.default_rng(1).normal(size=(5, 6)), tf.float32)
        with tf.GradientTape() as tape:
            values, _ = network(observation)
            score = tf.reduce_sum(weights * values**2)
        gradients = _keras_order(network, tape.gradient(score, network.trainable_variables))
        with tf.GradientTape() as tape:
            stock_values = stock(tf.cast(observation, tf.float32))
            score = tf.reduce_sum(weights * stock_values**2)
        np.testing.assert_allclose(values, stock_values, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(gradients, tape.gradient(score, stock.trainable_variables)):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())

    def test_a_global_policy_of_mixed_precision_leaves_values_and_gradients_float32(self, torso):
        def values_and_gradients() -> list:
            network = _network(torso)
            with tf.GradientTape() as tape:
                values, _ = network(_observation(2))
            return [values, *tape.gradient(values, network.trainable_variables)]

        plain = values_and_gradients()
        tf.keras.mixed_precision.set_global_policy('mixed_float16')
        try:
            mixed = values_and_gradients()
        finally:
            tf.keras.mixed_precision.set_global_policy('float32')
        for one, other in zip(plain, mixed):
            assert other.dtype == tf.float32
            np.testing.assert_array_equal(one, other)

    def test_number_of_parameters_is_the_papers(self, torso):
        count = sum(variable.shape.num_elements() for variable in _network(torso).variables)
        assert count == _PARAMETERS[torso]

    def test_first_weights_fill_one_over_the_root_of_the_fan_in(self, torso):
        # A uniform sample of n values reaches 0.99 of its bound with probability 1 - 0.99^n.
        fan_in = 8 * 8 * 4
        kernel = next(v for v in _network(torso).variables if 'convolution_1/kernel' in v.name)
        assert 0.99 / fan_in**0.5 < np.abs(kernel).max() <= 1 / fan_in**0.5

    def test_a_seed_gives_the_same_first_weights_and_another_seed_others(self, torso):
        one, same, other = (_network(torso, seed).variables for seed in (3, 3, 4))
        for first, second, third in zip(one, same, other):
            np.testing.assert_array_equal(first, second)
            assert (first.numpy() != third.numpy()).any()

    def test_a_copy_has_variables_of_its_own(self, torso):
        network = _network(torso)
        copy = network.copy(name='copy')
        copy.create_variables()
        copy.variables[0].assign_add(tf.ones_like(copy.variables[0]))
        difference = copy.variables[0].numpy() - network.variables[0].numpy()
        np.testing.assert_allclose(difference, 1, rtol=1e-6)


class TestDense:
    def test_product_and_gradients_equal_those_of_matmul(self):
        random = np.random.default_rng(0)
        x, kernel, dy = (
            tf.constant(random.normal(size=shape), tf.float32)
            for shape in ((32, 100), (50, 100), (32, 50))
        )
        results = []
        for product in (networks.dense, lambda x, kernel: tf.matmul(x, kernel, transpose_b=True)):
            with tf.GradientTape() as tape:
                tape.watch((x, kernel))
                y = product(x, kernel)
            results.append((y, *tape.gradient(y, (x, kernel), output_gradients=dy)))
        for ours, theirs in zip(*results):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def test_every_torso_of_the_configuration_exists():
    assert set(networks.TORSOS) == set(config.TORSOS)


def test_centered_input_equals_taking_the_mean_away_first():
    plain, centered = _network('dqn2013', 1), _network('dqn2013', 1, center_input=True)
    x = tf.cast(_observation(5), tf.float32)
    # The plain network casts and scales whatever it is given, so it can be given x - mean(x).
    expected, _ = plain.call(x - tf.reduce_mean(x, axis=[1, 2, 3], keepdims=True))
    actual, _ = centered(_observation(5))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('torso', 'dueling', 'expected'),
    [
        ('nature', False, '6a3403e5d558'),
        ('nature', True, 'e336a0a7d5ff'),
        ('dqn2013', False, 'd0e4ab81905d'),
        ('dqn2013', True, '5631145648e1'),
    ],
)
def test_first_weights_for_atari_and_their_order_are_those_of_earlier_versions(
    torso, dueling, expected
):
    # Checkpoints of earlier runs rely on the order. The checksums were taken at a80c066.
    observation = tensor_spec.BoundedTensorSpec((84, 84, 4), tf.uint8, 0, 255)
    action = tensor_spec.BoundedTensorSpec((), tf.int32, 0, _NUM_ACTIONS - 1)
    network = networks.q_network(
        observation, action, NetworkConfig(torso, dueling=dueling), 7, output_shape=(3,)
    )
    weights = b''.join(variable.numpy().tobytes() for variable in network.trainable_variables)
    assert hashlib.sha1(weights).hexdigest()[:12] == expected
