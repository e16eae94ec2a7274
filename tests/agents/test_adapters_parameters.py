"""The parameter server behind TF-Agents' own interfaces: stock agents, learners and actors."""

import contextlib

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.agents.dqn import dqn_agent
from tf_agents.networks import sequential
from tf_agents.specs import tensor_spec
from tf_agents.train import learner as learner_lib
from tf_agents.train.utils import train_utils
from tf_agents.trajectories import time_step as ts
from tf_agents.trajectories import trajectory

from agents.adapters.parameters import (
    POLICY_KEY,
    TRAIN_STEP_KEY,
    ParameterServerOptimizer,
    ParameterServerVariableContainer,
)
from infra.parameter_server.protocol import ParameterServerUnavailable
from tests.agents.test_learner import OPTIMIZERS
from tests.support import dqn_agents, parameter_servers

BATCH, ACTIONS, ITERATIONS = 8, 3, 200
TIME_STEP = ts.time_step_spec(tensor_spec.TensorSpec([5], tf.float32))
ACTION = tensor_spec.BoundedTensorSpec([], tf.int32, 0, ACTIONS - 1)


def make_agent(optimizer, train_step=None):
    """A stock DQN agent, its network the same at every call."""
    tf.keras.utils.set_random_seed(7)
    layers = [tf.keras.layers.Dense(16, activation='relu'), tf.keras.layers.Dense(ACTIONS)]
    agent = dqn_agent.DqnAgent(
        TIME_STEP,
        ACTION,
        sequential.Sequential(layers),
        optimizer,
        gamma=0.9,
        target_update_period=30,
        train_step_counter=train_step if train_step is not None else tf.Variable(0, dtype=tf.int64),
    )
    agent.initialize()
    return agent


def experience():
    """A dataset of 200 fixed batches [BATCH, 2], with TF-Agents' info beside each."""
    rng = np.random.default_rng(2)
    shape = (ITERATIONS, BATCH, 2)
    middle = np.ones(shape, np.int32)
    batches = trajectory.Trajectory(
        middle,
        rng.normal(size=(*shape, 5)).astype(np.float32),
        rng.integers(ACTIONS, size=shape).astype(np.int32),
        (),
        middle,
        rng.normal(size=shape).astype(np.float32),
        (rng.random(shape) > 0.1).astype(np.float32),
    )
    return tf.data.Dataset.from_tensor_slices((batches, np.zeros(ITERATIONS)))


def train(directory, optimizer):
    """The network's values after 200 iterations of the stock Learner."""
    train_step = train_utils.create_train_step()
    agent = make_agent(optimizer, train_step)
    learner = learner_lib.Learner(
        str(directory), train_step, agent, experience, checkpoint_interval=0, summary_interval=0
    )
    learner.run(iterations=ITERATIONS)
    assert train_step.numpy() == ITERATIONS
    return values(agent)


def values(agent):
    return np.concatenate([v.numpy().ravel() for v in agent._q_network.trainable_variables])


@pytest.fixture
def shards():
    """Starts parameter shards in this process; gives their addresses."""
    with contextlib.ExitStack() as stack:

        def start(**changes):
            config = parameter_servers.config(**changes)
            servers = stack.enter_context(parameter_servers.serve(config))
            return [server.address for server in servers]

        yield start


@pytest.fixture
def optimizer_of():
    """Makes optimizers, and closes them."""
    with contextlib.ExitStack() as stack:

        def make(addresses, **arguments):
            return stack.enter_context(
                contextlib.closing(ParameterServerOptimizer(addresses, **arguments))
            )

        yield make


def test_the_stock_learner_trains_through_the_shards_as_with_a_local_optimizer(
    tmp_path, optimizer_of
):
    name = 'rmsprop'  # the others are compared in tests/agents/test_learner.py
    settings, local = OPTIMIZERS[name]
    config = parameter_servers.config(optimizer=name, num_parameter_shards=3, **settings)
    with contextlib.ExitStack() as stack:
        # In processes of their own: here they would wait for the threads that wait for them.
        started = [
            stack.enter_context(parameter_servers.ShardProcess(directory, config, shard))
            for shard, directory in enumerate(directories(tmp_path, 3))
        ]
        expected = train(tmp_path / 'local', local())
        optimizer = optimizer_of([shard.wait_ready().address for shard in started])
        ours = train(tmp_path / 'ours', optimizer)
    assert optimizer.rejected == 0
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-9)


def directories(parent, count):
    """New directories, one for each shard."""
    for index in range(count):
        directory = parent / f'shard-{index}'
        directory.mkdir()
        yield directory


def test_the_second_agent_takes_the_parameters_of_the_first(shards, optimizer_of):
    addresses = shards(num_parameter_shards=2, learning_rate=1e3)
    optimizers = [optimizer_of(addresses) for _ in range(2)]
    first, second = map(make_agent, optimizers)
    tf.nest.map_structure(lambda v: v.assign(v + 1), second._q_network.trainable_variables)
    batch = next(iter(experience()))[0]
    first.train(batch)
    second.train(batch)
    # The second's gradient came on top of the first's; only the second has pulled since.
    assert optimizers[1].updates == 2
    assert (np.abs(values(second) - values(first)) < 0.5).all()


