"""The actor's half of an agent: the best action by the parameters set last."""

import numpy as np

from agents.model import family_model
from agents.policy import GreedyPolicy
from tests.support import dqn_agents


class TestGreedyPolicy:
    def test_it_takes_the_best_action_of_the_parameters_set_last(self):
        learner = dqn_agents.gradient()
        policy = GreedyPolicy(family_model(dqn_agents.make(seed=9)))
        policy.set_parameters(learner.parameters())
        observation = dqn_agents.frames(8, 16)
        action = policy.act(observation)
        expected = dqn_agents.agent_of(learner).q_network(observation)[0].numpy().argmax(axis=1)
        assert action.dtype == np.int32
        np.testing.assert_array_equal(action, expected)

    def test_learner_and_policy_list_the_same_variables(self):
        policy, learner = GreedyPolicy(family_model(dqn_agents.make())), dqn_agents.gradient()
        names, expected = (
            [(v.name, v.shape) for v in variables]
            for variables in (policy.variables, learner.variables)
        )
        assert names == expected
