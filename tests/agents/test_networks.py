"""Networks: the same numbers and gradients as TensorFlow's own layers, shapes, seeds."""

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.specs import tensor_spec

from agents import config, networks
from agents.config import NetworkConfig

_NUM_ACTIONS = 6
# Weights and biases. Nature: 8*8*4*32 + 32 + 4*4*32*64 + 64 + 3*3*64*64 + 64
#   + 7*7*64*512 + 512 + 512*6 + 6; DQN 2013: 8*8*4*16 + 16 + 4*4*16*32 + 32
#   + 9*9*32*256 + 256 + 256*6 + 6. Narrow: 8*8*4*16 + 16 + 4*4*16*32 + 32 + 3*3*32*32
#   + 32 + 4*4*32*256 + 256 + 256*6 + 6.
_PARAMETERS = {'nature': 1_687_206, 'dqn2013': 677_686, 'narrow': 154_454}


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


@pytest.mark.parametrize('torso', sorted(_PARAMETERS))
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

    def test_number_of_parameters_is_that_of_the_layers_described(self, torso):
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


def test_standardized_input_equals_dividing_by_the_deviation_first_whatever_the_contrast():
    x = tf.cast(_observation(5) // 4, tf.float32)
    mean, variance = tf.nn.moments(x / 255, axes=[1, 2, 3], keepdims=True)
    # The plain network divides by 255 whatever it is given.
    plain, standardized = _network_of(_ATARI), _network_of(_ATARI, standardize_input=True)
    expected, _ = plain.call((x - 255 * mean) / tf.sqrt(variance + 1 / 255**2))
    np.testing.assert_allclose(standardized.call(x)[0], expected, rtol=1e-3, atol=1e-4)
    # Half the contrast: of a variance of some 18^2 grey levels the added one is a 300th.
    paler = standardized.call(100 + x / 2)[0]
    np.testing.assert_allclose(paler, expected, rtol=2e-2, atol=2e-3)
    assert np.isfinite(standardized(np.zeros((1, 84, 84, 4), np.uint8))[0]).all()


@pytest.mark.parametrize('dueling', [False, True])
def test_dense_layers_that_are_off_have_gradients_in_proportion_to_the_negative_slope(dueling):
    # One layer is off, of a dueling network one in each stream, so the factor enters once.
    flat, low, high = (
        _gradients_when_off(_ATARI, 'dense', negative_slope=slope, dueling=dueling)
        for slope in (0.0, 0.01, 0.02)
    )
    before = [name for name in flat if 'q_values' not in name]
    assert before
    for name in before:
        assert not flat[name].any()
        assert low[name].any()
        np.testing.assert_allclose(high[name], 2 * low[name], rtol=1e-3, atol=1e-12)


def test_hidden_layers_have_the_negative_slope_and_convolutions_have_none():
    for slope, learns in ((0.0, False), (0.01, True)):
        settings = {'dense_layers': '8,8', 'negative_slope': slope}
        gradients = _gradients_when_off(_VECTOR, 'hidden_1', **settings)
        assert gradients['hidden_1/kernel:0'].any() == learns
    gradients = _gradients_when_off(_ATARI, 'convolution_2', negative_slope=0.01)
    assert not gradients['convolution_1/kernel:0'].any()
    assert gradients['q_values/bias:0'].any()


def _gradients_when_off(observation, layer: str, **settings: Any) -> dict[str, np.ndarray]:
    """Gradients by variable, where biases of -100 turn the layers of this name off."""
    network = _network_of(observation, torso='dqn2013', **settings)
    for variable in network.trainable_variables:
        if variable.name.endswith(f'{layer}/bias:0'):
            variable.assign(tf.fill(variable.shape, -100.0))
    with tf.GradientTape() as tape:
        outputs = network(_batch(observation, 5))[0]
        loss = tf.reduce_sum(outputs[:, 0])
    gradients = tape.gradient(loss, network.trainable_variables)
    return {each.name: np.asarray(g) for each, g in zip(network.trainable_variables, gradients)}


@pytest.mark.parametrize('settings', [{}, {'standardize_input': True}])
def test_a_centralized_gradient_lacks_the_mean_of_each_filter_and_nothing_else(settings):
    outputs, gradients = _outputs_and_gradients(**settings)
    same, centralized = _outputs_and_gradients(**settings, centralize_gradient=True)
    np.testing.assert_array_equal(outputs, same)
    assert sum(gradient.ndim == 4 for gradient in gradients) == 2
    for gradient, other in zip(gradients, centralized, strict=True):
        mean = gradient.mean(axis=(0, 1, 2)) if gradient.ndim == 4 else 0  # [h, w, in, filters]
        np.testing.assert_allclose(other, gradient - mean, atol=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize(
    ('settings', 'tolerance'),
    [({}, 2e-2), ({'center_input': True}, 4e-3), ({'standardize_input': True}, 1e-2)],
)
def test_convolutions_in_bfloat16_keep_values_and_gradients_to_its_rounding(settings, tolerance):
    # bfloat16 rounds by up to 2^-9; the errors of a sum mostly cancel. Pixels have the mean taken
    # away before they are rounded: taken away from sums, it would leave an error of 7e-3. A factor
    # rounds the whole background one way.
    exact, gradient = _outputs_and_gradient(**settings)
    rounded, rough = _outputs_and_gradient(**settings, precision='bfloat16')
    assert 0 < np.abs(rounded - exact).max() < tolerance * exact.std()
    lengths = np.linalg.norm(gradient), np.linalg.norm(rough)
    assert gradient @ rough > 0.998 * math.prod(lengths)
    np.testing.assert_allclose(*lengths, rtol=0.02)


@pytest.mark.parametrize(
    ('precision', 'of_pictures'),
    [('float32', 'float32'), ('auto', 'float32'), ('bfloat16', 'bfloat16')],
)
def test_a_network_says_the_precision_of_its_convolutions(precision, of_pictures):
    numbers = tensor_spec.TensorSpec((4,), tf.float32)
    own = {'q_network': 'tests.support.own_network:of_a_dictionary'}
    dictionary = {'camera': _PICTURE, 'velocity': numbers}
    assert _network_of(_ATARI, precision=precision).precision == of_pictures
    assert _network_of(dictionary, precision=precision).precision == of_pictures
    assert _network_of(numbers, precision=precision).precision == 'float32'
    assert _network_of(dictionary, precision=precision, **own).precision is None


def _outputs_and_gradient(**settings: Any) -> tuple[np.ndarray, np.ndarray]:
    outputs, gradients = _outputs_and_gradients(**settings)
    return outputs, np.concatenate([np.ravel(each) for each in gradients])


def _outputs_and_gradients(**settings: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Of a bright background with sparse other pixels, whose mean is most of each sum."""
    pictures = _observation(5)
    pictures[np.random.default_rng(1).random(pictures.shape) > 0.05] = 200
    network = _network_of(_ATARI, torso='dqn2013', **settings)
    with tf.GradientTape() as tape:
        outputs = network(pictures)[0]
        loss = tf.reduce_sum(outputs**2)
    gradients = tape.gradient(loss, network.trainable_variables)
    assert {each.dtype for each in (outputs, *gradients)} == {tf.float32}
    return outputs.numpy(), [each.numpy() for each in gradients]


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


@pytest.mark.parametrize(('torso', 'filters'), [('nature', 32), ('dqn2013', 16), ('narrow', 16)])
def test_torsos_for_half_the_size_differ_in_the_first_kernel_alone(torso, filters):
    # (84 - 8) / 4 + 1 = (42 - 4) / 2 + 1 = 20 positions, so all later layers are those of 84 x 84.
    half = tensor_spec.BoundedTensorSpec((42, 42, 4), tf.uint8, 0, 255)
    network, whole = _network_of(half, torso=f'{torso}_half'), _network_of(_ATARI, torso=torso)
    changed = {'convolution_1/kernel': [4, 4, 4, filters]}
    assert _shapes(network) == _shapes(whole) | changed
    assert network(_batch(half, 0))[0].shape == (3, _NUM_ACTIONS)


_ATARI = tensor_spec.BoundedTensorSpec((84, 84, 4), tf.uint8, 0, 255)
_PICTURE = tensor_spec.BoundedTensorSpec((84, 84, 3), tf.uint8, 0, 255)
_MAP = tensor_spec.BoundedTensorSpec((10, 10, 4), tf.uint8, 0, 1)
_VECTOR = tensor_spec.BoundedTensorSpec((5,), tf.int32, -5, 5)


def _network_of(observation, **settings) -> networks.QNetwork:
    action = tensor_spec.BoundedTensorSpec((), tf.int32, 0, _NUM_ACTIONS - 1)
    return networks.q_network(observation, action, NetworkConfig(**settings), seed=1)


def _batch(spec: tf.TensorSpec, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    low, high = int(spec.minimum), int(spec.maximum)
    kind = spec.dtype.as_numpy_dtype
    return random.integers(low, high, (3, *spec.shape), kind, endpoint=True)


def _shapes(network: networks.QNetwork) -> dict[str, list[int]]:
    return {v.name.removesuffix(':0'): v.shape.as_list() for v in network.trainable_variables}


@pytest.mark.parametrize(
    ('shape', 'low', 'high', 'center'),
    [
        ((5,), 1, 2, False),
        ((5,), -5, 5, False),
        ((84, 84, 4), 10, 265, False),
        ((84, 84, 4), 10, 265, True),
    ],
)
def test_integers_are_scaled_from_their_own_lowest_value(shape, low, high, center):
    shifted = tensor_spec.BoundedTensorSpec(shape, tf.int16, low, high)
    plain = tensor_spec.BoundedTensorSpec(shape, tf.int16, 0, high - low)
    values = _batch(shifted, 3)
    outputs = _network_of(shifted, center_input=center)(values)[0]
    expected = _network_of(plain, center_input=center)(values - low)[0]
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_a_dictionary_of_a_picture_and_a_vector_has_convolutions_joined_with_the_scaled_vector():
    # Nature's three convolutions leave 7 x 7 x 64 = 3,136 of the picture; the vector adds 5.
    spec = {'velocity': _VECTOR, 'camera': _PICTURE}
    network = _network_of(spec, dense_layers='32,16')
    expected = {
        'convolution_1': [8, 8, 3, 32],
        'convolution_2': [4, 4, 32, 64],
        'convolution_3': [3, 3, 64, 64],
        'hidden_1': [32, 3_141],
        'dense': [16, 32],
        'q_values': [_NUM_ACTIONS, 16],
    }
    shapes = _shapes(network)
    assert {name: shapes[f'{name}/kernel'] for name in expected} == expected
    assert len(shapes) == 2 * len(expected)  # each with a bias

    weights = {v.name.removesuffix(':0'): v for v in network.trainable_variables}
    observation = {'velocity': _batch(_VECTOR, 1), 'camera': _batch(_PICTURE, 2)}
    x = tf.cast(observation['camera'], tf.float32) / 255
    for name, stride in (('convolution_1', 4), ('convolution_2', 2), ('convolution_3', 1)):
        x = tf.nn.conv2d(x, weights[f'{name}/kernel'], stride, 'VALID')
        x = tf.nn.relu(x + weights[f'{name}/bias'])
    speed = (observation['velocity'] + 5) / 10  # -5 .. 5 to 0 .. 1
    x = np.concatenate([x.numpy().reshape(3, -1), speed], axis=1)  # by the sorted names
    for name in ('hidden_1', 'dense'):
        x = np.maximum(x @ weights[f'{name}/kernel'].numpy().T + weights[f'{name}/bias'], 0)
    x = x @ weights['q_values/kernel'].numpy().T + weights['q_values/bias']
    np.testing.assert_allclose(network(observation)[0], x, rtol=1e-4, atol=1e-5)


def test_each_picture_has_convolutions_of_its_own_by_its_size():
    # A map of 10 x 10 is too small for Nature's: one convolution leaves 8 x 8 x 16 = 1,024. A
    # picture of 2 x 2 is too small for that, too: its four pixels are taken as they are.
    tiny = tensor_spec.BoundedTensorSpec((2, 2, 1), tf.uint8, 0, 255)
    network = _network_of((_MAP, {'eyes': [_PICTURE, _PICTURE]}, tiny), dense_layers='8')
    shapes = _shapes(network)
    assert shapes['convolution_1/kernel'] == [3, 3, 4, 16]
    assert shapes['part_2_convolution_1/kernel'] == [8, 8, 3, 32]
    assert shapes['part_3_convolution_3/kernel'] == [3, 3, 64, 64]
    assert not any(name.startswith('part_4') for name in shapes)
    assert shapes['dense/kernel'] == [8, 1_024 + 2 * 3_136 + 4]
    weights = {v.name.removesuffix(':0'): v.numpy() for v in network.trainable_variables}
    one, other = (weights[f'part_{number}_convolution_1/kernel'] for number in (2, 3))
    assert np.isclose(one, other, rtol=0, atol=1e-6).mean() < 0.01


def test_a_network_of_the_user_gets_the_nested_spec():
    spec = {'camera': _PICTURE, 'velocity': _VECTOR}
    network = _network_of(spec, q_network='tests.support.own_network:of_a_dictionary')
    assert _shapes(network)['q_values/kernel'] == [_NUM_ACTIONS, 3 + 5]
    values, _ = network({'camera': _batch(_PICTURE, 1), 'velocity': _batch(_VECTOR, 2)})
    assert values.shape == (3, _NUM_ACTIONS)
