"""Somebody else's agent: its loss, its variables and its policy in our learner and actor."""

import numpy as np
import pytest
import tensorflow as tf

from agents import custom_agent, custom_loss, py_environment
from agents.config import AgentConfig, EnvironmentConfig
from agents.custom_agent import ForeignAgentError
from agents.flat_variables import FlatVariables
from agents.gradient import AgentGradient
from agents.model import tf_agents_transition
from agents.policy import GreedyPolicy
from infra.replay.trajectory import Transition
from pipelines.experiment import builders, presets
from tests.support import dqn_agents, foreign_agents

BATCH, GAMMA = 6, 0.9


def model(factory, weighted=False, seed=0, **values):
    return custom_agent.foreign_model(
        f'tests.support.foreign_agents:{factory}',
        py_environment.time_step_spec(EnvironmentConfig()),
        py_environment.action_spec(dqn_agents.NUM_ACTIONS),
        AgentConfig(discount=GAMMA, **values),
        seed,
        weighted,
    )


def their_form(transition):
    """As the agent's own `train` takes it: the discount without gamma."""
    theirs = transition._replace(discount=transition.discount / np.float32(GAMMA))
    return tf_agents_transition(Transition(*map(tf.constant, theirs)))


@pytest.mark.parametrize(
    'factory', ['stock_dqn', 'scaled_reward_dqn', 'hands_on_keywords', 'own_discount']
)
def test_the_gradient_is_that_of_the_agents_own_train(factory):
    learner = AgentGradient(model(factory), gradient_clip_norm=0.0)
    theirs = learner.model.agent
    learner.set_target(2 * learner.parameters())
    theirs._optimizer = tf.keras.optimizers.legacy.SGD(1.0)
    transition = dqn_agents.transition(BATCH, GAMMA)
    before = learner.parameters()
    gradient, loss, error, _ = learner.gradient(transition)
    trained = theirs.train(their_form(transition))
    np.testing.assert_allclose(loss, trained.loss, rtol=1e-5)
    np.testing.assert_allclose(error, np.abs(trained.extra.td_error), rtol=1e-4, atol=1e-5)
    step = before - learner.parameters()
    scale = np.abs(step).max()
    np.testing.assert_allclose(gradient / scale, step / scale, atol=1e-5)


@pytest.mark.parametrize(
    'factory',
    [
        'zero_started',
        'zero_started_own_discount',
        'dropout_own_discount',
        'noisy',
        'discount_of_targets',
        'in_a_function',
    ],
)
def test_a_next_value_counts_as_the_discount_says_whatever_the_agent_starts_with(factory):
    learner = AgentGradient(model(factory), gradient_clip_norm=0.0)
    values = np.zeros(learner.size, np.float32)
    values[-dqn_agents.NUM_ACTIONS :] = 10.0  # biases of the last layer: all values are 10
    learner.set_parameters(values)
    learner.set_target(values)
    transition = dqn_agents.transition(BATCH)._replace(
        reward=np.zeros(BATCH, np.float32), discount=np.full(BATCH, 0.5, np.float32)
    )
    # The target is 0 + 0.5 * 10.
    np.testing.assert_allclose(learner.gradient(transition)[2], np.full(BATCH, 5.0), rtol=1e-6)


def test_nothing_that_was_tried_remains():
    tried = model('noisy', seed=4)
    tried_draw = tf.random.uniform([]).numpy()
    tf.keras.utils.set_random_seed(4)
    untried = foreign_agents.noisy(
        tried.agent.time_step_spec, tried.agent.action_spec, AgentConfig(discount=GAMMA)
    )
    untried.initialize()
    tf.keras.utils.set_random_seed(4)
    assert tried_draw == tf.random.uniform([]).numpy()
    assert tried.agent._gamma == GAMMA
    assert not tf.config.functions_run_eagerly()
    pairs = list(zip(*(custom_loss.variables_of(agent) for agent in (tried.agent, untried))))
    assert any(variable.dtype == tf.int64 and variable.shape == [3] for variable, _ in pairs)
    for one, other in pairs[1:]:  # the first is the global step that they share
        np.testing.assert_array_equal(one, other, err_msg=one.name)


def test_a_layer_that_chance_leaves_out_is_trained():
    names = [variable.name for variable in model('layer_of_chance').variables]
    assert sum('scale' in name for name in names) == 1


def test_an_agent_for_which_nothing_comes_after_needs_no_gamma():
    learner = AgentGradient(model('bandit'), gradient_clip_norm=0.0)
    _, loss, *_ = learner.gradient(dqn_agents.transition(BATCH, GAMMA))
    assert loss == learner.gradient(dqn_agents.transition(BATCH, GAMMA / 2))[1]


def test_an_agent_that_takes_trajectories_only_is_given_one():
    learner = AgentGradient(model('stock_c51'), gradient_clip_norm=0.0)
    transition = dqn_agents.transition(BATCH, GAMMA)
    _, loss, error, _ = learner.gradient(transition)
    theirs = transition._replace(discount=transition.discount / np.float32(GAMMA))
    experience = custom_loss.two_step_trajectory(Transition(*map(tf.constant, theirs)))
    np.testing.assert_allclose(loss, learner.model.agent.train(experience).loss, rtol=1e-5)
    np.testing.assert_allclose(error, np.full(BATCH, loss))  # it tells no errors of the rows