def test_parameters_are_refreshed_every_pull_period(shards, optimizer_of):
    agent = make_agent(optimizer_of(shards(num_parameter_shards=1), pull_period=3))
    batch = next(iter(experience()))[0]
    changes = []
    for _ in range(6):
        before = values(agent)
        agent.train(batch)
        changes.append(bool((values(agent) != before).any()))
    assert changes == [False, False, True] * 2


def test_a_refused_gradient_is_counted_and_brings_the_newest_parameters(shards, optimizer_of):
    optimizer = optimizer_of(shards(num_parameter_shards=1, learning_rate=1.0))
    variable = tf.Variable(tf.zeros([3]))
    optimizer.apply_gradients([(tf.ones([3]), variable)])
    before = variable.numpy()
    optimizer.apply_gradients([(tf.fill([3], np.nan), variable)])
    assert optimizer.rejected == 1
    np.testing.assert_array_equal(variable, before)


def test_a_variable_without_a_gradient_stays(shards, optimizer_of):
    optimizer = optimizer_of(shards(num_parameter_shards=2))
    moved, still = tf.Variable(tf.zeros([3])), tf.Variable(tf.ones([2]))
    optimizer.apply_gradients([(tf.ones([3]), moved), (None, still)])
    # The servers' AdaGrad moves a parameter by -g (see tests/support/parameter_servers.py).
    np.testing.assert_allclose(moved, -np.ones(3), rtol=1e-6)
    np.testing.assert_array_equal(still, np.ones(2))


def test_a_layer_of_mixed_precision_is_trained_in_float32(shards, optimizer_of):
    layer = tf.keras.layers.Dense(3, dtype='mixed_float16')
    layer.build([None, 4])
    kernel = layer.kernel.numpy()
    with tf.GradientTape() as tape:
        outputs = layer(tf.ones([2, 4]))
    assert outputs.dtype == tf.float16
    gradients = tape.gradient(outputs, layer.trainable_variables)
    optimizer_of(shards()).apply_gradients(zip(gradients, layer.trainable_variables))
    # The servers' AdaGrad moves a parameter by -g; each of 2 rows of ones adds 1 to g.
    np.testing.assert_allclose(layer.kernel.numpy(), kernel - 2, rtol=1e-6)


def test_a_closed_optimizer_connects_anew_in_a_graph_that_was_traced_before(shards, optimizer_of):
    optimizer = optimizer_of(shards(num_parameter_shards=1))
    agent = make_agent(optimizer)
    batch = next(iter(experience()))[0]
    agent.train(batch)
    optimizer.close()
    agent.train(batch)
    assert optimizer.updates == 2


def test_what_cannot_be_applied_is_refused_and_named(shards, optimizer_of):
    optimizer = optimizer_of(shards(num_parameter_shards=1))
    variable = tf.Variable(tf.zeros([3]), name='weights')
    with pytest.raises(ValueError, match=r'gradient of weights.*\(5,\), not \(3,\)'):
        optimizer.apply_gradients([(tf.ones([5]), variable)])
    with pytest.raises(ValueError, match='no variable'):
        optimizer.apply_gradients([])
    half = tf.Variable(tf.zeros([3], tf.float16), name='half')
    with pytest.raises(ValueError, match='half:0 is float16'):
        optimizer.apply_gradients([(tf.ones([3], tf.float16), half)])


def test_one_replica_on_a_device_of_its_own_pushes_as_without_a_strategy(shards, optimizer_of):
    optimizer = optimizer_of(shards())
    strategy = tf.distribute.OneDeviceStrategy('CPU:0')
    with strategy.scope():
        variable = tf.Variable(tf.zeros([3]))
    strategy.run(lambda: optimizer.apply_gradients([(tf.ones([3]), variable)]))
    np.testing.assert_allclose(variable, -np.ones(3), rtol=1e-6)


def test_a_strategy_whose_replicas_are_not_added_up_is_refused_and_named(optimizer_of):
    optimizer = optimizer_of(['127.0.0.1:1'])
    central = tf.distribute.experimental.CentralStorageStrategy(['CPU:0'])
    with central.scope():
        variable = tf.Variable(tf.zeros([3]))

    def update():
        optimizer.apply_gradients([(tf.ones([3]), variable)])

    with pytest.raises(RuntimeError, match=r'gradients of a CentralStorageStrategy.*Fix: use'):
        central.run(update)
    mirrored = tf.distribute.MirroredStrategy(['CPU:0'])
    with mirrored.scope(), pytest.raises(RuntimeError, match=r'scope of a MirroredStrategy.*run'):
        update()


