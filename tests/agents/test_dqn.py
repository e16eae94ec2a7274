"""The family's agent against stock TF-Agents: the same training, and gamma counts once."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.agents.categorical_dqn import categorical_dqn_agent
from tf_agents.agents.dqn import dqn_agent
from tf_agents.networks import network as network_lib
from tf_agents.networks import sequential
from tf_agents.specs import tensor_spec
from tf_agents.trajectories import time_step as ts
from tf_agents.trajectories import trajectory

from agents import dqn
from agents.flat_variables import FlatVariables
from agents.heads import ValueHead
from agents.model import tf_agents_transition
from agents.munchausen import Munchausen
from tests.support import dqn_agents

BATCH = 6


def random_trajectory(steps, seed=5):
    """Random experience [BATCH, steps] within episodes; the first row ends with its last reward."""
    random = np.random.default_rng(seed)
    discount = np.ones((BATCH, steps), np.float32)
    discount[0, steps - 2] = 0.0
    middle = tf.ones([BATCH, steps], tf.int32)
    return trajectory.Trajectory(
        step_type=middle,
        observation=tf.constant(dqn_agents.frames(6, BATCH, steps)),
        action=tf.constant(random.integers(3, size=(BATCH, steps)), tf.int32),
        policy_info=(),
        next_step_type=middle,
        reward=tf.constant(random.normal(size=(BATCH, steps)), tf.float32),
        discount=tf.constant(discount),
    )


def copy_parameters(ours, stock):
    """Gives a stock agent the parameters and the target of one of ours."""
    for name in ('_q_network', '_target_q_network'):
        values = FlatVariables(getattr(ours, name).trainable_variables).values()
        FlatVariables(getattr(stock, name).trainable_variables).assign(values)


@pytest.mark.parametrize('double', [False, True])
def test_a_step_along_the_gradient_equals_stock_tf_agents_train(double):
    learner, transition = dqn_agents.gradient(double_dqn=double), dqn_agents.transition()
    stock_class = dqn_agent.DdqnAgent if double else dqn_agent.DqnAgent
    ours = dqn_agents.agent_of(learner)
    stock = stock_class(
        ours.time_step_spec,
        ours.action_spec,
        ours.q_network.copy(name='stock'),
        tf.compat.v1.train.GradientDescentOptimizer(1.0),
        gamma=0.99,
        target_update_period=1000,
        train_step_counter=tf.Variable(0),
    )
    copy_parameters(ours, stock)
    parameters = FlatVariables(stock._q_network.trainable_variables)
    gradient, loss, *_ = learner.gradient(transition)
    # TF-Agents multiplies the discount of a ready-made transition by gamma once more.
    theirs = transition._replace(discount=transition.discount / np.float32(0.99))
    theirs = dqn_agents.Transition(*map(tf.constant, theirs))
    stock_loss = stock.train(tf_agents_transition(theirs)).loss
    np.testing.assert_allclose(loss, stock_loss, rtol=1e-6)
    step = learner.parameters() - parameters.values()
    scale = np.abs(step).max()
    np.testing.assert_allclose(gradient / scale, step / scale, atol=1e-5)


class StockCategorical(network_lib.Network):
    """One of our networks as TF-Agents' C51 takes it."""

    def __init__(self, network, num_atoms, name='categorical'):
        super().__init__(network.input_tensor_spec, name=name)
        self.network = network
        self.num_atoms = num_atoms

    def call(self, observation, step_type=None, network_state=(), training=False):
        return self.network(observation, step_type=step_type, network_state=network_state)

    def copy(self, **kwargs):
        return StockCategorical(self.network.copy(name='target'), self.num_atoms)


def test_c51_has_the_loss_of_stock_tf_agents():
    learner = dqn_agents.gradient(agent='c51', num_atoms=21, v_min=-3.0, v_max=3.0, discount=0.9)
    ours = dqn_agents.agent_of(learner)
    stock = categorical_dqn_agent.CategoricalDqnAgent(
        ours.time_step_spec,
        ours.action_spec,
        StockCategorical(ours.q_network.copy(name='stock'), 21),
        tf.compat.v1.train.GradientDescentOptimizer(1.0),
        min_q_value=-3.0,
        max_q_value=3.0,
        gamma=0.9,
        train_step_counter=tf.Variable(0),
    )
    copy_parameters(ours, stock)
    experience = random_trajectory(2)
    stock_loss = stock.train(experience).loss
    np.testing.assert_allclose(ours.loss(experience).loss, stock_loss, rtol=1e-5)


@pytest.mark.parametrize('name', dqn_agents.FAMILY)
@pytest.mark.parametrize('n_step', [1, 3])
def test_a_trajectory_gives_the_loss_of_our_transition_from_loss_and_from_train(n_step, name):
    learner = dqn_agents.gradient(n_step=n_step, discount=0.9, **dqn_agents.FAMILY[name])
    experience = random_trajectory(n_step + 1)
    reward, discount = experience.reward.numpy(), experience.discount.numpy()
    transition = dqn_agents.Transition(
        experience.observation[:, 0].numpy(),
        experience.action[:, 0].numpy(),
        (reward[:, :n_step] * 0.9 ** np.arange(n_step)).sum(axis=1).astype(np.float32),
        (0.9**n_step * discount[:, :n_step].prod(axis=1)).astype(np.float32),
        experience.observation[:, -1].numpy(),
    )
    _, loss, *_ = learner.gradient(transition)
    ours = dqn_agents.agent_of(learner)
    np.testing.assert_allclose(ours.loss(experience).loss, loss, rtol=1e-5)
    np.testing.assert_allclose(ours.train(experience).loss, loss, rtol=1e-5)


