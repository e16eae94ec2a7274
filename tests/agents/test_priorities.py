"""Priorities: from the actor's outputs, to the shard an item came from, into draws and weights."""

import contextlib
import threading
import time

import numpy as np
import pytest
import reverb

from agents.actor_priorities import InitialPriorities
from agents.config import LearnerConfig
from agents.exploration import Behaviour
from agents.heads import CategoricalHead, QuantileHead, ValueHead
from agents.learner import importance_exponent
from agents.munchausen import Munchausen
from infra.replay.adder import Adder
from infra.replay.config import EXPERIENCE_TABLE, ReplayConfig
from infra.replay.dataset import sample_dataset
from infra.replay.priorities import PRIORITY_FLOOR, PriorityWriter, importance_weights
from infra.replay.server import ShardConfig, build_tables, start_server, stop_server
from infra.replay.trajectory import FramePart, Steps, TrajectorySpec
from tests.support.replay_shard import ShardProcess
from tests.support.waiting import eventually

SPEC = TrajectorySpec(FramePart((4, 4)), frame_stack=2, n_step=1)
EXPONENT = 0.6
ITEMS = 12  # of each shard
ACTION = np.array([[0], [1]], np.int32)  # of one environment


def shard_config(num_shards, exponent=EXPONENT):
    replay = ReplayConfig(
        num_replay_shards=num_shards,
        replay_capacity=1000 * num_shards,
        min_replay_size=1,
        agent_steps_per_update=0.0,
        priority_exponent=exponent,
    )
    return ShardConfig(replay, SPEC, batch_size=6, telemetry=False)


@contextlib.contextmanager
def serve(num_shards, exponent=EXPONENT):
    """Addresses of replay shards in this process."""
    config = shard_config(num_shards, exponent)
    servers = [start_server(build_tables(config, shard)) for shard in range(num_shards)]
    try:
        yield [f'127.0.0.1:{server.port}' for server in servers]
    finally:
        for server in servers:
            stop_server(server)


def fill(address, first_action, errors=None):
    """Stores ITEMS transitions whose actions count up from `first_action`."""
    one = np.ones(1, np.float32)
    with Adder(address, SPEC, 1) as adder:
        for step in range(ITEMS + SPEC.n_step):
            error = None
            if errors is not None and step >= SPEC.n_step:
                error = np.array([errors[step - SPEC.n_step]])
            frame, action = np.zeros((1, 4, 4), np.uint8), np.array([first_action + step], np.int32)
            steps = Steps(frame, action, one, one, np.array([step == 0]))
            adder.add(steps, np.array([False]), error)
        assert adder.flush(10.0)


def drawn(dataset, batches, num_actions):
    """Of each action's transition: how often it was drawn, the probability told with it, and its
    share of the batches' importance weights of beta 1."""
    counts, weighted = np.zeros(num_actions), np.zeros(num_actions)
    told = np.full(num_actions, np.nan)
    for _ in range(batches):
        sample = next(dataset)
        action = sample.transition.action
        np.add.at(counts, action, 1)
        told[action] = sample.probability
        weights = importance_weights(sample.probability, sample.shard, 1.0)
        np.add.at(weighted, action, weights / weights.sum())
    return counts, told, weighted


