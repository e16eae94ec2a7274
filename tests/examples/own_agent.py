"""An agent of one's own in this project's pipelines.

    PYTHONPATH=tests/examples .venv/bin/python pipelines/run.py --agent own_agent:munchausen

Munchausen DQN (Vieillard et al. 2020, equation 1; with n steps, the bonus of the first) as a
subclass of TF-Agents' DQN: the factory is all that is needed. Actors explore epsilon-greedily over
its `policy`, learners take gradients of its `loss`, and the parameter server has the optimizer, so
the one given here is never used.
"""

from typing import Any

import tensorflow as tf
from tf_agents.agents.dqn import dqn_agent
from tf_agents.networks import q_network

from agents.config import AgentConfig

ALPHA, TEMPERATURE, LEAST_LOG = 0.9, 0.03, -1.0  # Vieillard et al. 2020, section 4.1


class MunchausenDqnAgent(dqn_agent.DqnAgent):
    """Adds the scaled log-policy of the action taken to the reward, and bootstraps softly."""

    def _compute_next_q_values(self, next_time_steps: Any, info: Any) -> tf.Tensor:
        values, _ = self._target_q_network(
            next_time_steps.observation, step_type=next_time_steps.step_type
        )
        # sum_a pi(a) (q(a) - tau log pi(a)) is the soft maximum.
        return TEMPERATURE * tf.reduce_logsumexp(values / TEMPERATURE, axis=-1)

    def _loss(self, experience: Any, *args: Any, **kwargs: Any) -> Any:
        time_steps, policy_steps, next_time_steps = self._as_transition(experience)
        values, _ = self._target_q_network(time_steps.observation, step_type=time_steps.step_type)
        log_policy = tf.gather(
            tf.nn.log_softmax(values / TEMPERATURE), policy_steps.action, batch_dims=1
        )
        bonus = ALPHA * tf.clip_by_value(TEMPERATURE * log_policy, LEAST_LOG, 0.0)
        reward = next_time_steps.reward + tf.stop_gradient(bonus)
        experience = type(experience)(
            time_steps, policy_steps, next_time_steps._replace(reward=reward)
        )
        return super()._loss(experience, *args, **kwargs)


def munchausen(time_step_spec: Any, action_spec: Any, config: AgentConfig) -> MunchausenDqnAgent:
    """The factory: specs and configuration in, agent out."""
    network = q_network.QNetwork(
        time_step_spec.observation,
        action_spec,
        preprocessing_layers=tf.keras.layers.Rescaling(1 / 255),
        conv_layer_params=[(16, 8, 4), (32, 4, 2)],
        fc_layer_params=(256,),
    )
    return MunchausenDqnAgent(
        time_step_spec,
        action_spec,
        network,
        tf.keras.optimizers.legacy.SGD(0.0),
        n_step_update=config.n_step,
        gamma=config.discount,
    )
