"""The sharded replay behind TF-Agents' own interfaces: drivers write, learners read."""

import collections
import contextlib
import threading
from typing import Any

import numpy as np
import pytest
import reverb
import tensorflow as tf
from tf_agents.drivers import dynamic_step_driver, py_driver
from tf_agents.environments import tf_py_environment
from tf_agents.policies import random_py_policy, random_tf_policy
from tf_agents.replay_buffers import reverb_replay_buffer, reverb_utils
from tf_agents.specs import tensor_spec
from tf_agents.trajectories import time_step as ts
from tf_agents.utils import common, nest_utils

from agents import py_environment
from agents.adapters.replay import (
    ReplayObserver,
    SampleInfo,
    ShardedReplayBuffer,
    UnbatchingObserver,
)
from agents.config import EnvironmentConfig
from infra.replay.config import ReplayConfig
from infra.replay.errors import ReplaySpecMismatch
from infra.replay.server import ShardConfig, build_tables, start_server, stop_server
from infra.replay.trajectory import FramePart, TrajectorySpec
from tests.support import dqn_agents, tf_environments
from tests.support.waiting import eventually

ENVS, N_STEP, GAMMA = 3, 2, 0.9
SPEC = TrajectorySpec(n_step=N_STEP)
# Cut after 60 agent steps: ends of games, losses of lives and cuts all come.
GAME = EnvironmentConfig('breakout', max_episode_frames=240)


@pytest.fixture
def addresses():
    """Two prioritized replay shards in this process."""
    replay = ReplayConfig(
        num_replay_shards=2,
        replay_capacity=20_000,
        min_replay_size=1,
        agent_steps_per_update=0.0,
        priority_exponent=1.0,
    )
    with contextlib.ExitStack() as stack:
        found = []
        for shard in range(2):
            server = start_server(build_tables(ShardConfig(replay, SPEC, telemetry=False), shard))
            stack.callback(stop_server, server)
            found.append(f'127.0.0.1:{server.port}')
        yield found


def drive(observers, steps):
    """Random play of ENVS games by TF-Agents' driver."""
    with py_environment.AtariPyEnvironment(GAME, ENVS, seed=1) as game:
        policy = random_py_policy.RandomPyPolicy(
            game.time_step_spec(), game.action_spec(), seed=0, outer_dims=(ENVS,)
        )
        driver = py_driver.PyDriver(game, policy, observers, max_steps=steps)
        driver.run(game.reset())


def streams(trajectories):
    """The rows of each environment."""
    return list(zip(*map(nest_utils.unstack_nested_arrays, trajectories)))


def expected_transitions(streams):
    """By (observation, action): all (reward, discount, next observation), from a plain loop.

    A game that waits for its ball looks the same again and again, hence the lists.
    """
    expected = collections.defaultdict(list)
    for rows in streams:
        # Between two episodes nothing is decided; the last n decisions wait for what follows.
        decisions = [i for i, row in enumerate(rows) if row.step_type != ts.StepType.LAST]
        for start in decisions[:-N_STEP]:
            reward, discount, ended = 0.0, 1.0, False
            for row in rows[start : start + N_STEP]:
                reward += discount * np.clip(row.reward, -1, 1)
                discount *= GAMMA * row.discount
                ended = row.next_step_type == ts.StepType.LAST
                if ended:
                    break
            if ended and discount > 0:
                continue  # cut: what would have come next is not known
            key = (rows[start].observation.tobytes(), int(rows[start].action))
            following = rows[start + N_STEP].observation if discount > 0 else None
            expected[key].append((reward, discount, following))
    return expected


def is_one_of(expected, reward, discount, following):
    """Whether a transition is one of those expected of its observation and action."""
    return any(
        reward == pytest.approx(one_reward, abs=1e-6)
        and discount == pytest.approx(one_discount, abs=1e-6)
        and (one_discount == 0 or np.array_equal(following, one_following))
        for one_reward, one_discount, one_following in expected
    )


def test_what_a_driver_observes_comes_back_as_the_n_step_transitions_of_a_plain_loop(addresses):
    trajectories: list[Any] = []
    with ReplayObserver(addresses, SPEC, ENVS) as observer:
        drive([trajectories.append, observer], steps=900)
        assert observer.flush(10.0)
    expected = expected_transitions(streams(trajectories))
    assert any(discount == 0 for each in expected.values() for _, discount, _ in each)
    assert len(drawn(addresses, expected, batches=150)) > 0.9 * len(expected)  # of some 850


