"""Variables and arrays in the same memory: what is written to one is read from the other."""

import numpy as np
import tensorflow as tf

from infra.array_variables import SharedVariables, aligned_arrays, memory_address, memory_of

_SHAPES: tuple[tuple[int, ...], ...] = ((3,), (4, 2), (), (1000,))


def _variables() -> list[tf.Variable]:
    return [tf.Variable(tf.zeros(shape)) for shape in _SHAPES]


class TestMemoryOf:
    def test_the_array_has_what_kernels_write_and_the_variable_what_is_written_to_the_array(self):
        for variable in _variables():
            array = memory_of(variable)
            for _ in range(100):
                variable.assign_add(tf.ones(variable.shape))
            np.testing.assert_array_equal(array, np.full(variable.shape, 100.0))
            array[...] = 7.0
            variable.assign_sub(tf.ones(variable.shape))
            np.testing.assert_array_equal(variable.numpy(), np.full(variable.shape, 6.0))
            np.testing.assert_array_equal(array, np.full(variable.shape, 6.0))
            assert array.__array_interface__['data'][0] == memory_address(variable)


class TestSharedVariables:
    def test_variables_have_what_is_written_to_their_arrays(self):
        variables, arrays = _variables(), aligned_arrays(_SHAPES)
        SharedVariables(variables).move_to(arrays)
        for number in range(3):
            for i, (array, variable) in enumerate(zip(arrays, variables)):
                array[...] = 10 * number + i
                np.testing.assert_array_equal(variable.numpy(), np.full(_SHAPES[i], array.max()))

    def test_variables_that_move_leave_their_first_arrays_as_they_are(self):
        variables, first, second = _variables(), aligned_arrays(_SHAPES), aligned_arrays(_SHAPES)
        shared = SharedVariables(variables)
        shared.move_to(first)
        for array in second:
            array[...] = 5.0
        shared.move_to(second)
        assert all((variable.numpy() == 5.0).all() for variable in variables)
        assert all((array == 0.0).all() for array in first)
        shared.move_to(first)
        second[0][...] = 7.0
        assert (variables[0].numpy() == 0.0).all()
