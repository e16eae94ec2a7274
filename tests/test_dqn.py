"""DQN: the loss equals a formula and TF-Agents' own, gamma counts once, flat vectors keep order."""

import mmap
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.agents.dqn import dqn_agent
from tf_agents.trajectories import trajectory

from agents import config, dqn, py_environment
from agents.config import AgentConfig, EnvironmentConfig, NetworkConfig
from infra.replay.trajectory import Transition

_BATCH, _NUM_ACTIONS = 6, 3
_NETWORK = NetworkConfig('dqn2013')
_ENVIRONMENT = EnvironmentConfig()


def _agent(seed: int = 0, **values: Any) -> dqn.DqnAgent:
    settings = AgentConfig(**values)
    specs = (py_environment.time_step_spec(_ENVIRONMENT), py_environment.action_spec(_NUM_ACTIONS))
    return dqn.make_agent(settings, _NETWORK, *specs, seed=seed)


def _learner(clip_norm: float = 0.0, **values: Any) -> dqn.DqnLearner:
    """A learner whose target differs from its network, and whose values spread over some units."""
    agent = _agent(**values)
    learner = dqn.DqnLearner(agent, clip_norm)
    learner.set_parameters(3 * learner.parameters())
    other = _agent(seed=1).q_network.trainable_variables
    learner.set_target(3 * dqn.FlatVariables(other).values())
    return learner


def _frames(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(*shape, 84, 84, 4), dtype=np.uint8)


def _transition(batch_size: int = _BATCH, gamma_n: float = 0.9) -> Transition:
    """Rewards on both sides of the Huber loss's corner; the last row is terminal."""
    random = np.random.default_rng(2)
    discount = np.full(batch_size, gamma_n, np.float32)
    discount[-1] = 0.0
    return Transition(
        observation=tf.constant(_frames(3, batch_size)),
        action=tf.constant(random.integers(_NUM_ACTIONS, size=batch_size), tf.int32),
        reward=tf.constant(random.normal(scale=2, size=batch_size), tf.float32),
        discount=tf.constant(discount),
        next_observation=tf.constant(_frames(4, batch_size)),
    )


def _expected_error(agent: dqn.DqnAgent, transition: Transition, double: bool) -> np.ndarray:
    """reward + discount * target(next, a*) - q(observation, action), row by row."""
    q_values, next_online = (
        agent.q_network(frames)[0].numpy()
        for frames in (transition.observation, transition.next_observation)
    )
    next_target = agent.target_q_network(transition.next_observation)[0].numpy()
    errors = []
    for row in range(len(q_values)):
        best = (next_online if double else next_target)[row].argmax()
        target = transition.reward[row] + transition.discount[row] * next_target[row, best]
        errors.append(target - q_values[row, transition.action[row]])
    return np.array(errors)


def _aligned(values: np.ndarray) -> np.ndarray:
    """A copy on a page of its own: memory that TensorFlow takes over without a copy."""
    copy = np.frombuffer(mmap.mmap(-1, values.nbytes), values.dtype)
    np.copyto(copy, values)
    return copy


