"""Every member of the family equals a plain NumPy implementation: loss, errors and gradient."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.specs import array_spec
from tf_agents.trajectories import policy_step, trajectory
from tf_agents.trajectories import time_step as ts

from agents import dqn, py_environment
from agents.config import AGENTS, LOSSES, AgentConfig, NetworkConfig
from agents.flat_variables import FlatVariables
from agents.fractions import drawn
from agents.heads import LOSSES as LOSS_FUNCTIONS
from agents.heads import CategoricalHead, head_of
from agents.munchausen import Munchausen
from tests.support import numpy_dqn
from tests.support.numpy_dqn import Member

SIZE, ACTIONS, ROWS = 28, 3, 7
OBSERVATION = array_spec.BoundedArraySpec((SIZE, SIZE, 4), np.uint8, 0, 255)
MUNCHAUSEN = (0.3, 0.9, -0.5)  # temperature, scale, lowest; the values below spread over 0.5
MEMBERS = {
    'dqn': Member(),
    'dqn_squared': Member(loss='squared'),
    'double': Member(double=True),
    'dueling': Member(dueling=True),
    'double_dueling': Member(double=True, dueling=True),
    'c51': Member('c51', outputs=11, v_min=-2.0, v_max=3.0),
    'c51_double_dueling': Member('c51', True, True, outputs=11, v_min=-2.0, v_max=3.0),
    'iqn': Member('iqn', outputs=6),
    'iqn_double_dueling': Member('iqn', True, True, outputs=6),
    'munchausen_iqn': Member('iqn', outputs=6, munchausen=MUNCHAUSEN),
    'munchausen': Member(munchausen=MUNCHAUSEN),
    'munchausen_dueling_qr_dqn': Member('qr_dqn', dueling=True, outputs=9, munchausen=MUNCHAUSEN),
    'qr_dqn': Member('qr_dqn', outputs=9),
    'qr_dqn_double_dueling': Member('qr_dqn', True, True, outputs=9),
}


def make(member, seed):
    """The agent of a member, with values that spread over some units."""
    config = AgentConfig(
        agent=member.agent,
        double_dqn=member.double,
        loss=member.loss,
        num_atoms=max(member.outputs, 2),
        v_min=member.v_min,
        v_max=member.v_max,
        num_quantiles=member.outputs,
        num_acting_fractions=member.outputs,
        num_fractions=member.drawn,
        num_cosines=member.cosines,
        munchausen=bool(member.munchausen),
    )
    if member.munchausen:
        temperature, scale, lowest = member.munchausen
        config = dataclasses.replace(
            config,
            munchausen_temperature=temperature,
            munchausen_scale=scale,
            munchausen_lowest=lowest,
        )
    network = NetworkConfig('dqn2013', dueling=member.dueling)
    specs = ts.time_step_spec(OBSERVATION), py_environment.action_spec(ACTIONS)
    agent = dqn.make_agent(config, network, *specs, seed=seed)
    flat = FlatVariables(agent.q_network.trainable_variables)
    flat.assign(2 * flat.values())
    return agent


def random_rows():
    """Rewards on both sides of Huber's corner, ends, weights, and two rows that do not count."""
    rng = np.random.default_rng(1)
    frames = rng.integers(256, size=(2, ROWS, SIZE, SIZE, 4), dtype=np.uint8)
    return {
        'observation': frames[0],
        'action': rng.integers(ACTIONS, size=ROWS).astype(np.int32),
        'reward': rng.normal(size=ROWS).astype(np.float32),
        'discount': np.where(np.arange(ROWS) % 3 == 2, 0.0, 0.9).astype(np.float32),
        'next_observation': frames[1],
        'weight': rng.random(ROWS).astype(np.float32),
        'valid': np.arange(ROWS) % 4 != 3,
    }


def as_transition(rows):
    """In TF-Agents' type; a row that does not count begins with the LAST step of an episode."""
    step_type = np.where(rows['valid'], ts.StepType.MID, ts.StepType.LAST).astype(np.int32)
    nothing = np.zeros(ROWS, np.float32)
    return tf.nest.map_structure(
        tf.constant,
        trajectory.Transition(
            ts.TimeStep(step_type, nothing, nothing + 1, rows['observation']),
            policy_step.PolicyStep(rows['action'], (), ()),
            ts.TimeStep(
                step_type * 0 + ts.StepType.MID,
                rows['reward'],
                rows['discount'],
                rows['next_observation'],
            ),
        ),
    )


def doubles(variables):
    return [variable.numpy().astype(np.float64) for variable in variables]


