"""The learner against real parameter shards, held to TF-Agents' own training."""

import collections
import contextlib
import itertools
import types

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.agents.dqn import dqn_agent
from tf_agents.specs import tensor_spec
from tf_agents.trajectories import policy_step, trajectory
from tf_agents.trajectories import time_step as ts

from agents import dqn
from agents.config import STALENESS_BOUNDS, AgentConfig, LearnerConfig, NetworkConfig
from agents.gradient import AgentGradient
from agents.heads import LOSSES
from agents.learner import Learner, LossStatistics, OutlierTest
from agents.model import family_model
from infra.parameter_server.client import ParameterClient
from infra.parameter_server.lanes import PushLanes
from infra.parameter_server.layout import Layout
from infra.replay.trajectory import Transition
from tests.support import memory, parameter_servers

BATCH, ACTIONS, DISCOUNT = 8, 4, 0.97
UPDATES, TARGET_PERIOD = 25, 10
TIME_STEP = ts.time_step_spec(tensor_spec.BoundedTensorSpec((84, 84, 4), tf.uint8, 0, 255))
ACTION = tensor_spec.BoundedTensorSpec((), tf.int32, 0, ACTIONS - 1)
NETWORK = NetworkConfig(torso='dqn2013')

Sample = collections.namedtuple('Sample', 'transition')

OPTIMIZERS = {
    'adagrad': (
        {'learning_rate': 0.01, 'adagrad_initial_accumulator': 0.1},
        lambda: tf.compat.v1.train.AdagradOptimizer(0.01, initial_accumulator_value=0.1),
    ),
    'rmsprop': (
        {'learning_rate': 2.5e-4, 'optimizer_decay': 0.95, 'optimizer_epsilon': 1e-5},
        lambda: tf.compat.v1.train.RMSPropOptimizer(
            2.5e-4, decay=0.95, epsilon=1e-5, centered=True
        ),
    ),
    # An epsilon of 1e-8 would magnify the gradients' rounding (1e-9 where they are nearly 0) to
    # whole steps; Rainbow's keeps the comparison one of arithmetic.
    'adam': (
        {'learning_rate': 2.5e-4, 'optimizer_epsilon': 1.5e-4},
        lambda: tf.compat.v1.train.AdamOptimizer(2.5e-4, epsilon=1.5e-4),
    ),
}


def batches(count):
    """Random transitions; the discount is 1 or, behind an end, 0."""
    rng = np.random.default_rng(3)
    for _ in range(count):
        yield {
            'observation': rng.integers(0, 256, (BATCH, 84, 84, 4), np.uint8),
            'action': rng.integers(0, ACTIONS, BATCH).astype(np.int32),
            'reward': rng.normal(size=BATCH).astype(np.float32),
            'discount': (rng.random(BATCH) > 0.2).astype(np.float32),
            'next_observation': rng.integers(0, 256, (BATCH, 84, 84, 4), np.uint8),
        }


def our_samples(count):
    """The batches as the replay's dataset gives them: the discount holds gamma."""
    for batch in batches(count):
        gamma = np.float32(DISCOUNT)
        yield Sample(Transition(**{**batch, 'discount': gamma * batch['discount']}))


def their_parameters(optimizer, count):
    """Parameters after `count` calls of the stock TF-Agents agent's own `train`."""
    network = dqn.make_agent(AgentConfig(), NETWORK, TIME_STEP, ACTION, seed=5).q_network
    agent = dqn_agent.DqnAgent(
        TIME_STEP,
        ACTION,
        network,
        optimizer,
        gamma=DISCOUNT,
        td_errors_loss_fn=LOSSES['huber'],
        target_update_period=TARGET_PERIOD,
    )
    agent.initialize()
    for arrays in batches(count):
        batch = {name: tf.constant(array) for name, array in arrays.items()}
        nothing = tf.zeros(BATCH)
        middle = tf.ones(BATCH, tf.int32)
        agent.train(
            trajectory.Transition(
                ts.TimeStep(middle, nothing, nothing + 1, batch['observation']),
                policy_step.PolicyStep(batch['action'], (), ()),
                ts.TimeStep(middle, batch['reward'], batch['discount'], batch['next_observation']),
            )
        )
    return np.concatenate([v.numpy().ravel() for v in network.trainable_variables])


