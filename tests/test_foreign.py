"""Somebody else's agent: its loss, its variables and its policy in our learner and actor."""

import numpy as np
import pytest
import tensorflow as tf

from agents import foreign, py_environment
from agents.config import AgentConfig, EnvironmentConfig
from agents.flat_variables import FlatVariables
from agents.foreign import ForeignAgentError
from agents.gradient import AgentGradient
from agents.model import tf_agents_transition
from agents.policy import GreedyPolicy
from infra.replay.trajectory import Transition
from pipelines import agent, presets
from tests import dqn_agents

BATCH, GAMMA = 6, 0.9


def model(factory, weighted=False, seed=0, **values):
    return foreign.foreign_model(
        f'tests.foreign_agents:{factory}',
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
    gradient, loss, error = learner.gradient(transition)
    trained = theirs.train(their_form(transition))
    np.testing.assert_allclose(loss, trained.loss, rtol=1e-5)
    np.testing.assert_allclose(error, np.abs(trained.extra.td_error), rtol=1e-4, atol=1e-5)
    step = before - learner.parameters()
    scale = np.abs(step).max()
    np.testing.assert_allclose(gradient / scale, step / scale, atol=1e-5)


def test_an_agent_that_takes_trajectories_only_is_given_one():
    learner = AgentGradient(model('stock_c51'), gradient_clip_norm=0.0)
    transition = dqn_agents.transition(BATCH, GAMMA)
    _, loss, error = learner.gradient(transition)
    theirs = transition._replace(discount=transition.discount / np.float32(GAMMA))
    experience = foreign.two_step_trajectory(Transition(*map(tf.constant, theirs)))
    np.testing.assert_allclose(loss, learner.model.agent.train(experience).loss, rtol=1e-5)
    np.testing.assert_allclose(error, np.full(BATCH, loss))  # it tells no errors of the rows


def test_the_trained_variables_are_those_of_the_network_that_acts():
    found = model('stock_dqn')
    expected = found.agent._q_network.trainable_variables
    assert [v.name for v in found.variables] == [v.name for v in expected]
    assert {v.ref() for v in found.variables} == {v.ref() for v in expected}


def test_every_process_gets_the_same_variables_and_first_values():
    first, second = (GreedyPolicy(model('stock_dqn', seed=4)) for _ in range(2))
    np.testing.assert_array_equal(first.parameters(), second.parameters())
    other = GreedyPolicy(model('stock_dqn', seed=5))
    assert (first.parameters() != other.parameters()).any()


def test_its_policy_acts_on_the_parameters_set_last():
    learner = AgentGradient(model('stock_dqn'), gradient_clip_norm=0.0)
    policy = GreedyPolicy(model('stock_dqn', seed=1))
    policy.set_parameters(learner.parameters())
    observation = dqn_agents.frames(8, 16)
    values = learner.model.agent._q_network(observation)[0].numpy()
    np.testing.assert_array_equal(policy.act(observation), values.argmax(axis=1))


def test_its_target_is_set_by_its_own_initialize():
    learner = AgentGradient(model('stock_dqn'), gradient_clip_norm=0.0)
    online = learner.parameters()
    learner.set_target(online + 1)
    target = FlatVariables(learner.model.agent._target_q_network.trainable_variables)
    np.testing.assert_array_equal(target.values(), online + 1)
    np.testing.assert_array_equal(learner.parameters(), online)


def test_weights_are_taken_by_an_agent_that_looks_at_them():
    learner = AgentGradient(model('stock_dqn', weighted=True), 0.0, weighted=True)
    gradient, loss, error = learner.gradient(
        dqn_agents.transition(BATCH, GAMMA), np.zeros(BATCH, np.float32)
    )
    plain = model('stock_dqn', weighted=True)
    assert loss == AgentGradient(plain, 0.0).gradient(dqn_agents.transition(BATCH, GAMMA))[1]
    assert not gradient.any()
    assert error.all()


@pytest.mark.parametrize(
    ('factory', 'weighted', 'named'),
    [
        ('batch_normalised', False, 'moving_mean'),
        ('recurrent', False, 'recurrent state'),
        ('not_an_agent', False, 'returned a QNetwork, not a TFAgent'),
        ('without_a_loss', False, 'takes neither form of experience'),
        ('stock_c51', True, 'ignores weights'),
        ('no_such_function', False, 'has no function no_such_function'),
        ('raising', False, 'failed: RuntimeError: no licence'),
        ('exiting', False, 'failed: SystemExit'),
        ('of_other_actions', False, 'its actions are'),
        ('of_other_observations', False, 'its observations are'),
        ('unknown_discount', False, 'takes no gamma and the agent has no _gamma'),
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
    values = {'agent': f'tests.foreign_agents:{factory}', 'priority_exponent': 0.0}
    with pytest.raises(ForeignAgentError, match=named):
        agent.try_agent(presets.experiment('laptop', values))


def test_a_good_agent_passes_the_trial():
    for factory, exponent in (('stock_dqn', 0.6), ('stock_c51', 0.0)):
        values = {'agent': f'tests.foreign_agents:{factory}', 'priority_exponent': exponent}
        agent.try_agent(presets.experiment('laptop', values))


def test_a_module_that_cannot_be_imported_is_named():
    with pytest.raises(ForeignAgentError, match='cannot import no_such_module'):
        foreign.load_factory('no_such_module:make')