class TestSharded:
    def test_draws_and_weights_follow_the_priorities_after_many_concurrent_changes(self):
        num_shards = 3
        rng = np.random.default_rng(0)
        wanted = rng.uniform(0.1, 3.0, size=(num_shards, ITEMS))
        with contextlib.ExitStack() as stack:
            addresses = stack.enter_context(serve(num_shards))
            for shard, address in enumerate(addresses):
                fill(address, 100 * shard)
            # 64 of three shards come in four pieces of 16: half a batch is from one of them.
            dataset = stack.enter_context(sample_dataset(addresses, SPEC, 64, 0.9))
            change_at_once(addresses, keys_by_action(dataset, num_shards * ITEMS), wanted)
            # What was fetched before the changes is thrown away.
            drawn(dataset, 20, 100 * num_shards)
            counts, told, weighted = drawn(dataset, 800, 100 * num_shards)
        # In a shard of n items: P(i) = p_i^0.6 / sum p^0.6.
        powers = (wanted + PRIORITY_FLOOR) ** EXPONENT
        for shard, expected in enumerate(powers / powers.sum(axis=1, keepdims=True)):
            items = slice(100 * shard, 100 * shard + ITEMS)
            np.testing.assert_allclose(told[items], expected, rtol=1e-6)
            draws = counts[items].sum()  # some 17,000
            deviation = np.sqrt(draws * expected * (1 - expected))
            assert (np.abs(counts[items] - draws * expected) < 5 * deviation).all()
        # With beta 1 the weights undo the whole bias: weighted by them, every item counts the same,
        # whichever shard it is in. The rarest was drawn some 300 times: five standard deviations.
        seen = weighted[weighted > 0]
        assert len(seen) == num_shards * ITEMS
        np.testing.assert_allclose(seen / seen.sum(), 1 / len(seen), rtol=0.3)

    def test_an_actors_errors_are_the_first_priorities(self):
        errors = np.linspace(0.5, 2.0, ITEMS)
        with serve(1, exponent=1.0) as addresses:
            fill(addresses[0], 0, errors)
            with sample_dataset(addresses, SPEC, 4, 0.9) as dataset:
                _, told, _ = drawn(dataset, 200, ITEMS + SPEC.n_step)
        priority = errors + PRIORITY_FLOOR
        np.testing.assert_allclose(told[:ITEMS], priority / priority.sum(), rtol=1e-6)

    def test_an_error_that_is_not_finite_loses_neither_item_nor_message(self):
        with contextlib.ExitStack() as stack:
            addresses = stack.enter_context(serve(1, exponent=1.0))
            fill(addresses[0], 0, [np.nan, np.inf] + [1.0] * (ITEMS - 2))
            dataset = stack.enter_context(sample_dataset(addresses, SPEC, 4, 0.9))
            key_of = keys_by_action(dataset, ITEMS)
            with PriorityWriter(addresses) as writer:
                keys = np.array([key_of[0], key_of[1]], np.uint64)
                writer.update(keys, np.zeros(2, np.int32), np.array([np.nan, 8.0]))
            drawn(dataset, 20, ITEMS + SPEC.n_step)
            _, told, _ = drawn(dataset, 200, ITEMS + SPEC.n_step)
        assert told[1] / told[0] == pytest.approx(8.0, rel=1e-4)


def keys_by_action(dataset, num_items):
    """(key, shard) of every item by its action, from draws."""
    keys = {}
    for _ in range(2000):
        sample = next(dataset)
        for action, key, shard in zip(sample.transition.action, sample.key, sample.shard):
            assert shard == action // 100  # nothing claims another shard's item
            keys[int(action)] = int(key)
        if len(keys) == num_items:
            return keys
    raise AssertionError(f'{len(keys)} of {num_items} items were drawn')