@pytest.fixture(scope='module')
def stock():
    """The gradient of a stock agent, for tests that leave its parameters as they are."""
    return AgentGradient(model('stock_dqn'), gradient_clip_norm=0.0)


def test_the_trained_variables_are_those_of_the_network_that_acts(stock):
    expected = stock.model.agent._q_network.trainable_variables
    assert [v.name for v in stock.variables] == [v.name for v in expected]
    assert {v.ref() for v in stock.variables} == {v.ref() for v in expected}


def test_every_process_gets_the_same_variables_and_first_values(stock):
    same, other = (model('stock_dqn', seed=seed).variables for seed in (0, 5))
    for one, two, three in zip(stock.variables, same, other, strict=True):
        np.testing.assert_array_equal(one, two)
        assert 'bias' in one.name or (one.numpy() != three.numpy()).any()


def test_its_policy_acts_on_the_parameters_set_last(stock):
    policy = GreedyPolicy(model('stock_dqn', seed=1))
    policy.set_parameters(stock.parameters())
    observation = dqn_agents.frames(8, 16)
    values = stock.model.agent._q_network(observation)[0].numpy()
    np.testing.assert_array_equal(policy.act(observation), values.argmax(axis=1))


def test_its_target_is_set_by_its_own_initialize(stock):
    online = stock.parameters()
    stock.set_target(online + 1)
    target = FlatVariables(stock.model.agent._target_q_network.trainable_variables)
    np.testing.assert_array_equal(target.values(), online + 1)
    np.testing.assert_array_equal(stock.parameters(), online)


@pytest.mark.parametrize('factory', ['stock_dqn', 'zero_started'])
def test_weights_are_taken_by_an_agent_that_looks_at_them(factory):
    learner = AgentGradient(model(factory, weighted=True), 0.0, weighted=True)
    transition = dqn_agents.transition(BATCH, GAMMA)
    gradient, loss, error, _ = learner.gradient(transition, np.zeros(BATCH, np.float32))
    plain = learner.model.loss(Transition(*map(tf.constant, transition)), None)
    np.testing.assert_allclose(loss, plain.weighted, rtol=1e-6)
    assert not gradient.any()
    assert error.all()


@pytest.mark.parametrize(
    ('factory', 'weighted', 'named'),
    [
        ('batch_normalised', False, 'moving_mean'),
        ('normalises_its_weights', False, 'kernel:0 change without a gradient'),
        ('recurrent', False, 'recurrent state'),
        ('not_an_agent', False, 'returned a QNetwork, not a TFAgent'),
        ('without_a_loss', False, 'takes neither form of experience'),
        ('stock_c51', True, 'ignores weights'),
        ('no_such_function', False, 'has no function no_such_function'),
        ('raising', False, 'failed: RuntimeError: no licence'),
        ('exiting', False, 'failed: SystemExit'),
        ('of_other_actions', False, 'its actions are'),
        ('of_other_observations', False, 'its observations are'),
        ('unknown_discount', False, 'no _gamma that it multiplies by'),
        ('hard_coded_discount', False, 'no _gamma that it multiplies by'),
        ('squared_discount', False, 'uses _gamma otherwise than as a factor'),
        ('conditioned_on_discount', False, 'uses gamma otherwise than as a factor'),
        ('fixed_discount', False, '_gamma cannot be set'),
        ('noise_of_its_own', False, 'not the same at the same variables'),
        ('dropout_without_weights', True, 'ignores weights'),
        ('mean_of_weights', True, 'ignores weights'),
        ('on_several_devices', False, 'belongs to a tf.distribute strategy'),
        ('half_precision', False, 'kernel:0 is float16'),
        ('column_of_errors', True, 'no td_error'),
    ],
)
def test_an_agent_that_cannot_be_trained_here_is_refused_with_the_reason(factory, weighted, named):
    with pytest.raises(ForeignAgentError, match=named):
        model(factory, weighted)


@pytest.mark.parametrize(
    ('factory', 'named'), [('eager_only', 'in a graph'), ('not_finite', 'not finite')]
)
def test_an_agent_that_only_workers_would_stumble_on_is_refused_before(factory, named):
    values = {'agent': f'tests.support.foreign_agents:{factory}', 'priority_exponent': 0.0}
    with pytest.raises(ForeignAgentError, match=named):
        builders.try_agent(presets.experiment('laptop', values))


def test_a_good_agent_passes_the_trial():
    for factory, exponent in (('stock_dqn', 0.6), ('stock_c51', 0.0)):
        values = {'agent': f'tests.support.foreign_agents:{factory}', 'priority_exponent': exponent}
        config = presets.experiment('laptop', values)
        builders.try_agent(config)
        assert builders.build_learner(config).model.precision is None  # unknown


def test_a_module_that_cannot_be_imported_is_named():
    values = {'agent': 'no_such_module:make'}
    with pytest.raises(ForeignAgentError, match='cannot import no_such_module'):
        builders.try_agent(presets.experiment('laptop', values))