@pytest.mark.parametrize('name', dqn_agents.FAMILY)
def test_the_policies_take_the_action_of_the_largest_expected_return(name):
    learner = dqn_agents.gradient(**dqn_agents.FAMILY[name])
    ours = dqn_agents.agent_of(learner)
    observation = tf.constant(dqn_agents.frames(8, 12))
    values = ours.head.values(ours.q_network(observation)[0]).numpy()
    action = ours.policy.action(ts.restart(observation, batch_size=12)).action
    np.testing.assert_array_equal(action, values.argmax(axis=1))
    assert ours.collect_policy.action(ts.restart(observation, batch_size=12)).action.shape == (12,)


@pytest.mark.parametrize('double', [False, True])
def test_a_recurrent_network_has_the_loss_of_stock_tf_agents(double):
    cell = tf.keras.layers.LSTM(3, return_state=True, return_sequences=True)
    steps = ts.time_step_spec(tf.TensorSpec([2], tf.float32))
    action = tensor_spec.BoundedTensorSpec((), tf.int32, 0, 2)
    arguments: dict[str, Any] = {'gamma': 0.95, 'optimizer': None}
    stock_class = dqn_agent.DdqnAgent if double else dqn_agent.DqnAgent
    stock = stock_class(steps, action, sequential.Sequential([cell]), **arguments)
    ours = dqn.DqnAgent(
        steps, action, stock._q_network.copy(), head=ValueHead(), double_dqn=double, **arguments
    )
    for name in ('_q_network', '_target_q_network'):
        networks = (FlatVariables(getattr(a, name).trainable_variables) for a in (stock, ours))
        for network in networks:
            random = np.random.default_rng(len(name))
            network.assign(random.normal(size=network.size).astype(np.float32))
    random = np.random.default_rng(1)
    experience = random_trajectory(4)._replace(
        observation=tf.constant(random.normal(size=(BATCH, 4, 2)), tf.float32)
    )
    expected = stock._loss(experience, gamma=0.95)
    loss = ours.loss(experience)
    np.testing.assert_allclose(loss.loss, expected.loss, rtol=1e-6)
    np.testing.assert_allclose(loss.extra.td_error, expected.extra.td_error, atol=1e-6)
    state = ours.policy.get_initial_state(BATCH)
    step = ts.restart(experience.observation[:, 0], batch_size=BATCH)
    for _ in range(2):  # the state is kept, and handed back
        acted, theirs = (agent.policy.action(step, state) for agent in (ours, stock))
        np.testing.assert_array_equal(acted.action, theirs.action)
        tf.nest.map_structure(np.testing.assert_array_equal, acted.state, theirs.state)
        state = acted.state
    assert any(np.any(part) for part in tf.nest.flatten(state))


def test_munchausen_scales_rewards_but_not_its_bonus():
    ours = dqn_agents.agent_of(dqn_agents.gradient(**dqn_agents.FAMILY['munchausen']))
    experience = random_trajectory(2)
    doubled = experience._replace(reward=2 * experience.reward)
    scaled = ours.loss(experience, reward_scale_factor=2.0).loss
    np.testing.assert_allclose(scaled, ours.loss(doubled).loss, rtol=1e-6)


def test_munchausen_of_a_recurrent_network_has_a_bonus_at_each_step():
    # The soft value, sum of pi (q - tau ln pi), is tau ln sum exp(q / tau).
    steps = ts.time_step_spec(tf.TensorSpec([2], tf.float32))
    action = tensor_spec.BoundedTensorSpec((), tf.int32, 0, 2)
    cell = tf.keras.layers.LSTM(3, return_state=True, return_sequences=True)
    network, munchausen = sequential.Sequential([cell]), Munchausen(0.5, 0.9, -1.0)
    agent = dqn.DqnAgent(
        steps, action, network, None, ValueHead(), munchausen=munchausen, gamma=0.95
    )
    random = np.random.default_rng(1)
    observation = tf.constant(random.normal(size=(BATCH, 4, 2)), tf.float32)
    experience = random_trajectory(4)._replace(observation=observation)
    now, following = observation[:, :-1], observation[:, 1:]
    taken, reward, discount = (
        column[:, :-1] for column in (experience.action, experience.reward, experience.discount)
    )
    log_policy = tf.nn.log_softmax(agent.target_q_network(now)[0] / 0.5)
    bonus = 0.9 * tf.maximum(0.5 * tf.gather(log_policy, taken, batch_dims=2), -1.0)
    soft = 0.5 * tf.reduce_logsumexp(agent.target_q_network(following)[0] / 0.5, axis=-1)
    q_values = tf.gather(agent.q_network(now)[0], taken, batch_dims=2)
    error = reward + bonus + 0.95 * discount * soft - q_values
    np.testing.assert_allclose(agent.loss(experience).extra.td_error, error, atol=1e-5)