@pytest.fixture
def connected():
    """Makes a learner on real shards, in this process, with its client."""
    with contextlib.ExitStack() as stack:

        def connect(samples, learner_config=None, **server_changes):
            config = parameter_servers.config(**server_changes)
            shards = stack.enter_context(parameter_servers.serve(config))
            agent = dqn.make_agent(AgentConfig(), NETWORK, TIME_STEP, ACTION, seed=5)
            network = AgentGradient(family_model(agent), gradient_clip_norm=0.0)
            client = stack.enter_context(
                ParameterClient(
                    [shard.address for shard in shards], Layout.from_variables(network.variables)
                )
            )
            client.initialise(network.parameters())
            learner_config = learner_config or LearnerConfig(
                batch_size=BATCH, overlap_push=False, outlier_deviations=0.0
            )
            lanes = stack.enter_context(PushLanes(client, learner_config.pushes_in_flight))
            return Learner(learner_config, network, samples, lanes), client, network

        yield connect


@pytest.mark.parametrize('num_shards', [1, 3])
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_updates_through_the_server_equal_tf_agents_own_train(connected, name, num_shards):
    values, their_optimizer = OPTIMIZERS[name]
    learner, client, network = connected(
        our_samples(UPDATES),
        num_parameter_shards=num_shards,
        target_update_period=TARGET_PERIOD,
        optimizer=name,
        **values,
    )
    for _ in range(UPDATES):
        learner.update()
    assert learner.clock.updates == UPDATES
    assert client.pull().target_versions == (20,) * num_shards  # 25 updates, every 10th
    ours = network.parameters()
    theirs = their_parameters(their_optimizer(), UPDATES)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)


def test_figures_are_those_of_the_latest_batch(connected):
    (sample,) = our_samples(1)
    learner, _, network = connected(iter([sample]))
    assert learner.describe() == {}
    gradient, loss, error, _ = network.gradient(sample.transition)
    learner.update()
    figures = learner.describe()
    values = network.model.outputs(sample.transition.observation).numpy()  # newest parameters
    taken = values[np.arange(BATCH), sample.transition.action]
    assert figures == {
        'loss': pytest.approx(float(loss)),
        'mean_absolute_error': pytest.approx(error.mean()),
        'gradient_norm': pytest.approx(np.linalg.norm(gradient)),
        'mean_q': pytest.approx(taken.mean(), rel=1e-4),
        'max_q': pytest.approx(values.max(), rel=1e-4),
    }


class FakeNetwork:
    """A gradient of norm 5, clipped from 10, and errors of 1 and 3; a user's agent."""

    def gradient(self, transition, weights):
        assert weights.shape == (2,)
        return (
            np.array([3, 4], np.float32),
            np.float32(2),
            np.array([1, 3], np.float32),
            np.float32(0.5),
        )

    def values(self, observation, action):
        return None


def test_figures_of_a_clipped_gradient_with_priorities_and_unknown_values():
    clock = types.SimpleNamespace(updates=0)
    snapshot = types.SimpleNamespace(clock=clock, parts=None, target_versions=None)
    client = types.SimpleNamespace(
        pull=lambda: snapshot,
        push_async=lambda *_, **__: types.SimpleNamespace(
            result=lambda: types.SimpleNamespace(rejected=None, staleness=0, snapshot=snapshot)
        ),
    )
    priorities = types.SimpleNamespace(update=lambda *_: None, dropped=0)
    sample = types.SimpleNamespace(
        transition=types.SimpleNamespace(observation=None, action=None),
        key=None,
        shard=np.zeros(2, np.int32),
        probability=np.full(2, 0.5),
    )
    learner = Learner(LearnerConfig(), FakeNetwork(), iter([sample]), client, priorities)  # type: ignore[arg-type]
    learner.update()
    # Priorities are errors plus 1e-6; the norm is that before clipping, 5 / 0.5.
    expected = {'mean_priority': 2.0, 'max_priority': 3.0, 'gradient_norm': 10.0}
    figures = learner.describe()
    assert figures == pytest.approx({**expected, 'loss': 2.0, 'mean_absolute_error': 2.0}, abs=1e-5)