def drawn(addresses, expected, batches):
    """The keys of 32 transitions a batch; each is one of those expected, and no more are stored."""
    seen = set()
    with ShardedReplayBuffer(addresses, SPEC, GAMMA) as buffer:
        assert buffer.num_frames() == sum(map(len, expected.values()))
        for experience, info in buffer.as_dataset(sample_batch_size=32).take(batches):
            assert set(info.shard.numpy()) <= {0, 1}
            for row in range(32):
                key = (
                    experience.time_step.observation[row].numpy().tobytes(),
                    int(experience.action_step.action[row]),
                )
                step = experience.next_time_step
                # In TF-Agents' form: the agent multiplies by gamma once more.
                discount = GAMMA * float(step.discount[row])
                following = step.observation[row].numpy()
                assert is_one_of(expected[key], float(step.reward[row]), discount, following)
                seen.add(key)
    return seen


def test_a_driver_in_a_graph_is_observed(addresses):
    recorded: list[list] = []

    def record():
        recorded.append([])
        return recorded[-1].append

    with ReplayObserver(addresses, SPEC, ENVS) as observer:
        games = tf_py_environment.TFPyEnvironment(
            py_environment.AtariPyEnvironment(GAME, ENVS, seed=1)
        )
        policy = random_tf_policy.RandomTFPolicy(games.time_step_spec(), games.action_spec())
        observers = [UnbatchingObserver(record, ENVS), observer]
        driver = dynamic_step_driver.DynamicStepDriver(games, policy, observers, num_steps=90)
        common.function(driver.run)()
        games.close()
        assert observer.flush(10.0)
    # A step of the driver is one of all games, but for those between two episodes.
    assert 30 <= len(recorded[0]) < 40
    assert drawn(addresses, expected_transitions(recorded), batches=5)


def test_a_single_environment_is_observed_from_mid_episode_and_a_reset_begins_a_new_sequence(
    addresses,
):
    rows: list[Any] = []
    game = py_environment.SingleAtariPyEnvironment(EnvironmentConfig('freeway'), seed=1)
    policy = random_py_policy.RandomPyPolicy(game.time_step_spec(), game.action_spec(), seed=0)
    with game, ReplayObserver(addresses, SPEC, 1) as observer:
        step, state = py_driver.PyDriver(game, policy, [], max_steps=5).run(game.reset())
        observers = [UnbatchingObserver(lambda: rows.append, 1), observer]
        for _ in range(2):
            driver = py_driver.PyDriver(game, policy, observers, max_steps=10)
            step, state = driver.run(step, state)
            observer.reset()
        assert observer.flush(10.0)
    assert all(row.step_type == ts.StepType.MID for row in rows)
    expected = expected_transitions([rows[:10], rows[10:]])
    assert len(expected) == 16  # the last two of either sequence have no step n = 2 later
    assert len(drawn(addresses, expected, batches=10)) == 16


def test_an_agent_trains_on_the_dataset_as_on_our_own_transitions(addresses):
    with ReplayObserver(addresses, SPEC, ENVS) as observer:
        drive([observer], steps=300)
        assert observer.flush(10.0)
    gradient = dqn_agents.gradient(discount=GAMMA, n_step=N_STEP)
    with ShardedReplayBuffer(addresses, SPEC, GAMMA) as buffer:
        experience, _ = next(iter(buffer.as_dataset(sample_batch_size=16)))
    action = tf.minimum(experience.action_step.action, dqn_agents.NUM_ACTIONS - 1)
    experience = experience._replace(action_step=experience.action_step._replace(action=action))
    ours = dqn_agents.Transition(
        experience.time_step.observation.numpy(),
        action.numpy(),
        experience.next_time_step.reward.numpy(),
        experience.next_time_step.discount.numpy() * np.float32(GAMMA),
        experience.next_time_step.observation.numpy(),
    )
    _, loss, *_ = gradient.gradient(ours)
    trained = dqn_agents.agent_of(gradient).train(experience)
    np.testing.assert_allclose(trained.loss, loss, rtol=1e-5)


def test_priorities_go_back_to_the_shards(addresses):
    with ReplayObserver(addresses, SPEC, ENVS) as observer:
        drive([observer], steps=150)
        assert observer.flush(10.0)
    key = shard = None
    with ShardedReplayBuffer(addresses, SPEC, GAMMA) as buffer:
        for _, info in buffer.as_dataset(sample_batch_size=16).take(30):
            if key is None:
                key, shard = info.key[0].numpy(), info.shard[0].numpy()
            buffer.update_priorities(info, np.where(info.key.numpy() == key, 1e6, 1e-3))
    with ShardedReplayBuffer(addresses, SPEC, GAMMA) as buffer:
        drawn: list[int] = []  # of the item's shard; which shard has its turn when is open
        for _, info in buffer.as_dataset(sample_batch_size=16).take(1000):
            drawn += info.key.numpy()[info.shard.numpy() == shard].tolist()
            if len(drawn) >= 100:
                break
    assert len(drawn) >= 100
    assert np.mean(np.array(drawn) == key) > 0.9


