"""Arrays in, a graph's arrays out, and no tensor that Python could lose."""

import gc
import threading
import weakref

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import cancellation

from infra.array_function import ArrayFunction
from tests.support import memory

_CALLS = 500


def _sum_and_norm(x: tf.Tensor, y: tf.Tensor) -> dict:
    return {'sum': x + y, 'norms': (tf.norm(x), tf.norm(y))}


VECTOR = tf.TensorSpec([None], tf.float32)


def test_takes_and_gives_arrays_in_the_functions_structure():
    function = ArrayFunction(_sum_and_norm, [VECTOR, VECTOR])
    result = function(np.array([3, 4], np.float32), np.array([0, 2], np.float32))
    assert isinstance(result['sum'], np.ndarray)
    np.testing.assert_array_equal(result['sum'], np.array([3, 6], np.float32))
    assert result['norms'] == (5.0, 2.0)


def test_an_output_stays_what_it_was_after_the_next_call():
    variable = tf.Variable([0.0, 0.0])
    function = ArrayFunction(lambda x: variable.assign_add(x).read_value(), [VECTOR])
    results = [function(np.array([1, 2], np.float32)) for _ in range(3)]
    np.testing.assert_array_equal(results, [[1, 2], [2, 4], [3, 6]])


def test_a_function_without_a_result_gives_none():
    variable = tf.Variable([0.0, 0.0])

    def assign(x: tf.Tensor) -> None:
        variable.assign(x)

    function = ArrayFunction(assign, [tf.TensorSpec([2], tf.float32)])
    assert function(np.array([5, 6], np.float32)) is None
    np.testing.assert_array_equal(variable.numpy(), [5, 6])


@pytest.mark.parametrize(
    ('arrays', 'message'),
    [
        ((np.zeros(2, np.float64), np.zeros(2, np.float32)), r'argument 0: float64\[2\] given'),
        ((np.zeros(2, np.float32), np.zeros((2, 1), np.float32)), r'argument 1: float32\[2, 1\]'),
        ((np.zeros(2, np.float32),), '1 arrays given, 2 are needed'),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, message):
    function = ArrayFunction(_sum_and_norm, [VECTOR, VECTOR])
    with pytest.raises(ValueError, match=message):
        function(*arrays)


def test_an_output_can_not_be_written_to():
    # It is the variable's own memory.
    variable = tf.Variable([1.0, 2.0])
    result = ArrayFunction(variable.read_value)()
    with pytest.raises(ValueError, match='read-only'):
        result[0] = 7.0


def test_an_error_in_the_graph_spoils_no_later_call():
    function = ArrayFunction(lambda x: tf.debugging.check_numerics(x, 'x'), [VECTOR])
    with pytest.raises(tf.errors.InvalidArgumentError, match=__file__):  # the line that failed
        function(np.array([np.nan, 2], np.float32))
    np.testing.assert_array_equal(function(np.array([1, 2], np.float32)), [1, 2])


def test_a_second_thread_is_refused_while_a_call_is_under_way():
    entered, release = threading.Event(), threading.Event()

    def wait() -> np.float32:
        entered.set()
        release.wait(10)
        return np.float32(3.0)

    function = ArrayFunction(lambda: tf.numpy_function(wait, [], tf.float32))
    results: list[float] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    assert entered.wait(10)
    with pytest.raises(RuntimeError, match='another thread'):
        function()
    release.set()
    thread.join(10)
    assert results == [3.0]


def test_a_call_under_way_is_cancelled_from_another_thread():
    queue = tf.queue.FIFOQueue(1, tf.float32, shapes=[()])
    manager = cancellation.CancellationManager()
    function = ArrayFunction(queue.dequeue, cancellation=manager)
    timer = threading.Timer(0.2, manager.start_cancel)
    timer.start()
    with pytest.raises(tf.errors.CancelledError):
        function()
    timer.join()


def test_a_function_let_go_is_freed_with_what_it_captured():
    # A replay reader traces one for every attempt at its shard, all in one thread.
    queue = tf.queue.FIFOQueue(1, tf.float32, shapes=[()])
    function = ArrayFunction(queue.size)
    assert function() == 0
    alive = weakref.ref(function), weakref.ref(queue)
    del function, queue
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_calls_leave_nothing_behind():
    function = ArrayFunction(_sum_and_norm, [VECTOR, VECTOR])
    x = np.ones(100, np.float32)
    kept = memory.blocks_kept(lambda: function(x, x), _CALLS, few=_CALLS // 2)
    assert kept < _CALLS / 2  # one tensor a call would be _CALLS


def test_tensors_that_python_sees_are_still_lost():
    """If this fails TensorFlow has mended it: ArrayFunction has lost its main reason."""
    function = tf.function(_sum_and_norm, input_signature=[VECTOR, VECTOR])
    x = tf.ones(100)
    assert memory.blocks_kept(lambda: function(x, x), _CALLS) >= 3 * _CALLS  # three results a call