def test_a_reply_that_another_has_overtaken_brings_no_old_parameters_back():
    def snapshot(updates):
        clock = types.SimpleNamespace(updates=updates)
        parts = (np.array([updates], np.float32),)
        return types.SimpleNamespace(clock=clock, parts=parts, version=updates, target_versions=())

    replies = iter([2, 1, 3])
    target = types.SimpleNamespace(parts=None, target_versions=())
    client = types.SimpleNamespace(
        pull=lambda: snapshot(0),
        pull_target=lambda: target,
        push_async=lambda *_: types.SimpleNamespace(
            result=lambda: types.SimpleNamespace(
                rejected=None, staleness=0, snapshot=snapshot(next(replies))
            )
        ),
    )
    network, taken = FakeNetwork(), []
    network.gradient = lambda *_: (np.zeros(2), np.float32(1), np.zeros(1), np.float32(1))  # type: ignore[method-assign]
    network.set_parameters = lambda part: taken.append(part[0])  # type: ignore[attr-defined]
    sample = types.SimpleNamespace(transition=None)
    learner = Learner(LearnerConfig(), network, itertools.repeat(sample), client)  # type: ignore[arg-type]
    for _ in range(4):
        learner.update()
    assert taken == [0, 2, 3]
    assert learner.clock.updates == 3


@pytest.mark.parametrize('in_flight', [1, 3])
def test_overlapped_pushes_lose_no_update(connected, in_flight):
    learner, client, _ = connected(
        our_samples(10),
        LearnerConfig(
            batch_size=BATCH, overlap_push=True, pushes_in_flight=in_flight, outlier_deviations=0.0
        ),
        num_parameter_shards=2,
        # A gradient is computed while k pushes are under way and sent once the first of them is
        # done; the k - 1 pushes sent after it may arrive before it.
        max_staleness=2 * in_flight - 1,
    )
    for _ in range(10):
        learner.update()
    learner.finish_push()
    assert learner.counters.stale == 0
    assert learner.clock.updates == 10
    assert [shard['version'] for shard in client.report()['shards']] == [10, 10]
    assert sum(learner.counters.staleness) == 10


@pytest.mark.parametrize(('pull_period', 'overlap'), [(1, True), (4, False), (4, True)])
@pytest.mark.parametrize('short', [0, 1])
def test_gradients_are_as_old_as_the_updates_since_the_pull_and_the_push_under_way(
    connected, pull_period, overlap, short
):
    age = pull_period - 1 + overlap
    learner, _, _ = connected(
        our_samples(10),
        LearnerConfig(
            batch_size=BATCH,
            learner_pull_period=pull_period,
            overlap_push=overlap,
            outlier_deviations=0.0,
        ),
        max_staleness=age - short,
    )
    for _ in range(10):
        learner.update()
    learner.finish_push()
    assert (learner.counters.stale > 0) == bool(short)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_updates_leave_nothing_behind_in_learner_and_shards(connected, optimizer):
    # A tensor that Python saw in an update would be 100 blocks or more (infra/array_function.py);
    # the shards run in this process.
    learner, _, _ = connected(
        itertools.cycle(our_samples(2)), num_parameter_shards=2, optimizer=optimizer
    )
    assert memory.blocks_kept(learner.update, 100, few=50) < 50


