"""Layouts: order, slices and fingerprints of the flat parameter vector."""

import numpy as np
import pytest

from infra.parameter_server.layout import Layout

_LAYOUT = Layout(('kernel', 'bias', 'scale'), ((2, 3), (4,), ()))


def test_offsets_follow_the_order_of_the_variables():
    # 2 * 3 elements, then 4, then a scalar.
    assert _LAYOUT.size == 11
    assert _LAYOUT.offsets == (0, 6, 10)


def test_unflatten_undoes_flatten():
    arrays = [np.arange(6.0).reshape(2, 3), np.arange(4.0), np.array(7.0)]
    flat = _LAYOUT.flatten(arrays)
    assert flat.dtype == np.float32
    for array, again in zip(arrays, _LAYOUT.unflatten(flat), strict=True):
        np.testing.assert_array_equal(array, again)


def test_unflatten_makes_views():
    flat = np.zeros(11, np.float32)
    _LAYOUT.unflatten(flat)[1][:] = 1
    np.testing.assert_array_equal(flat, [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0])


def test_arrays_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match='do not fit the layout'):
        _LAYOUT.flatten([np.zeros((3, 2)), np.zeros(4), np.float32(0)])
    with pytest.raises(ValueError, match='does not fit layout'):
        _LAYOUT.unflatten(np.zeros(12, np.float32))


@pytest.mark.parametrize('num_shards', [1, 2, 3, 4, 11])
def test_slices_cover_all_and_differ_by_at_most_one(num_shards):
    slices = _LAYOUT.slices(num_shards)
    covered = [index for part in slices for index in range(part.start, part.stop)]
    sizes = [part.stop - part.start for part in slices]
    assert covered == list(range(11))
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize('num_shards', [0, 12])
def test_more_shards_than_elements_are_refused(num_shards):
    with pytest.raises(ValueError, match='between 1 and 11'):
        _LAYOUT.slices(num_shards)


@pytest.mark.parametrize(
    'other',
    [
        Layout(('kernel', 'bias', 'scale'), ((3, 2), (4,), ())),
        Layout(('bias', 'kernel', 'scale'), ((4,), (2, 3), ())),
    ],
)
def test_shapes_and_their_order_change_the_fingerprint(other):
    assert other.fingerprint != _LAYOUT.fingerprint


def test_names_do_not_change_the_fingerprint():
    # The same Keras network is called otherwise when it is the second of its process.
    other = Layout(('dense_1/kernel', 'dense_1/bias', 'scale_1'), _LAYOUT.shapes)
    assert other.fingerprint == _LAYOUT.fingerprint


def test_json_gives_an_equal_layout_back():
    again = Layout(**_LAYOUT.to_json())
    assert again == _LAYOUT
    assert again.fingerprint == _LAYOUT.fingerprint


def test_layout_of_variables_uses_their_names_and_shapes():
    tf = pytest.importorskip('tensorflow')
    variables = [tf.Variable(tf.zeros([2, 3]), name='kernel'), tf.Variable(0.0, name='bias')]
    assert Layout.from_variables(variables) == Layout(('kernel:0', 'bias:0'), ((2, 3), ()))


def test_an_empty_layout_is_refused():
    with pytest.raises(ValueError, match='holds no element'):
        Layout((), ())