def test_other_variables_than_at_the_first_call_are_refused(shards, optimizer_of):
    optimizer = optimizer_of(shards(num_parameter_shards=1))
    one, two = tf.Variable(tf.zeros([3]), name='one'), tf.Variable(tf.zeros([3]), name='two')
    optimizer.apply_gradients([(tf.ones([3]), one), (tf.ones([3]), two)])
    with pytest.raises(ValueError, match='in their order'):
        optimizer.apply_gradients([(tf.ones([3]), two), (tf.ones([3]), one)])


def test_a_shard_that_is_away_is_named_in_time():
    optimizer = ParameterServerOptimizer(['127.0.0.1:1'], timeout_seconds=0.5)
    with pytest.raises(ParameterServerUnavailable, match=r'127\.0\.0\.1:1'):
        optimizer.apply_gradients([(tf.ones([3]), tf.Variable(tf.zeros([3])))])


class TestVariableContainer:
    def structure(self, agent):
        return {POLICY_KEY: agent.collect_policy.variables(), TRAIN_STEP_KEY: tf.Variable(0)}

    def test_an_actors_variables_follow_the_learner(self, shards, optimizer_of):
        addresses = shards(num_parameter_shards=3)
        learner = make_agent(optimizer_of(addresses))
        actor = make_agent(tf.compat.v1.train.GradientDescentOptimizer(0.0))
        variables = self.structure(actor)
        with contextlib.closing(ParameterServerVariableContainer(addresses)) as container:
            container.push(variables)
            for batch, _ in experience().take(4):
                learner.train(batch)
            assert (values(actor) != values(learner)).any()
            container.update(variables)
            np.testing.assert_array_equal(values(actor), values(learner))
            assert variables[TRAIN_STEP_KEY].numpy() == 4
            pulled = container.pull()
            assert pulled[TRAIN_STEP_KEY] == 4
            for variable, value in zip(variables[POLICY_KEY], pulled[POLICY_KEY]):
                np.testing.assert_array_equal(variable, value)

    def test_a_dueling_agents_variables_come_in_the_order_of_its_gradients(
        self, shards, optimizer_of
    ):
        # Its streams' layers have equal shapes: an exchange would go unnoticed by the shards.
        addresses = shards(num_parameter_shards=2)
        agent, other = (dqn_agents.make(seed=seed, dueling=True) for seed in (0, 1))
        optimizer = optimizer_of(addresses)
        optimizer.apply_gradients([(None, v) for v in agent.q_network.trainable_variables])
        with contextlib.closing(ParameterServerVariableContainer(addresses)) as container:
            container.update({POLICY_KEY: other.collect_policy.variables()})
        for ours, theirs in zip(
            agent.q_network.trainable_variables, other.q_network.trainable_variables
        ):
            np.testing.assert_array_equal(ours, theirs, err_msg=ours.name)

    def test_another_structure_than_at_the_first_call_is_refused(self, shards):
        one = tf.Variable(tf.ones([4]))
        with contextlib.closing(ParameterServerVariableContainer(shards())) as container:
            container.push([one])
            with pytest.raises(ValueError, match='structure'):
                container.update([one, one])
            with pytest.raises(ValueError, match='not shaped'):
                container.update([tf.Variable(tf.ones([3]))])

    def test_a_list_is_taken_where_a_tuple_was_pushed_and_given_back(self, shards):
        one, two = tf.Variable(tf.ones([4])), tf.Variable(tf.zeros([3]))
        with contextlib.closing(ParameterServerVariableContainer(shards())) as container:
            container.push({POLICY_KEY: (one, two), TRAIN_STEP_KEY: tf.Variable(0)})
            variables = {POLICY_KEY: [one, two], TRAIN_STEP_KEY: tf.Variable(1)}
            two.assign([5, 6, 7])
            container.update(variables)
            assert isinstance(container.pull()[POLICY_KEY], list)
        np.testing.assert_array_equal(two, np.zeros(3))
        assert variables[TRAIN_STEP_KEY].numpy() == 0

    def test_a_later_push_changes_nothing(self, shards):
        variable = tf.Variable(tf.ones([4]))
        with contextlib.closing(ParameterServerVariableContainer(shards())) as container:
            container.push([variable])
            container.push([tf.Variable(tf.zeros([4]))])
            container.update([variable])
        np.testing.assert_array_equal(variable, np.ones(4))

    def test_a_variable_that_no_gradient_trains_is_refused_and_named(self, shards):
        statistics = tf.Variable(tf.ones([4]), trainable=False, name='moving_mean')
        with contextlib.closing(ParameterServerVariableContainer(shards())) as container:
            with pytest.raises(ValueError, match='moving_mean'):
                container.push({POLICY_KEY: [statistics]})

    def test_what_cannot_be_known_yet_or_at_all_is_an_error(self, shards):
        container = ParameterServerVariableContainer(shards())
        with pytest.raises(RuntimeError, match='structure is not known'):
            container.pull()
        with pytest.raises(KeyError, match='no table'):
            container.pull('policy')
        with pytest.raises(ValueError, match='one network'):
            ParameterServerVariableContainer(['a:1'], ('one', 'two'))