def test_shard_that_lost_its_parameters_gets_them_back_from_the_learner(tmp_path):
    config = parameter_servers.config(num_parameter_shards=1, learning_rate=1.0)
    agent = dqn.make_agent(AgentConfig(), NETWORK, TIME_STEP, ACTION, seed=5)
    network = AgentGradient(family_model(agent), gradient_clip_norm=0.0)
    with parameter_servers.ShardProcess(tmp_path, config, 0).wait_ready() as shard:
        layout = Layout.from_variables(network.variables)
        with ParameterClient([shard.address], layout, timeout_seconds=60.0) as client:
            client.initialise(network.parameters())
            learner = Learner(LearnerConfig(overlap_push=False), network, our_samples(4), client)
            learner.update()
            learned = network.parameters()
            shard.kill()
            shard.start()  # without a checkpoint: empty
            shard.wait_ready()
            learner.update()
            assert learner.clock.updates == 1  # the clock does not run backwards
            np.testing.assert_array_equal(network.parameters(), learned)
            learner.update()
            assert learner.clock.updates == 2


def test_gradient_that_is_not_finite_is_refused_and_counted(connected):
    def poisoned():
        for sample in our_samples(2):
            reward = np.full(BATCH, np.nan, np.float32)
            yield Sample(sample.transition._replace(reward=reward))

    learner, _, _ = connected(poisoned())
    learner.update()
    learner.update()
    assert (learner.counters.invalid, learner.clock.updates) == (2, 0)


def test_outlying_loss_is_dropped_by_the_learner(connected):
    # A decay of 0.5 makes the statistics old enough to judge by after 1 / (1 - 0.5) = 2 losses.
    config = LearnerConfig(
        batch_size=BATCH, overlap_push=False, outlier_deviations=3.0, outlier_decay=0.5
    )

    def samples():
        usual = list(our_samples(6))
        yield from usual
        yield Sample(usual[0].transition._replace(reward=usual[0].transition.reward + 1e4))

    learner, _, _ = connected(samples(), config, max_staleness=100, learning_rate=1.0)
    for _ in range(7):
        learner.update()
    assert learner.counters.outliers >= 1
    assert learner.clock.updates == 7 - learner.counters.outliers


def test_an_outlier_whose_refresh_was_due_brings_the_parameters_all_the_same(connected):
    config = LearnerConfig(
        batch_size=BATCH, overlap_push=False, outlier_deviations=3.0, outlier_decay=0.5
    )
    usual = list(our_samples(6))
    outlier = Sample(usual[0].transition._replace(reward=usual[0].transition.reward + 1e4))
    learner, client, _ = connected(iter([*usual, outlier]), config, learning_rate=1.0)
    for _ in usual:
        learner.update()
    client.push(np.ones(client.layout.size, np.float32), client.pull().version, pull=False)
    learner.update()
    assert learner.counters.outliers == 1
    assert learner.clock.updates == 7
    assert client.pull().parts is None  # the learner has had the newest


def test_statistics_equal_a_weighted_mean_and_variance():
    losses, decay = [1.0, 3.0, 2.0, 7.0], 0.8
    statistics = LossStatistics()
    for loss in losses:
        statistics = statistics.including(loss, decay)
    # Weights decay^age, normalised: the plain definition of the exponentially weighted moments.
    weights = np.array([decay ** (len(losses) - 1 - i) for i in range(len(losses))])
    mean = np.average(losses, weights=weights)
    variance = np.average((np.array(losses) - mean) ** 2, weights=weights)
    assert statistics.mean == pytest.approx(mean)
    assert statistics.variance == pytest.approx(variance)
    assert statistics.weight == pytest.approx(1 - decay**4)


def test_outlier_bound_is_the_mean_plus_the_deviations():
    # Mean 2, standard deviation 3: the bound at 4 deviations is 2 + 4 * 3 = 14.
    statistics = LossStatistics(mean=2.0, variance=9.0, weight=1.0)
    assert statistics.bound(4.0) == 14.0
    assert statistics.bound(0.0) == np.inf  # switched off