@pytest.fixture(scope='module', params=MEMBERS)
def compared(request):
    """A member's loss, errors and gradient, and its NumPy twin's loss as a function."""
    member = MEMBERS[request.param]
    agent, other = make(member, 0), make(member, 1)
    target = FlatVariables(agent.target_q_network.trainable_variables)
    target.assign(FlatVariables(other.q_network.trainable_variables).values())
    rows = random_rows()
    variables = agent.q_network.trainable_variables
    with tf.GradientTape() as tape:
        info = agent.loss(
            as_transition(rows), weights=tf.constant(rows['weight']), training=True, gamma=1.0
        )
    gradient = [g.numpy().astype(np.float64) for g in tape.gradient(info.loss, variables)]
    observations = rows['observation'], rows['next_observation']
    for stream, observation in enumerate(observations):  # the drawing itself: test_fractions.py
        rows[f'fractions_{stream}'] = drawn(observation, member.drawn, stream).numpy()
    batch = list(zip(*(np.asarray(column).tolist() if column.ndim == 1 else column
                       for column in rows.values())))  # fmt: skip
    values, target_values = doubles(variables), doubles(agent.target_q_network.trainable_variables)

    def twin(moved=values):
        return numpy_dqn.loss_and_errors(moved, target_values, batch, member, ACTIONS)

    return member, info, gradient, values, twin


def test_loss_equals_the_formula(compared):
    _, info, _, _, twin = compared
    assert float(info.loss) == pytest.approx(twin()[0], rel=1e-5)


def test_errors_equal_the_formula(compared):
    _, info, _, _, twin = compared
    errors = twin()[1]
    np.testing.assert_allclose(info.extra.td_error, errors, rtol=1e-4, atol=2e-5)


def test_gradient_equals_the_slope_of_the_formula(compared):
    # Along a random direction in each variable: (L(v + h d) - L(v - h d)) / 2h in float64.
    _, _, gradient, values, twin = compared
    rng = np.random.default_rng(3)
    step = 1e-6
    scale = np.sqrt(sum((g**2).sum() for g in gradient))
    for index, part in enumerate(gradient):
        direction = rng.normal(size=part.shape)
        direction /= np.linalg.norm(direction)
        losses = []
        for sign in (1, -1):
            moved = [*values]
            moved[index] = values[index] + sign * step * direction
            losses.append(twin(moved)[0])
        slope = (losses[0] - losses[1]) / (2 * step)
        assert (part * direction).sum() == pytest.approx(slope, rel=1e-3, abs=1e-5 * scale), index


def test_rows_are_on_both_sides_of_every_branch():
    # The comparison above would prove little if all rows took the same way.
    rows = random_rows()
    assert set(rows['valid']) == {True, False}
    assert (rows['discount'] == 0).any()
    assert (rows['discount'] > 0).any()
    member = MEMBERS['dqn']
    agent = make(member, 0)
    errors = np.abs(agent.loss(as_transition(rows), gamma=1.0).extra.td_error.numpy())
    assert errors[rows['valid']].min() < 1 < errors.max()


def test_bonuses_are_on_both_sides_of_the_bound():
    rows = random_rows()
    values, _ = make(MEMBERS['munchausen'], 1).q_network(rows['observation'])  # the target
    bonus = Munchausen(*MUNCHAUSEN).bonus(values, tf.constant(rows['action'])).numpy()
    assert np.isclose(bonus[rows['valid']], 0.9 * -0.5).any()
    assert (bonus[rows['valid']] > 0.9 * -0.5 + 0.1).any()


def test_double_dqn_takes_another_target_than_dqn_somewhere():
    errors = []
    for name in ('dqn', 'double'):
        agent = make(MEMBERS[name], 0)
        target = FlatVariables(agent.target_q_network.trainable_variables)
        target.assign(FlatVariables(make(MEMBERS[name], 1).q_network.trainable_variables).values())
        errors.append(agent.loss(as_transition(random_rows()), gamma=1.0).extra.td_error.numpy())
    assert (errors[0] != errors[1]).any()


class TestCategoricalHead:
    def test_a_projection_onto_an_atom_keeps_its_probability(self):
        # reward 1 moves every atom of spacing 1 by one place; the last two meet at v_max.
        head = CategoricalHead(num_atoms=4, v_min=0.0, v_max=3.0)
        probability = np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)
        projected = head.projected(np.log(probability), tf.ones(1), tf.ones(1))
        np.testing.assert_allclose(projected, [[0.0, 0.1, 0.2, 0.7]], atol=1e-6)

    def test_an_end_puts_all_probability_at_the_reward(self):
        head = CategoricalHead(num_atoms=3, v_min=-1.0, v_max=1.0)
        projected = head.projected(tf.zeros([1, 3]), tf.constant([0.25]), tf.zeros(1))
        np.testing.assert_allclose(projected, [[0.0, 0.75, 0.25]], atol=1e-6)


def test_every_agent_and_loss_of_the_configuration_exists():
    assert set(LOSS_FUNCTIONS) == set(LOSSES)
    for name in AGENTS:
        assert head_of(dataclasses.replace(AgentConfig(), agent=name)).output_shape is not None


def test_an_agent_that_is_none_of_the_family_is_named():
    with pytest.raises(ValueError, match=r"'module:factory': must be one of dqn, c51, qr_dqn, iqn"):
        head_of(AgentConfig(agent='module:factory'))
