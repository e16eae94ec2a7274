"""Gradients on the network: what each encoding keeps, and that error feedback brings the rest."""

import numpy as np
import pytest

from infra.parameter_server import config as config_lib
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
    assert tuple(WIRES) == config_lib.WIRES


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


def test_top_k_sends_the_largest_hundredth_exactly():
    values = normal(100_000)
    again = decoded(TopK(), values)
    sent = np.flatnonzero(again)
    np.testing.assert_array_equal(again[sent], values[sent])
    assert np.abs(values[sent]).min() > np.delete(np.abs(values), sent).max()
    assert 800 <= len(sent) <= 1200  # 1,000, by a sample of 16,667, of which 167 are above


def test_top_k_sends_no_more_than_its_bound():
    # 5,000 ones hide from the sample, which takes every sixth value: 4,000 of 100,000 are sent.
    values = np.zeros(100_000, np.float32)
    values[1:30_000:6] = 1
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

    def test_what_a_gradient_loses_arrives_with_later_ones(self, encoding):
        feedback, n, rounds = Feedback(encoding, 2000), 2000, 300
        gradient, arrived, out = normal(n), np.zeros(n, np.float32), np.empty(n, np.float32)
        for _ in range(rounds):
            encoding.decode(feedback.encode(gradient).view(np.uint8), out)
            arrived += out
        # Top-k sends a value once it has gathered to the size of the largest hundredth; a round
        # sends 20 to 80 of 2,000, so each waits some 50 rounds, or by its size longer.
        rest = np.abs(arrived - rounds * gradient)
        assert rest.max() <= 100 * np.abs(gradient).max()
        assert rest.mean() <= 0.2 * rounds * np.abs(gradient).mean()


def test_a_place_outside_the_parameters_is_refused():
    body = np.array([2000, 0], np.uint32).view(np.uint8)
    with pytest.raises(ValueError, match='place 2000 of 2000'):
        TopK().decode(body, np.empty(2000, np.float32))


@pytest.mark.parametrize('broken', [False, True], ids=['whole', 'broken'])
def test_a_gradient_is_encoded_once_even_if_its_message_is_repeated(broken):
    # Of 19 parameters top-k sends one a push: first the gradient of 18 at place 18, then what is
    # left of 17 at place 17. Encoded twice, the first would send place 17.
    with serve(config(num_parameter_shards=1)) as (server,):
        options = {'shared_memory': False, 'wire': 'top_k'}
        with connect([server.address], **options) as client, connect([server.address]) as exact:
            client.initialise(np.zeros(LAYOUT.size, np.float32))
            if broken:
                client.connections[0].channel.break_off()
            client.push(np.arange(19, dtype=np.float32), 0)
            expected = np.zeros(19)
            expected[18] = -18
            np.testing.assert_allclose(exact.pull().values, expected, atol=1e-4)
            client.push(np.zeros(19, np.float32), 1)
            expected[17] = -17
            np.testing.assert_allclose(exact.pull().values, expected, atol=1e-4)


def test_a_body_that_is_no_gradient_ends_the_stream_with_its_reason():
    with serve(config(num_parameter_shards=1)) as (server,):
        options = {'shared_memory': False, 'wire': 'top_k'}
        with connect([server.address], **options) as client:
            client.initialise(np.zeros(LAYOUT.size, np.float32))
            connection = client.connections[0]
            header = {
                'operation': 'push', 'sequence': 99, 'version': 0, 'agent_steps': 0,
                'seen_updates': 0, 'seen_agent_steps': 0,
            }  # fmt: skip
            connection.send(header, np.array([19, 0], np.uint32))
            reply, _ = connection.receive(None)
            assert reply['error'] == 'refused'
            assert 'place 19 of 19 values' in reply['message']
            np.testing.assert_array_equal(client.pull().values, 0)  # over a new stream
