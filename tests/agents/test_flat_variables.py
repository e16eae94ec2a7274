"""A network's variables as one vector: what is assigned is what is there, and stays."""

import mmap

import numpy as np
import pytest
import tensorflow as tf

from agents.flat_variables import FlatVariables
from tests.support import dqn_agents


def aligned(values: np.ndarray) -> np.ndarray:
    """A copy on a page of its own: memory that TensorFlow takes over without a copy."""
    copy = np.frombuffer(mmap.mmap(-1, values.nbytes), values.dtype)
    np.copyto(copy, values)
    return copy


class TestFlatVariables:
    def test_what_was_assigned_stays_when_its_source_changes(self):
        # The parameter server's client lends memory that a shard writes again.
        learner = dqn_agents.gradient()
        expected = np.arange(len(learner.parameters()), dtype=np.float32)
        sources = [aligned(part) for part in np.split(expected, [1000])]
        learner.set_parameters(*sources)
        for source in sources:
            source[:] = -1.0
        np.testing.assert_array_equal(learner.parameters(), expected)

    def test_what_is_assigned_is_read_back_and_lies_in_the_variables_in_order(self):
        shapes: tuple[list[int], ...] = ([3], [4, 2], [], [2, 1, 5])
        variables = [tf.Variable(tf.zeros(shape)) for shape in shapes]
        flat = FlatVariables(variables)
        values = np.arange(22, dtype=np.float32)
        flat.assign(values)
        np.testing.assert_array_equal(flat.values(), values)
        np.testing.assert_array_equal(variables[1], values[3:11].reshape(4, 2))

    def test_variables_keep_their_values_when_the_vector_changes_later(self):
        flat = FlatVariables([tf.Variable(tf.zeros([64])), tf.Variable(tf.zeros([64]))])
        values = np.ones(128, np.float32)
        flat.assign(values)
        values[:] = 7.0
        np.testing.assert_array_equal(flat.values(), np.ones(128))

    def test_a_vector_of_another_size_is_refused(self):
        flat = FlatVariables([tf.Variable(tf.zeros([3]))])
        with pytest.raises((TypeError, ValueError)):
            flat.assign(np.zeros(4, np.float32))
