"""Gradients on the network: what each encoding keeps, and that error feedback brings the rest."""

import contextlib

import numpy as np
import pytest

from infra.parameter_server import config as config_lib
from infra.parameter_server.connection import StreamBroken
from infra.parameter_server.layout import Layout
from infra.parameter_server.protocol import INVALID, STALE
from infra.parameter_server.wire import WIRES, BFloat16, Feedback, Int8, TopK
from tests.support.parameter_servers import LAYOUT, config, connect, serve

_ENCODINGS = [wire.gradients for wire in WIRES.values()]


def decoded(encoding, values):
    out = np.full(len(values), np.nan, np.float32)
    encoding.decode(encoding.encode(values).view(np.uint8), out)
    return out


def normal(n, seed=0):
    return np.random.default_rng(seed).normal(size=n).astype(np.float32)


def test_the_flag_names_the_wires_that_there_are():
    assert tuple(WIRES) == config_lib.WIRE_NAMES


def test_bfloat16_rounds_to_nearest_even():
    # bfloat16 has 8 significant bits: from 256 on it holds even numbers only, ties go to even.
    values = np.array([1.0, 255.0, 257.0, 258.0, 259.0, -257.0, 1e-3], np.float32)
    again = decoded(BFloat16(), values)
    np.testing.assert_array_equal(again[:6], [1, 255, 256, 258, 260, -256])
    assert abs(again[6] - 1e-3) < 1e-3 / 256


def test_int8_keeps_each_value_within_half_a_step_of_its_block():
    values = np.concatenate([normal(1024), 1000 * normal(1024), np.zeros(1024), normal(5)])
    values = values.astype(np.float32)
    errors = np.abs(decoded(Int8(), values) - values)
    for first, last in ((0, 1024), (1024, 2048), (2048, 3072), (3072, 3077)):
        half_step = np.abs(values[first:last]).max() / 127 / 2
        assert errors[first:last].max() <= 1.001 * half_step
    # 3,077 bytes of codes, and 4 of a scale for each of 4 blocks
    assert Int8().encode(values).nbytes == 3077 + 4 * 4


def test_int8_of_the_smallest_and_the_largest_numbers_is_finite():
    # 1e-37 has a scale whose inverse is above the largest float32, 1e-40 is subnormal.
    values = np.repeat(np.array([0, 1e-37, 1e-40, 1e-35, 1e15], np.float32), 1024)
    with np.errstate(all='raise', under='ignore'):
        again = decoded(Int8(), values)
    np.testing.assert_array_equal(again[: 3 * 1024], 0)
    np.testing.assert_allclose(again[3 * 1024 :], values[3 * 1024 :], rtol=1e-5)


def test_top_k_sends_the_largest_hundredth_exactly():
    values = normal(100_000)
    again = decoded(TopK(), values)
    sent = np.flatnonzero(again)
    np.testing.assert_array_equal(again[sent], values[sent])
    assert np.abs(values[sent]).min() > np.delete(np.abs(values), sent).max()
    assert 800 <= len(sent) <= 1200  # 1,000, by a sample of 14,286, of which 143 are above


def test_top_k_sends_no_more_than_its_bound():
    # 5,000 ones hide from the sample, which takes every seventh value: 4,000 of 100,000 are sent.
    values = np.zeros(100_000, np.float32)
    values[1:35_000:7] = 1
    body = TopK().encode(values)
    assert body.nbytes == TopK().most_bytes(100_000) == 8 * 4000


@pytest.mark.parametrize('encoding', _ENCODINGS, ids=lambda each: type(each).__name__)
class TestEveryEncoding:
    def test_zeros_stay_zeros(self, encoding):
        np.testing.assert_array_equal(decoded(encoding, np.zeros(2000, np.float32)), 0)

    def test_a_body_is_no_longer_than_it_may_be(self, encoding):
        for n in (1, 2, 1023, 1025, 50_000):
            values = normal(n)
            assert encoding.encode(values).nbytes <= encoding.most_bytes(n)
            assert np.isfinite(decoded(encoding, values)).all()

    def test_bytes_of_another_length_are_refused(self, encoding):
        for size in (3, encoding.most_bytes(2000) + 8):
            with pytest.raises(ValueError, match=f'{size} bytes'):
                encoding.decode(np.zeros(size, np.uint8), np.empty(2000, np.float32))


@pytest.mark.parametrize('wire', WIRES)
def test_what_a_gradient_loses_arrives_with_later_ones(wire):
    feedback, n, rounds = Feedback(WIRES[wire].gradients, 2000), 2000, 300
    gradient, arrived = normal(n), np.zeros(n)
    for _ in range(rounds):
        feedback.encode(gradient)
        feedback.accepted()
        arrived += feedback.arrived
    rest = np.abs(arrived - rounds * gradient).max()
    largest = np.abs(gradient).max()
    # Of rounding to 8 bits only the last error is left, half a step at most, where each of 300
    # errors would be lost without feedback. Top-k sends 20 to 80 of 2,000 values a push, which
    # adds 1,600 in sum (their mean size is 0.8): those that go are of some 1,600 / 20 = 80.
    bounds = {'float32': 1e-3, 'bfloat16': largest / 128, 'int8': largest / 127, 'top_k': 160}
    assert rest <= bounds[wire]


def test_a_place_outside_the_parameters_is_refused():
    body = np.array([2000, 0], np.uint32).view(np.uint8)
    with pytest.raises(ValueError, match='place 2000 of 2000'):
        TopK().decode(body, np.empty(2000, np.float32))


