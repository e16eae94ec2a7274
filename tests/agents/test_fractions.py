"""Fractions of quantiles: fixed midpoints, and random ones that follow from a batch."""

import numpy as np
import tensorflow as tf

from agents.fractions import drawn, midpoints
from tests.support import dqn_agents


def test_midpoints_halve_equal_parts():
    np.testing.assert_array_equal(midpoints(4), np.array([0.125, 0.375, 0.625, 0.875], np.float32))


def test_drawn_fractions_are_uniform_and_differ_by_row_and_stream():
    batch = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)
    one, other = drawn(batch, 8, 0).numpy(), drawn(batch, 8, 1).numpy()
    counts = np.histogram(one, bins=10, range=(0, 1))[0]
    # 8,000 fractions: 800 in each tenth, with a standard deviation of sqrt(8000 0.1 0.9) = 27.
    np.testing.assert_allclose(counts, 800, atol=5 * 27)
    assert len(np.unique(one[:, 0])) > 990
    assert (one != other).mean() > 0.99


def test_equal_batches_have_equal_fractions_and_a_changed_pixel_changes_all():
    batch = dqn_agents.frames(0, 4)
    one = drawn(batch, 8, 0).numpy()
    traced = tf.function(drawn, autograph=False)(tf.constant(batch), 8, 0).numpy()
    np.testing.assert_array_equal(traced, one)
    batch[-1, 0, 0, 0] ^= 1
    assert (drawn(batch, 8, 0).numpy() != one).mean() > 0.9


def test_every_part_of_a_structure_changes_the_fractions():
    picture, speed = dqn_agents.frames(0, 4), np.zeros((4, 2), np.float32)
    batch = {'picture': picture, 'speed': (speed,)}
    one = drawn(batch, 8, 0).numpy()
    np.testing.assert_array_equal(drawn(batch, 8, 0), one)
    assert one.shape == (4, 8)
    picture[-1, 0, 0, 0] ^= 1
    other = drawn(batch, 8, 0).numpy()
    speed[0, 1] = 1
    for first, second in ((one, other), (other, drawn(batch, 8, 0).numpy())):
        assert (first != second).mean() > 0.9


def test_a_gradient_of_drawn_quantiles_follows_from_parameters_and_batch():
    # The second learner has computed others before; another batch draws other fractions.
    first, second = (dqn_agents.gradient(**dqn_agents.FAMILY['iqn']) for _ in range(2))
    second.gradient(dqn_agents.transition(batch_size=5))
    transition = dqn_agents.transition()
    for one, other in zip(first.gradient(transition), second.gradient(transition)):
        np.testing.assert_array_equal(one, other)


def test_actions_are_chosen_at_midpoints_so_a_row_is_valued_alike_in_any_batch():
    network = dqn_agents.make(**dqn_agents.FAMILY['iqn']).q_network
    observation = tf.constant(dqn_agents.frames(1, 3))
    quantiles, _ = network(observation)
    explicit, _ = network(observation, fractions=tf.constant(np.tile(midpoints(5), (3, 1))))
    np.testing.assert_allclose(quantiles, explicit, rtol=1e-5, atol=1e-6)
    alone, _ = network(observation[1:2])
    np.testing.assert_allclose(alone, quantiles[1:2], rtol=1e-5, atol=1e-6)