def test_a_driver_that_resets_in_mid_episode_cuts_it_there(addresses):
    with ReplayObserver(addresses, SPEC, 1) as observer:
        with py_environment.AtariPyEnvironment(EnvironmentConfig('freeway'), 1, seed=1) as game:
            policy = random_py_policy.RandomPyPolicy(
                game.time_step_spec(), game.action_spec(), seed=0, outer_dims=(1,)
            )
            for _ in range(2):
                driver = py_driver.PyDriver(game, policy, [observer], max_steps=10)
                driver.run(game.reset())
        assert observer.flush(10.0)
    # 20 steps; the last two of either run have no step n = 2 later in their own game.
    with ShardedReplayBuffer(addresses, SPEC, GAMMA) as buffer:
        assert buffer.num_frames() == 16


def test_leaving_the_buffer_ends_the_threads_of_its_datasets(addresses):
    with ReplayObserver(addresses, SPEC, ENVS) as observer:
        drive([observer], steps=150)
        assert observer.flush(10.0)
    before = set(threading.enumerate())
    with ShardedReplayBuffer(addresses, SPEC, GAMMA) as buffer:
        iterator = iter(buffer.as_dataset(sample_batch_size=4))
        next(iterator)
        assert readers(before)
    assert eventually(lambda: not readers(before))
    with pytest.raises(RuntimeError, match='after close'):
        buffer.update_priorities(next_info(), np.ones(1))


def test_another_spec_than_the_shards_is_refused_by_writer_and_reader(addresses):
    other = TrajectorySpec(n_step=N_STEP + 1)
    with ReplayObserver(addresses, other, ENVS) as observer:
        with pytest.raises(ReplaySpecMismatch, match='windows of 6 rows'):
            drive([observer], steps=3)
    with ShardedReplayBuffer(addresses, other, GAMMA) as buffer:
        with pytest.raises(tf.errors.OpError, match='windows of 6 rows'):
            next(iter(buffer.as_dataset(sample_batch_size=4)))


@pytest.mark.parametrize('given', [[], '127.0.0.1:1', ['localhost']])
def test_what_is_no_list_of_addresses_is_refused(given):
    for make in (
        lambda: ReplayObserver(given, SPEC, 1),
        lambda: ShardedReplayBuffer(given, SPEC, GAMMA),
    ):
        with pytest.raises(ValueError, match='host:port'):
            make()


def test_an_observation_of_another_depth_is_refused(addresses):
    trajectories: list[Any] = []
    drive([trajectories.append], steps=3)
    with ReplayObserver(addresses, SPEC, ENVS) as observer:
        shallow = trajectories[0]._replace(observation=trajectories[0].observation[..., 1:])
        with pytest.raises(ValueError, match='the spec has'):
            observer(shallow)


def test_structures_of_observations_pass_through_observer_and_buffer():
    spec = TrajectorySpec(
        (FramePart((3,), 'float64'), {'picture': FramePart((10, 10, 1))}), frame_stack=1, n_step=1
    )
    replay = ReplayConfig(min_replay_size=1, agent_steps_per_update=0.0)
    server = start_server(build_tables(ShardConfig(replay, spec, telemetry=False), 0))
    addresses, game = [f'127.0.0.1:{server.port}'], tf_environments.PyStructured(7)
    policy = random_py_policy.RandomPyPolicy(game.time_step_spec(), game.action_spec(), seed=0)
    with ReplayObserver(addresses, spec, 1, clip_reward=False) as observer:
        py_driver.PyDriver(game, policy, [observer], max_steps=40).run(game.reset())
        assert observer.flush(10.0)
    with ShardedReplayBuffer(addresses, spec, GAMMA) as buffer:
        transition, _ = next(iter(buffer.as_dataset(sample_batch_size=64)))
    stop_server(server)
    for step in (transition.time_step, transition.next_time_step):
        numbers, others = step.observation
        assert (numbers.dtype, others['picture'].dtype) == (tf.float64, tf.uint8)
        # The picture is full of the number of the step.
        expected = np.broadcast_to(numbers[:, 2, None, None, None], (64, 10, 10, 1))
        np.testing.assert_array_equal(others['picture'], expected)
    # One step is between the two, unless the episode ended.
    goes_on = transition.next_time_step.discount.numpy() > 0
    gone = transition.next_time_step.observation[0] - transition.time_step.observation[0]
    assert goes_on.any()
    assert (gone.numpy()[goes_on] == [0, 0, 1]).all()
    other = tf_environments.PyCounter(0)
    with ReplayObserver(addresses, spec, 1) as observer:
        with pytest.raises(ValueError, match='the spec has 0/'):
            py_driver.PyDriver(other, policy, [observer], max_steps=1).run(other.reset())