def change_at_once(addresses, key_of, wanted):
    """Four writers change every item many times, then one to `wanted` [shards, ITEMS]."""
    actions = sorted(key_of)
    keys = np.array([key_of[action] for action in actions], np.uint64)
    shards = np.array([action // 100 for action in actions], np.int32)
    last = np.array([wanted[action // 100, action % 100] for action in actions])
    rng = np.random.default_rng(1)
    noise = rng.uniform(0.1, 9.0, size=(4, 50, len(actions)))

    def change(values):
        with PriorityWriter(addresses) as writer:  # leaving it sends what is left
            for value in values:
                writer.update(keys, shards, value)
                time.sleep(0.005)

    threads = [threading.Thread(target=change, args=[values]) for values in noise]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    change([last])


class TestDeadShard:
    def test_it_holds_nobody_up_and_takes_changes_again_when_it_is_back(self, tmp_path):
        unknown, shard = np.array([7], np.uint64), np.array([0], np.int32)
        with ShardProcess(shard_config(1, exponent=1.0), tmp_path).wait() as process:
            with PriorityWriter([process.address]) as writer:
                writer.update(unknown, shard, np.array([1.0]))  # ignored there, and no failure
                process.kill()
                start = time.monotonic()
                for _ in range(100):
                    writer.update(unknown, shard, np.array([1.0]))
                assert time.monotonic() - start < 1.0
                process.restart().wait()
                fill(process.address, 0)
                with sample_dataset([process.address], SPEC, 4, 0.9) as dataset:
                    key = np.array([keys_by_action(dataset, ITEMS)[0]], np.uint64)

                    def is_drawn_most():
                        # Sent again and again: the first may still be lost to the old connection.
                        writer.update(key, shard, np.array([1e6]))
                        return drawn(dataset, 1, ITEMS + SPEC.n_step)[1][0] > 0.9

                    assert eventually(is_drawn_most, 60.0)

    def test_hanging_ones_delay_the_close_by_two_seconds_together(self, tmp_path):
        with contextlib.ExitStack() as stack:
            processes = [
                stack.enter_context(ShardProcess(shard_config(2), tmp_path, shard))
                for shard in range(2)
            ]
            writer = PriorityWriter([process.wait().address for process in processes])
            for process in processes:
                process.pause()
            keys = np.array([7, 7], np.uint64)
            writer.update(keys, np.arange(2, dtype=np.int32), np.ones(2))
            start = time.monotonic()
            writer.close()
            assert time.monotonic() - start < 3.5  # one after the other: 4
            for process in processes:
                process.resume()


def test_memory_for_changes_is_bounded(monkeypatch):
    monkeypatch.setattr('infra.replay.priorities._MAX_PENDING', 100)
    monkeypatch.setattr('infra.replay.priorities._FLUSH_SECONDS', 60.0)
    with serve(1) as addresses:
        with PriorityWriter(addresses) as writer:
            keys = np.arange(250, dtype=np.uint64)
            writer.update(keys, np.zeros(250, np.int32), np.ones(250))
            assert len(writer._shards[0]._pending) == 100
            assert writer.dropped == 150


def test_uniform_replay_has_a_uniform_sampler():
    with serve(1, exponent=0.0) as addresses:
        table = reverb.Client(addresses[0]).server_info()[EXPERIENCE_TABLE]
        assert table.sampler_options.uniform


class TestImportanceWeights:
    def test_they_are_the_powers_over_the_largest(self):
        # One shard: (1/P)^0.5 of 0.5, 0.25, 0.01 is 1.41, 2, 10; over the largest.
        weights = importance_weights(np.array([0.5, 0.25, 0.01]), np.zeros(3, int), 0.5)
        np.testing.assert_allclose(weights, [0.14142136, 0.2, 1.0], rtol=1e-6)
        assert weights.dtype == np.float32

    def test_a_shard_that_gave_less_counts_more(self):
        # P: 3/4 * 0.1 three times, 1/4 * 0.1: weights 1/3 and 1.
        weights = importance_weights(np.full(4, 0.1), np.array([0, 0, 1, 0]), 1.0)
        np.testing.assert_allclose(weights, [1 / 3, 1 / 3, 1, 1 / 3], rtol=1e-6)

    def test_beta_rises_linearly_with_the_global_updates(self):
        config = LearnerConfig(
            importance_exponent_start=0.4, importance_exponent_end=1.0, importance_updates=100
        )
        betas = [importance_exponent(config, updates) for updates in (0, 50, 100, 1000)]
        np.testing.assert_allclose(betas, [0.4, 0.7, 1.0, 1.0])


class TestInitialPriorities:
    def test_an_error_is_that_of_the_n_step_transition(self):
        # Two steps, gamma 0.5: |1 + 0.5 * 2 + 0.25 * max q - q(action)|.
        priorities = InitialPriorities(ValueHead(), n_step=2, gamma=0.5)
        first = np.array([[3.0, 7.0]], np.float32)
        assert priorities.completed(first, ACTION[1]) is None
        one = np.ones(1, np.float32)
        priorities.began(first, ACTION[0], one, one)
        assert priorities.completed(first, ACTION[1]) is None
        priorities.began(first, ACTION[1], 2 * one, one)
        now = np.array([[4.0, 8.0]], np.float32)
        error = priorities.completed(now, ACTION[1])
        np.testing.assert_allclose(np.asarray(error), [abs(1 + 0.5 * 2 + 0.25 * 8 - 3)])
        priorities.began(now, ACTION[0], one, one)
        # The next one: 2 + 0.5 * 1 + 0.25 * 8 - 7.
        np.testing.assert_allclose(np.asarray(priorities.completed(now, ACTION[1])), [2.5])

    def test_nothing_behind_an_end_counts(self):
        priorities = InitialPriorities(ValueHead(), n_step=2, gamma=0.5)
        outputs = np.array([[3.0, 7.0]], np.float32)
        one = np.ones(1, np.float32)
        priorities.began(outputs, ACTION[0], one, 0 * one)  # the end
        priorities.began(outputs, ACTION[0], 5 * one, one)
        np.testing.assert_allclose(
            np.asarray(priorities.completed(outputs, ACTION[1])), [abs(1 - 3)]
        )

    def test_an_error_of_quantiles_is_that_of_their_means(self):
        # |1 + 0.5 * (1 + 5) / 2 - (0 + 2) / 2|; of IQN actors see the quantiles at midpoints.
        priorities = InitialPriorities(QuantileHead(2, num_drawn=3), 1, 0.5)
        outputs, one = np.array([[[0, 2], [1, 5]]], np.float32), np.ones(1, np.float32)
        priorities.began(outputs, ACTION[0], one, one)
        error = priorities.completed(outputs, ACTION[1])
        np.testing.assert_allclose(np.asarray(error), [1.5], rtol=1e-6)

    def test_munchausen_raises_the_first_reward_and_bootstraps_softly(self):
        # Temperature 2, q = (0, 2 ln 3): pi = (1/4, 3/4), so for action 0 the bonus is
        # 0.5 * 2 ln(1/4) = -ln 4, within the bound of 0.5 * -3; the soft value is
        # 2 ln(e^0 + e^(ln 3)) = 2 ln 4. The error is |1 - ln 4 + 0.5 * 10 + 0.25 * 2 ln 4 - 0|.
        munchausen = Munchausen(temperature=2.0, scale=0.5, lowest=-3.0)
        priorities = InitialPriorities(ValueHead(), 2, 0.5, munchausen)
        outputs, one = np.array([[0.0, 2 * np.log(3)]], np.float32), np.ones(1, np.float32)
        priorities.began(outputs, ACTION[0], one, one)
        priorities.began(outputs, ACTION[1], 10 * one, one)
        error = priorities.completed(outputs, ACTION[1])
        np.testing.assert_allclose(np.asarray(error), [6 - np.log(4) / 2], rtol=1e-6)

    def test_a_distributions_error_is_its_own(self):
        head = CategoricalHead(num_atoms=3, v_min=-1.0, v_max=1.0)
        priorities = InitialPriorities(head, n_step=1, gamma=1.0)
        outputs = np.zeros((1, 2, 3), np.float32)
        one = np.ones(1, np.float32)
        priorities.began(outputs, ACTION[0], 0 * one, one)
        # The next distribution is the same, uniform one: no divergence.
        np.testing.assert_allclose(
            np.asarray(priorities.completed(outputs, ACTION[1])), [0.0], atol=1e-6
        )


class FixedPolicy:
    """Outputs that a test chooses."""

    def __init__(self):
        self.outputs = np.array([[1.0, 2.0], [4.0, 3.0]], np.float32)

    def act(self, observation):
        raise AssertionError('the outputs are needed')

    def evaluate(self, observation):
        return self.outputs.argmax(axis=1).astype(np.int32), self.outputs

    def set_parameters(self, *parts):
        pass


def test_behaviour_gives_the_error_of_what_it_did_n_steps_ago():
    policy = FixedPolicy()
    never = lambda updates: np.zeros(2)  # noqa: E731
    behaviour = Behaviour(policy, never, 2, InitialPriorities(ValueHead(), 1, 0.5))
    rng, frames = np.random.default_rng(0), np.zeros((2, 84, 84, 4), np.uint8)
    action, error = behaviour.act(frames, 0, rng)
    np.testing.assert_array_equal(action, [1, 0])
    assert error is None
    behaviour.rewarded(np.array([1.0, 0.0], np.float32), np.ones(2, np.float32))
    policy.outputs = np.array([[0.0, 6.0], [2.0, 8.0]], np.float32)
    _, error = behaviour.act(frames, 0, rng)
    # |1 + 0.5 * 6 - 2| and |0 + 0.5 * 8 - 4|
    np.testing.assert_allclose(np.asarray(error), [2.0, 0.0])