class TestLoss:
    @pytest.mark.parametrize('double', [False, True])
    @pytest.mark.parametrize('loss', ['huber', 'squared'])
    def test_loss_and_errors_equal_the_formula(self, loss, double):
        learner, transition = _learner(loss=loss, double_dqn=double), _transition()
        _, value, absolute_error = learner.gradient(transition)
        error = _expected_error(learner.agent, transition, double)
        size = np.abs(error)
        assert size.min() < 1 < size.max()  # both branches of the Huber loss
        rows = {'huber': np.where(size < 1, size**2 / 2, size - 0.5), 'squared': size**2}[loss]
        np.testing.assert_allclose(absolute_error, size, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(value, rows.mean(), rtol=1e-5)

    def test_double_dqn_takes_another_target_than_dqn_somewhere(self):
        errors = [
            _learner(double_dqn=double).gradient(_transition(32))[2] for double in (False, True)
        ]
        assert (errors[0] != errors[1]).any()

    @pytest.mark.parametrize('double', [False, True])
    def test_a_step_along_the_gradient_equals_stock_tf_agents_train(self, double):
        learner, transition = _learner(double_dqn=double), _transition()
        stock_class = dqn_agent.DdqnAgent if double else dqn_agent.DqnAgent
        ours = learner.agent
        stock = stock_class(
            ours.time_step_spec,
            ours.action_spec,
            ours.q_network.copy(name='stock'),
            tf.compat.v1.train.GradientDescentOptimizer(1.0),
            gamma=0.99,
            target_update_period=1000,
            train_step_counter=tf.Variable(0),
        )
        parameters = dqn.FlatVariables(stock._q_network.trainable_variables)
        parameters.assign(learner.parameters())
        target = dqn.FlatVariables(ours.target_q_network.trainable_variables).values()
        dqn.FlatVariables(stock._target_q_network.trainable_variables).assign(target)
        gradient, loss, _ = learner.gradient(transition)
        # TF-Agents multiplies the discount of a ready-made transition by gamma once more.
        theirs = transition._replace(discount=transition.discount / 0.99)
        stock_loss = stock.train(dqn.tf_agents_transition(theirs)).loss
        np.testing.assert_allclose(loss, stock_loss, rtol=1e-6)
        step = learner.parameters() - parameters.values()
        scale = np.abs(step).max()
        np.testing.assert_allclose(gradient / scale, step / scale, atol=1e-5)

    @pytest.mark.parametrize('n_step', [1, 3])
    def test_a_trajectory_gives_the_loss_of_our_transition_from_loss_and_from_train(self, n_step):
        learner = _learner(n_step=n_step, discount=0.9)
        random = np.random.default_rng(5)
        time = n_step + 1
        reward = random.normal(size=(_BATCH, time)).astype(np.float32)
        discount = np.ones((_BATCH, time), np.float32)
        discount[0, n_step - 1] = 0.0  # the first row ends with its last reward
        frames, action = _frames(6, _BATCH, time), random.integers(3, size=(_BATCH, time))
        steps = tf.ones([_BATCH, time], tf.int32)
        experience = trajectory.Trajectory(
            steps, tf.constant(frames), tf.constant(action, tf.int32), (), steps,
            tf.constant(reward), tf.constant(discount),
        )  # fmt: skip
        powers = 0.9 ** np.arange(n_step)
        transition = Transition(
            frames[:, 0],
            action[:, 0].astype(np.int32),
            (reward[:, :n_step] * powers).sum(axis=1).astype(np.float32),
            (0.9**n_step * discount[:, :n_step].prod(axis=1)).astype(np.float32),
            frames[:, -1],
        )
        _, loss, _ = learner.gradient(transition)
        np.testing.assert_allclose(learner.agent.loss(experience).loss, loss, rtol=1e-5)
        np.testing.assert_allclose(learner.agent.train(experience).loss, loss, rtol=1e-5)

    def test_every_loss_of_the_configuration_exists(self):
        assert set(dqn.LOSSES) == set(config.LOSSES)


class TestGradient:
    def test_it_lists_the_variables_in_their_order(self):
        learner, transition = _learner(), _transition()
        variables = learner.variables
        with tf.GradientTape() as tape:
            experience = dqn.tf_agents_transition(transition)
            loss = learner.agent.loss(experience, training=True, gamma=1.0).loss
        expected = [np.ravel(part) for part in tape.gradient(loss, variables)]
        gradient = learner.gradient(transition)[0]
        expected = np.concatenate(expected)
        assert gradient.dtype == np.float32
        np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())

    def test_it_is_clipped_to_the_global_norm(self):
        free = _learner().gradient(_transition())[0]
        norm = float(np.linalg.norm(free))
        clipped = _learner(clip_norm=norm / 4).gradient(_transition())[0]
        np.testing.assert_allclose(clipped, free / 4, rtol=1e-4, atol=1e-6 * norm)
        below = _learner(clip_norm=2 * norm).gradient(_transition())[0]
        np.testing.assert_array_equal(below, free)

    def test_a_zero_gradient_stays_zero_when_clipped(self):
        learner = _learner(clip_norm=1.0)
        learner.set_parameters(np.zeros_like(learner.parameters()))
        transition = _transition()._replace(
            reward=tf.zeros(_BATCH), discount=tf.zeros(_BATCH)
        )  # q = 0 = target
        assert not learner.gradient(transition)[0].any()

    def test_batches_of_any_size_are_taken(self):
        learner = _learner()
        for batch_size in (2, 5, 2):
            _, _, absolute_error = learner.gradient(_transition(batch_size))
            assert absolute_error.shape == (batch_size,)

    def test_the_target_network_has_no_gradient_and_is_left_alone(self):
        learner = _learner()
        target = dqn.FlatVariables(learner.agent.target_q_network.trainable_variables)
        before = target.values()
        learner.gradient(_transition())
        np.testing.assert_array_equal(target.values(), before)


