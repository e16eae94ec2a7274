"""TF-Agents' PyDriver and one of its DQN agents on a batch of games: run it, it prints its metrics.

python tests/examples/drive_with_pydriver.py
"""

import tensorflow as tf
from tf_agents.agents.dqn import dqn_agent
from tf_agents.drivers import py_driver
from tf_agents.metrics import py_metrics
from tf_agents.networks import q_network
from tf_agents.policies import py_tf_eager_policy
from tf_agents.specs import tensor_spec

from agents.config import EnvironmentConfig
from agents.py_environment import AtariPyEnvironment

BATCH = 4
STEPS = 800  # agent steps of all games together; the last batch may go a few beyond


def make_agent(games: AtariPyEnvironment) -> dqn_agent.DqnAgent:
    """A DQN agent of TF-Agents itself, made from nothing but the environment's specs."""
    time_step_spec = tensor_spec.from_spec(games.time_step_spec())
    action_spec = tensor_spec.from_spec(games.action_spec())
    network = q_network.QNetwork(
        time_step_spec.observation,
        action_spec,
        # Observations are bytes, 0 to 255; a convolution takes floats.
        preprocessing_layers=tf.keras.layers.Rescaling(1 / 255),
        conv_layer_params=((16, 8, 4), (32, 4, 2)),
        fc_layer_params=(256,),
    )
    adam = tf.keras.optimizers.legacy.Adam(1e-4)
    return dqn_agent.DqnAgent(time_step_spec, action_spec, network, adam, epsilon_greedy=0.5)


def main() -> None:
    """Acts for STEPS steps."""
    tf.random.set_seed(0)
    with AtariPyEnvironment(EnvironmentConfig('breakout'), BATCH, seed=0) as games:
        policy = py_tf_eager_policy.PyTFEagerPolicy(
            make_agent(games).collect_policy,
            use_tf_function=True,
            batch_time_steps=False,  # they come in batches already
        )
        steps, episodes = py_metrics.EnvironmentSteps(), py_metrics.NumberOfEpisodes()
        driver = py_driver.PyDriver(games, policy, [steps, episodes], max_steps=STEPS)
        driver.run(games.reset(), policy.get_initial_state(BATCH))
    print(f'{steps.result()} steps, {episodes.result()} episodes')


if __name__ == '__main__':
    main()