def readers(before):
    """Threads that read from shards, but for those of `before`."""
    return [t for t in set(threading.enumerate()) - before if t.name.startswith('replay_')]


def next_info():
    """What a dataset tells of one transition."""
    return SampleInfo(np.zeros(1, np.uint64), np.ones(1), np.ones(1, int), np.zeros(1, int))


def test_what_the_buffer_cannot_do_says_what_to_do_instead(addresses):
    buffer = ShardedReplayBuffer(addresses, SPEC, GAMMA)
    for call, remedy in (
        (lambda: buffer.add_batch(()), 'ReplayObserver'),
        (buffer.clear, 'starting it anew'),
        (buffer.gather_all, 'as_dataset'),
        (buffer.as_dataset, 'sample_batch_size'),
    ):
        with pytest.raises(NotImplementedError, match=remedy):
            call()


def test_a_stock_observer_serves_a_batched_environment():
    sequence = 2
    with py_environment.AtariPyEnvironment(GAME, ENVS, seed=1) as game:
        policy = random_py_policy.RandomPyPolicy(
            game.time_step_spec(), game.action_spec(), outer_dims=(ENVS,)
        )
        spec = tensor_spec.from_spec(policy.trajectory_spec)
        spec = spec._replace(observation=tensor_spec.from_spec(game.observation_spec()))
        table = reverb.Table(
            'stock',
            reverb.selectors.Uniform(),
            reverb.selectors.Fifo(),
            10_000,
            reverb.rate_limiters.MinSize(1),
            signature=tensor_spec.add_outer_dim(spec),
        )
        server = reverb.Server([table])
        client = reverb.Client(f'localhost:{server.port}')
        trajectories: list[Any] = []
        observer = UnbatchingObserver(
            lambda: reverb_utils.ReverbAddTrajectoryObserver(client, 'stock', sequence), ENVS
        )
        driver = py_driver.PyDriver(game, policy, [trajectories.append, observer], max_steps=150)
        step, state = driver.run(game.reset())
        observer.reset(write_cached_steps=False)
        half = len(trajectories)
        driver.run(step, state)
        observer.flush()
        observer.close()
    # Each environment's steps make windows of two, but for those behind the end of an episode and
    # those before the reset and the end.
    stored = client.server_info()['stock'].current_size
    begun = trajectories[: half - 1] + trajectories[half:-1]
    assert stored == sum((batch.step_type != ts.StepType.LAST).sum() for batch in begun)
    buffer = reverb_replay_buffer.ReverbReplayBuffer(
        spec, 'stock', sequence, f'localhost:{server.port}'
    )
    pairs = neighbours(trajectories)
    for experience, _ in buffer.as_dataset(sample_batch_size=8, num_steps=2).take(5):
        for row in experience.observation.numpy():
            assert (row[0].tobytes(), row[1].tobytes()) in pairs
    server.stop()


def neighbours(trajectories):
    """All (observation, next observation), as bytes."""
    return {
        (one.observation[e].tobytes(), two.observation[e].tobytes())
        for one, two in zip(trajectories, trajectories[1:])
        for e in range(ENVS)
    }


def test_another_number_of_rows_than_of_environments_is_refused(addresses):
    trajectories: list[Any] = []
    drive([trajectories.append], steps=3)
    stock = UnbatchingObserver(lambda: print, ENVS + 1)
    single = nest_utils.unstack_nested_arrays(trajectories[0])[0]
    observer: Any
    with ReplayObserver(addresses, SPEC, ENVS + 1) as ours:
        for observer in (stock, ours):
            with pytest.raises(ValueError, match=r'\(3,\), not \(4,\). Fix: num_environments'):
                observer(trajectories[0])
            with pytest.raises(ValueError, match=r'\(\), not \(4,\). Fix:.* 1 if it has none'):
                observer(single)
