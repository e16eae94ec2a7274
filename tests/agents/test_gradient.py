"""The learner's half of an agent: the order of its vector, clipping, weights, the target."""

import numpy as np
import pytest
import tensorflow as tf

from agents.flat_variables import FlatVariables
from agents.model import tf_agents_transition
from tests.support import dqn_agents

BATCH = 6


class TestGradient:
    def test_it_lists_the_variables_in_their_order(self):
        learner, transition = dqn_agents.gradient(), dqn_agents.transition()
        variables = learner.variables
        with tf.GradientTape() as tape:
            experience = tf_agents_transition(dqn_agents.Transition(*map(tf.constant, transition)))
            loss = dqn_agents.agent_of(learner).loss(experience, training=True, gamma=1.0).loss
        expected = [np.ravel(part) for part in tape.gradient(loss, variables)]
        gradient = learner.gradient(transition)[0]
        expected = np.concatenate(expected)
        assert gradient.dtype == np.float32
        np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())

    def test_it_is_clipped_to_the_global_norm(self):
        free = dqn_agents.gradient().gradient(dqn_agents.transition())[0]
        norm = float(np.linalg.norm(free))
        clipped = dqn_agents.gradient(clip_norm=norm / 4).gradient(dqn_agents.transition())[0]
        np.testing.assert_allclose(clipped, free / 4, rtol=1e-4, atol=1e-6 * norm)
        *_, factor = dqn_agents.gradient(clip_norm=norm / 4).gradient(dqn_agents.transition())
        assert factor == pytest.approx(0.25, rel=1e-5)
        below = dqn_agents.gradient(clip_norm=2 * norm).gradient(dqn_agents.transition())[0]
        np.testing.assert_array_equal(below, free)

    def test_a_zero_gradient_stays_zero_when_clipped(self):
        learner = dqn_agents.gradient(clip_norm=1.0)
        learner.set_parameters(np.zeros_like(learner.parameters()))
        transition = dqn_agents.transition()._replace(
            reward=tf.zeros(BATCH), discount=tf.zeros(BATCH)
        )  # q = 0 = target
        assert not learner.gradient(transition)[0].any()

    def test_batches_of_any_size_are_taken(self):
        learner = dqn_agents.gradient()
        for batch_size in (2, 5, 2):
            _, _, absolute_error, _ = learner.gradient(dqn_agents.transition(batch_size))
            assert absolute_error.shape == (batch_size,)

    def test_the_target_network_has_no_gradient_and_is_left_alone(self):
        learner = dqn_agents.gradient()
        target = FlatVariables(dqn_agents.agent_of(learner).target_q_network.trainable_variables)
        before = target.values()
        learner.gradient(dqn_agents.transition())
        np.testing.assert_array_equal(target.values(), before)


class TestBadInput:
    def test_a_column_of_another_type_is_refused_and_named(self):
        transition = dqn_agents.transition()
        wrong = transition._replace(reward=np.asarray(transition.reward, np.float64))
        with pytest.raises(ValueError, match=r'argument 2: float64\[\d+\] given, float32'):
            dqn_agents.gradient().gradient(wrong)


class TestWeights:
    def test_they_scale_the_rows_gradients(self):
        transition = dqn_agents.transition()
        plain = dqn_agents.gradient()
        weighted = dqn_agents.gradient(weighted=True)
        ones = np.ones(BATCH, np.float32)
        double, *told = weighted.gradient(transition, 2 * ones)
        single, *expected = plain.gradient(transition)
        scale = np.abs(single).max()
        np.testing.assert_allclose(double / scale, 2 * single / scale, atol=1e-5)
        # Loss and errors are told without weights.
        for got, unweighted in zip(told, expected, strict=True):
            np.testing.assert_allclose(got, unweighted, rtol=1e-5)

    def test_a_row_of_weight_zero_teaches_nothing_and_tells_its_error(self):
        transition = dqn_agents.transition(2)
        weights = np.array([1, 0], np.float32)
        learner = dqn_agents.gradient(weighted=True)
        changed = transition._replace(reward=transition.reward + np.array([0, 5], np.float32))
        first, second = (learner.gradient(t, weights) for t in (transition, changed))
        np.testing.assert_array_equal(first[0], second[0])
        assert first[2][1] != second[2][1]


class TestTarget:
    def test_it_is_set_and_the_network_is_not(self):
        learner = dqn_agents.gradient()
        online = learner.parameters()
        values = np.arange(len(online), dtype=np.float32)
        for shift in (0, 7):  # a second time: the target moves to other memory
            learner.set_target(values + shift)
            learner.set_parameters(online)
            target = FlatVariables(
                dqn_agents.agent_of(learner).target_q_network.trainable_variables
            )
            np.testing.assert_array_equal(target.values(), values + shift)
            np.testing.assert_array_equal(learner.parameters(), online)