class TestBadInput:
    def test_a_column_of_another_type_is_refused_and_named(self):
        transition = _transition()
        wrong = transition._replace(reward=np.asarray(transition.reward, np.float64))
        with pytest.raises(ValueError, match=r'argument 2: float64\[\d+\] given, float32'):
            _learner().gradient(wrong)


class TestFlatVariables:
    def test_what_was_assigned_stays_when_its_source_changes(self):
        # The parameter server's client lends memory that a shard writes again.
        learner = _learner()
        expected = np.arange(len(learner.parameters()), dtype=np.float32)
        sources = [_aligned(part) for part in np.split(expected, [1000])]
        learner.set_parameters(*sources)
        for source in sources:
            source[:] = -1.0
        np.testing.assert_array_equal(learner.parameters(), expected)

    def test_what_is_assigned_is_read_back_and_lies_in_the_variables_in_order(self):
        shapes: tuple[list[int], ...] = ([3], [4, 2], [], [2, 1, 5])
        variables = [tf.Variable(tf.zeros(shape)) for shape in shapes]
        flat = dqn.FlatVariables(variables)
        values = np.arange(22, dtype=np.float32)
        flat.assign(values)
        np.testing.assert_array_equal(flat.values(), values)
        np.testing.assert_array_equal(variables[1], values[3:11].reshape(4, 2))

    def test_variables_keep_their_values_when_the_vector_changes_later(self):
        flat = dqn.FlatVariables([tf.Variable(tf.zeros([64])), tf.Variable(tf.zeros([64]))])
        values = np.ones(128, np.float32)
        flat.assign(values)
        values[:] = 7.0
        np.testing.assert_array_equal(flat.values(), np.ones(128))

    def test_a_vector_of_another_size_is_refused(self):
        flat = dqn.FlatVariables([tf.Variable(tf.zeros([3]))])
        with pytest.raises((TypeError, ValueError)):
            flat.assign(np.zeros(4, np.float32))


class TestGreedyPolicy:
    def test_it_takes_the_best_action_of_the_parameters_set_last(self):
        learner = _learner()
        policy = dqn.GreedyPolicy(_agent(seed=9).q_network)
        policy.set_parameters(learner.parameters())
        observation = _frames(8, 16)
        action = policy.act(observation)
        expected = learner.agent.q_network(observation)[0].numpy().argmax(axis=1)
        assert action.dtype == np.int32
        np.testing.assert_array_equal(action, expected)

    def test_learner_and_policy_list_the_same_variables(self):
        policy, learner = dqn.GreedyPolicy(_agent().q_network), _learner()
        names, expected = (
            [(v.name, v.shape) for v in variables]
            for variables in (policy.variables, learner.variables)
        )
        assert names == expected