def test_young_statistics_judge_nothing():
    # After 9 of 1 / (1 - 0.9) = 10 losses the weight 1 - 0.9^9 = 0.61 is below 1 - 1/e = 0.63.
    statistics = LossStatistics()
    for _ in range(9):
        statistics = statistics.including(1.0, 0.9)
    assert statistics.bound(3.0) == np.inf
    assert statistics.including(1.0, 0.9).bound(3.0) == pytest.approx(1.0)


def table_of_values(config, updates=20_000, rare=1 / 3_000, rate=0.05):
    """(value of a state, share of gradients dropped) after learning from a table of two states.

    A transition in `1 / rare` is from the state whose reward is 1, all others from one without any
    reward, of the usual noise; batches of 32, Huber loss, as in the learner.
    """
    rng = np.random.default_rng(0)
    test, value, dropped = OutlierTest(config), 0.0, 0
    for _ in range(updates):
        rows = rng.binomial(32, rare)
        error = 1.0 - value
        loss = (rows * 0.5 * error**2 + 0.5 * 1e-4 * rng.chisquare(32 - rows)) / 32
        if test.drops(loss):
            dropped += 1
        else:
            value += rate * rows * error / 32
    return value, dropped / updates


def test_a_rare_reward_is_learned_though_its_losses_are_outliers():
    # Of 20,000 batches some 20,000 * 32 / 3,000 = 213 rows hold the reward. Learned from every one
    # of them the value comes to 1 - (1 - 0.05 / 32)^213 = 0.28.
    off, dropped = table_of_values(LearnerConfig(outlier_deviations=0.0))
    assert off == pytest.approx(0.28, abs=0.05)  # three deviations of 213 rows
    assert dropped == 0
    lone, dropped = table_of_values(LearnerConfig())
    # An outlier every 94 updates is seldom alone for 1,000: one in e^(1000 / 94) = 40,000.
    assert lone > 0.95 * off
    assert dropped < 0.001
    # The paper's rule hides it: what its first losses, before it judges, have taught is all.
    every, dropped = table_of_values(LearnerConfig(outlier_rule='every'))
    assert every < 0.03
    assert dropped > 0.009


def test_one_outlier_does_not_blind_the_test():
    test = OutlierTest(LearnerConfig(outlier_deviations=6.0))
    rng = np.random.default_rng(0)
    for loss in rng.uniform(0.9, 1.1, 3_000):
        assert not test.drops(loss)
    assert test.drops(1e6)
    # The bound was 1 + 6 * 0.06 = 1.35, and counts as such: 1e6 would have raised it to 200,000.
    assert test.statistics.bound(6.0) < 1.4


def test_a_level_that_rises_is_soon_no_outlier():
    test = OutlierTest(LearnerConfig(outlier_deviations=6.0))
    for loss in np.random.default_rng(0).uniform(0.9, 1.1, 3_000):
        test.drops(loss)
    dropped = [test.drops(loss) for loss in np.random.default_rng(1).uniform(9, 11, 1_000)]
    assert sum(dropped) == 1  # the first, which was alone


def test_of_outliers_that_are_far_apart_every_other_is_learned():
    test = OutlierTest(LearnerConfig(outlier_deviations=6.0))
    usual = np.random.default_rng(0).uniform(0.9, 1.1, 2_000)
    dropped = []
    for _ in range(6):
        assert not any(test.drops(loss) for loss in usual)
        dropped.append(test.drops(50.0))
    assert dropped == [True, False] * 3


def test_staleness_is_counted_by_its_bounds(connected):
    learner, client, _ = connected(our_samples(3), max_staleness=1000)
    learner.update()
    for _ in range(4):
        client.push(np.ones(client.layout.size, np.float32), client.pull().version)
    learner.update()  # from the parameters of update 1, when the clock is at 5
    learner.update()
    # 0 twice, and 4, which is above 3 and at most 5.
    counts = dict(zip(STALENESS_BOUNDS, learner.counters.staleness))
    assert {bound: count for bound, count in counts.items() if count} == {0: 2, 5: 1}
