"""Optimizers: k updates of slices equal k updates of TensorFlow's own optimizers."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from infra.parameter_server.config import ParameterServerConfig
from infra.parameter_server.layout import Layout
from infra.parameter_server.optimizers import OptimizedSlice
from pipelines.experiment import presets

_UPDATES = 25
_REFERENCES = {
    'adagrad': lambda: tf.compat.v1.train.AdagradOptimizer(
        learning_rate=0.01, initial_accumulator_value=0.1
    ),
    'rmsprop': lambda: tf.compat.v1.train.RMSPropOptimizer(
        learning_rate=0.01, decay=0.95, momentum=0.5, epsilon=0.01, centered=True
    ),
    'adam': lambda: tf.compat.v1.train.AdamOptimizer(
        learning_rate=0.01, beta1=0.9, beta2=0.99, epsilon=1e-6
    ),
}
_CONFIGS: dict[str, dict] = {
    'adagrad': {'adagrad_initial_accumulator': 0.1},
    'rmsprop': {
        'optimizer_decay': 0.95, 'optimizer_momentum': 0.5, 'optimizer_epsilon': 0.01,
    },
    'adam': {'adam_beta_1': 0.9, 'adam_beta_2': 0.99, 'optimizer_epsilon': 1e-6},
}  # fmt: skip


class _Problem:
    """A small Keras regression, its variables and a fixed sequence of batches."""

    def __init__(self):
        tf.keras.utils.set_random_seed(3)
        self.model = tf.keras.Sequential(
            [tf.keras.layers.Dense(7, 'relu', input_shape=(5,)), tf.keras.layers.Dense(2)]
        )
        random = np.random.default_rng(4)
        self.inputs = random.normal(size=(_UPDATES, 16, 5)).astype(np.float32)
        self.labels = random.normal(size=(_UPDATES, 16, 2)).astype(np.float32)

    def gradients(self, batch):
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self.model(self.inputs[batch]) - self.labels[batch]) ** 2)
        return tape.gradient(loss, variables)


@pytest.mark.parametrize('num_shards', [1, 3])
@pytest.mark.parametrize('optimizer', ['adagrad', 'rmsprop', 'adam'])
def test_slices_equal_the_optimizer_of_tensorflow(optimizer, num_shards):
    reference, ours = _Problem(), _Problem()
    layout = Layout.from_variables(ours.model.trainable_variables)
    config = ParameterServerConfig(optimizer=optimizer, learning_rate=0.01, **_CONFIGS[optimizer])
    parts = layout.slices(num_shards)
    slices = [OptimizedSlice(config, part.stop - part.start) for part in parts]
    flat = layout.flatten(ours.model.get_weights())
    for shard, part in zip(slices, parts):
        np.copyto(shard.parameters, flat[part])
    their_optimizer = _REFERENCES[optimizer]()
    for batch in range(_UPDATES):
        variables = reference.model.trainable_variables
        their_optimizer.apply_gradients(zip(reference.gradients(batch), variables))
        gradient = layout.flatten(ours.gradients(batch))
        for shard, part in zip(slices, parts):
            shard.step(tf.constant(gradient[part]), update=1)
        flat = np.concatenate([shard.parameters for shard in slices])
        ours.model.set_weights(layout.unflatten(flat))
    expected = layout.flatten(reference.model.get_weights())
    # Relative to the largest parameter: an element near zero has no meaningful relative error.
    np.testing.assert_allclose(flat, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_adagrad_divides_by_the_root_of_the_sum_of_squares():
    config = ParameterServerConfig(
        optimizer='adagrad', learning_rate=0.5, adagrad_initial_accumulator=1.0
    )
    part = OptimizedSlice(config, 1)
    part.step(tf.constant([2.0]), update=1)
    part.step(tf.constant([2.0]), update=1)
    # -0.5 * 2 / sqrt(1 + 4) - 0.5 * 2 / sqrt(1 + 4 + 4) = -0.4472136 - 0.3333333
    np.testing.assert_allclose(part.parameters, [-0.7805469], rtol=1e-6)


def test_adagrad_of_the_paper_preset_adapts_to_gradients_as_small_as_pongs():
    config = presets.experiment('paper', {}).parameter_server
    part = OptimizedSlice(config, 2)
    small, large = 3e-5, 3e-4  # a usual one of Pong's at the start, and ten times that
    # As 10,000 updates: the sum of squares after them is that of one gradient 100 times as large.
    part.step(tf.constant([100 * small, 100 * large]), update=1)
    before = part.parameters.copy()
    part.step(tf.constant([small, large]), update=1)
    steps = part.parameters - before
    # 0.01 * 3e-5 / sqrt(1e-6 + 9e-6) = 9.49e-5 and 0.01 * 3e-4 / sqrt(1e-6 + 9e-4) = 9.99e-5; an
    # accumulator of 0.1 would leave ten times the step to the gradient of ten times the size.
    np.testing.assert_allclose(steps, [-9.49e-5, -9.99e-5], rtol=1e-3)


@pytest.mark.parametrize('optimizer', ['adagrad', 'rmsprop', 'adam'])
def test_the_step_of_each_optimizer_falls_linearly_over_the_updates_named(optimizer):
    def step(update: int, **settings: Any) -> float:
        config = ParameterServerConfig(optimizer=optimizer, learning_rate=0.5, **settings)
        part = OptimizedSlice(config, 1)
        part.step(tf.constant([2.0]), update)
        return float(part.parameters[0])

    whole, falling = step(1), {'learning_rate_end': 0.1, 'learning_rate_updates': 100}
    # From 0.5 at the first to 0.1 at the 101st and all later ones: 0.3 at the 51st.
    for update, share in ((1, 1.0), (51, 0.6), (101, 0.2), (9_999, 0.2)):
        assert step(update, **falling) == pytest.approx(share * whole, rel=1e-5)
    assert step(9_999) == whole


def test_an_integer_from_a_configuration_file_is_a_number_like_any_other():
    config = ParameterServerConfig(optimizer='adagrad', adagrad_initial_accumulator=1)
    OptimizedSlice(config, 2).step(tf.constant([1.0, 2.0]), update=1)


@pytest.mark.parametrize('optimizer', ['adagrad', 'rmsprop', 'adam'])
def test_updates_after_a_restore_equal_those_after_the_copy(optimizer):
    part = OptimizedSlice(ParameterServerConfig(optimizer=optimizer, average_updates=100), 1000)
    gradients = [tf.fill([1000], value) for value in (1.0, -3.0, 0.5)]
    part.step(gradients[0], update=10)
    copy = part.copy_state()
    ends = []
    for _ in range(2):
        part.restore(copy)
        for gradient in gradients[1:]:
            part.step(gradient, update=20)
        ends.append(part.copy_state())
    part.require_in_place()  # else an update writes the whole vector to a fresh copy
    for name, first in ends[0].items():
        np.testing.assert_array_equal(first, ends[1][name])
        assert (first != copy[name]).any(), name  # a kernel that left the array would change none


def test_the_average_is_that_of_every_tenth_update_at_first_and_then_forgets():
    config = ParameterServerConfig(optimizer='adagrad', average_updates=100)
    part = OptimizedSlice(config, 2)
    part.initialise(np.array([7.0, 8.0], np.float32))
    np.testing.assert_array_equal(part.state['average'], [7.0, 8.0])
    averaged, seen = [], {}
    for update in range(1, 141):
        part.step(tf.constant([1.0, -1.0]), update)
        if update % 10 == 0:
            averaged.append(part.parameters.copy())
        seen[update] = part.state['average'].copy()
        if update < 10:  # before the first of them
            np.testing.assert_array_equal(seen[update], part.parameters)
    np.testing.assert_allclose(seen[100], np.mean(averaged[:10], axis=0), rtol=1e-6)
    # From then on a tenth of each is new: 0.9^4 of the mean of ten is left after four more.
    expected = seen[100]
    for new in averaged[10:]:
        expected = 0.9 * expected + 0.1 * new
    np.testing.assert_allclose(seen[140], expected, rtol=1e-6)


def test_a_state_without_an_average_starts_it_with_its_parameters_and_one_may_be_dropped():
    old, new = ParameterServerConfig(), ParameterServerConfig(average_updates=1000)
    without, kept = OptimizedSlice(old, 2), OptimizedSlice(new, 2)
    without.initialise(np.array([3.0, 4.0], np.float32))
    kept.restore(without.copy_state())
    np.testing.assert_array_equal(kept.state['average'], [3.0, 4.0])
    without.restore(kept.copy_state())
    assert 'average' not in without.copy_state()


def test_a_variable_that_tensorflow_moves_is_noticed():
    part = OptimizedSlice(ParameterServerConfig(), 3)
    part._variables['parameters'].assign(tf.ones([3]))
    with pytest.raises(RuntimeError, match='parameters of the shard'):
        part.require_in_place()


@pytest.mark.parametrize(
    'bad',
    [
        {'optimizer': 'sgd'},
        {'learning_rate': 0.0},
        {'learning_rate_updates': -1},
        {'average_updates': 20},
        {'num_parameter_shards': 0},
        {'max_staleness': -1},
        {'wire': 'float16'},
        {'adam_beta_1': 1.0},
        {'target_update_period': 0},
    ],
)
def test_a_wrong_value_is_named(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f'--{name} {value!r}: must be'):
        ParameterServerConfig(**bad)
