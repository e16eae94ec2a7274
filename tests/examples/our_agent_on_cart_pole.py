"""This project's agent and network in TF-Agents' own loop, on an environment of their suite_gym.

    python tests/examples/our_agent_on_cart_pole.py

Specs are all that an agent needs: vectors get dense layers, pictures get convolutions.
"""

import tensorflow as tf
from tf_agents.drivers import py_driver
from tf_agents.environments import batched_py_environment, suite_gym
from tf_agents.metrics import py_metrics
from tf_agents.policies import py_tf_eager_policy
from tf_agents.replay_buffers import py_uniform_replay_buffer
from tf_agents.specs import tensor_spec

from agents import dqn, networks
from agents.config import NetworkConfig
from agents.heads import ValueHead

STEPS, UPDATES, BATCH, N_STEP = 500, 50, 32, 2


def make_agent(environment: batched_py_environment.BatchedPyEnvironment) -> dqn.DqnAgent:
    """A dueling double DQN over two dense layers."""
    time_step_spec = tensor_spec.from_spec(environment.time_step_spec())
    action_spec = tensor_spec.from_spec(environment.action_spec())
    network = networks.q_network(
        time_step_spec.observation, action_spec, NetworkConfig(dense_layers='64,64', dueling=True)
    )
    return dqn.DqnAgent(
        time_step_spec,
        action_spec,
        network,
        tf.keras.optimizers.legacy.Adam(1e-3),
        ValueHead(),
        double_dqn=True,
        n_step_update=N_STEP,
        gamma=0.99,
        target_update_period=10,
        epsilon_greedy=0.5,
    )


def main() -> None:
    """Collects STEPS agent steps, trains for UPDATES, and prints what that brought."""
    tf.random.set_seed(0)
    environment = batched_py_environment.BatchedPyEnvironment([suite_gym.load('CartPole-v1')])
    agent = make_agent(environment)
    replay = py_uniform_replay_buffer.PyUniformReplayBuffer(
        tensor_spec.to_nest_array_spec(agent.collect_data_spec), capacity=STEPS
    )
    policy = py_tf_eager_policy.PyTFEagerPolicy(
        agent.collect_policy, use_tf_function=True, batch_time_steps=False
    )
    episodes = py_metrics.NumberOfEpisodes()
    driver = py_driver.PyDriver(environment, policy, [replay.add_batch, episodes], max_steps=STEPS)
    driver.run(environment.reset())
    batches = iter(replay.as_dataset(sample_batch_size=BATCH, num_steps=N_STEP + 1))
    train = tf.function(agent.train)
    losses = [float(train(next(batches)).loss) for _ in range(UPDATES)]
    print(f'{episodes.result()} episodes, loss {losses[0]:.3f} to {losses[-1]:.3f}')


if __name__ == '__main__':
    main()