@contextlib.contextmanager
def lossy_and_exact(wire='top_k', shards=1, layout=LAYOUT):
    """Clients of the same shards: one with an encoding, one that sees the parameters exactly."""
    with serve(config(num_parameter_shards=shards)) as servers:
        addresses = [server.address for server in servers]
        options = {'shared_memory': False, 'wire': wire}
        with connect(addresses, layout, **options) as lossy, connect(addresses, layout) as exact:
            lossy.initialise(np.zeros(layout.size, np.float32))
            yield lossy, exact


def moved(client):
    return -client.pull().values


def lose_the_next_reply(connection, shared=False):
    """The shard answers; the client's stream breaks first, and the next one may share memory."""
    receive = connection.receive

    def lost(tensor):
        receive(tensor)
        connection.drop()
        connection.receive = receive
        connection._wants_segment = shared
        raise StreamBroken('the reply was lost')

    connection.receive = lost


def break_now(connection, shared=False):
    """The shard gets nothing over the open stream; the next one may share memory."""
    connection.channel.break_off()
    connection._wants_segment = shared


@pytest.mark.parametrize('shared', [False, True], ids=['network', 'then_shared_memory'])
@pytest.mark.parametrize('fault', [break_now, lose_the_next_reply])
def test_a_repeated_message_says_the_same(fault, shared):
    # Of 19 parameters top-k sends one a push: of this gradient 18 at place 18. Encoded twice, the
    # repetition would send 17 at place 17; in shared memory as it is, all of it.
    gradient, expected = np.arange(19, dtype=np.float32), np.zeros(19)
    expected[18] = 18
    with lossy_and_exact() as (lossy, exact):
        fault(lossy.connections[0], shared)
        assert lossy.push(gradient, 0).rejected is None
        np.testing.assert_allclose(moved(exact), expected, atol=1e-4)


@pytest.mark.parametrize('fault', [None, break_now, lose_the_next_reply])
def test_what_is_due_arrives_once(fault):
    expected = np.zeros(19)
    expected[[17, 18]] = 17, 18
    with lossy_and_exact() as (lossy, exact):
        if fault:
            fault(lossy.connections[0])
        lossy.push(np.arange(19, dtype=np.float32), 0)
        lossy.push(np.zeros(19, np.float32), 1)
        np.testing.assert_allclose(moved(exact), expected, atol=1e-4)


def test_nothing_of_a_rejected_gradient_arrives_and_what_was_due_still_does():
    expected = np.zeros(19)
    expected[[17, 18]] = 17, 18
    with lossy_and_exact() as (lossy, exact):
        lossy.push(np.arange(19, dtype=np.float32), 0)
        for version in range(1, 5):
            exact.push(np.zeros(19, np.float32), version)
        late = lossy.push(np.full(19, 100, np.float32), 1)  # 4 updates old; 3 are allowed
        assert late.rejected == STALE
        lossy.push(np.zeros(19, np.float32), late.snapshot.version)
        np.testing.assert_allclose(moved(exact), expected, atol=1e-4)


@pytest.mark.parametrize('wire', WIRES)
def test_a_gradient_that_is_zero_at_one_shard_is_applied_by_all(wire):
    gradient = np.zeros(19, np.float32)
    gradient[0] = 3
    with lossy_and_exact(wire, shards=2) as (lossy, exact):
        assert lossy.push(gradient, 0).rejected is None
        assert lossy.push(gradient[::-1].copy(), 1).rejected is None
        np.testing.assert_allclose(moved(exact), gradient + gradient[::-1], atol=1e-4)


def test_blocks_end_where_a_shards_slice_does():
    layout = Layout(('kernel',), ((2051,),))  # 1,026 and 1,025 values: a block and a rest each
    gradient = normal(2051)
    with lossy_and_exact('int8', shards=2, layout=layout) as (lossy, exact):
        lossy.push(gradient, 0)
        np.testing.assert_allclose(moved(exact), gradient, atol=np.abs(gradient).max() / 127)


def sent(client, operation, body):
    """The reply to a message that the client itself would not send."""
    header = {
        'operation': operation, 'sequence': 99, 'version': 0, 'agent_steps': 0,
        'seen_updates': 0, 'seen_agent_steps': 0,
    }  # fmt: skip
    client.connections[0].send(header, body)
    return client.connections[0].receive(None)[0]


@pytest.mark.parametrize(
    ('wire', 'operation', 'body', 'reason'),
    [
        ('top_k', 'push', np.array([19, 0], np.uint32), 'place 19 of 19 values'),
        ('top_k', 'push', np.zeros(3, np.uint32), 'a body of 12 bytes; 8 are allowed'),
        ('int8', 'push', np.zeros(22, np.uint8), 'a body of 22 bytes instead of 23'),
        ('top_k', 'initialise', np.zeros(20, np.float32), 'a body of 80 bytes; 76 are allowed'),
        ('top_k', 'initialise', np.zeros(2, np.float32), 'a body of 8 bytes instead of 76'),
    ],
)
def test_a_body_that_does_not_fit_ends_its_stream_with_the_reason(wire, operation, body, reason):
    with lossy_and_exact(wire) as (lossy, _):
        reply = sent(lossy, operation, body)
        assert reply['error'] == 'refused'
        assert reason in reply['message']
        np.testing.assert_array_equal(lossy.pull().values, 0)  # over a new stream


def test_a_gradient_that_is_not_finite_once_decoded_is_invalid():
    body = np.zeros(23, np.uint8)
    body[:4].view(np.float32)[0] = np.nan  # the scale of the only block
    with lossy_and_exact('int8') as (lossy, exact):
        assert sent(lossy, 'push', body)['rejected'] == INVALID
        assert exact.push(np.ones(19, np.float32), 0).rejected is None
