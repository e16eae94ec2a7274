"""An unmodified TF-Agents loop over this project's replay and parameter server.

    python tests/examples/train_through_our_servers.py

Driver, agent and Learner are TF-Agents' own. The experience goes to two replay shards and comes
back as one replay buffer; the gradients go to two parameter shards, which hold the optimizer. Any
number of such programs may share the servers: they then train one network together.
"""

import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf
from tf_agents.agents.dqn import dqn_agent
from tf_agents.drivers import py_driver
from tf_agents.networks import q_network
from tf_agents.policies import py_tf_eager_policy
from tf_agents.specs import tensor_spec
from tf_agents.train import learner
from tf_agents.train.utils import train_utils

from agents.adapters.parameters import ParameterServerOptimizer
from agents.adapters.replay import ReplayObserver, ShardedReplayBuffer
from agents.config import EnvironmentConfig
from agents.py_environment import AtariPyEnvironment
from infra.cluster import Cluster, ClusterConfig
from infra.parameter_server.config import ParameterServerConfig
from infra.replay.config import ReplayConfig
from infra.replay.trajectory import TrajectorySpec

GAMES, STEPS, UPDATES, GAMMA = 4, 400, 50, 0.99
REPLAY = ReplayConfig(
    num_replay_shards=2, replay_capacity=10_000, min_replay_size=200, agent_steps_per_update=0.0
)
PARAMETERS = ParameterServerConfig(num_parameter_shards=2, optimizer='adam', learning_rate=1e-4)


def make_agent(environment: AtariPyEnvironment, optimizer: tf.Module) -> dqn_agent.DqnAgent:
    """A DQN agent as TF-Agents' tutorials build it."""
    action_spec = tensor_spec.from_spec(environment.action_spec())
    network = q_network.QNetwork(
        tensor_spec.from_spec(environment.observation_spec()),
        action_spec,
        preprocessing_layers=tf.keras.layers.Rescaling(1 / 255),
        conv_layer_params=[(16, 8, 4), (32, 4, 2)],
        fc_layer_params=(256,),
    )
    agent = dqn_agent.DqnAgent(
        tensor_spec.from_spec(environment.time_step_spec()),
        action_spec,
        network,
        optimizer,
        gamma=GAMMA,
        n_step_update=3,
        target_update_period=10,
        train_step_counter=train_utils.create_train_step(),
    )
    agent.initialize()
    return agent


def main(directory: Path) -> None:
    """Collects STEPS agent steps, trains for UPDATES, and prints what the servers say."""
    spec = TrajectorySpec(n_step=3)
    servers = ClusterConfig(directory, PARAMETERS, REPLAY, spec)
    with (
        Cluster(servers) as cluster,
        AtariPyEnvironment(EnvironmentConfig('pong'), GAMES, seed=0) as games,
    ):
        optimizer = ParameterServerOptimizer(cluster.parameter_addresses)
        agent = make_agent(games, optimizer)
        with ReplayObserver(cluster.replay_addresses, spec, GAMES) as observer:
            policy = py_tf_eager_policy.PyTFEagerPolicy(
                agent.collect_policy, batch_time_steps=False
            )
            driver = py_driver.PyDriver(games, policy, [observer], max_steps=STEPS)
            driver.run(games.reset())
            observer.flush()
        with ShardedReplayBuffer(cluster.replay_addresses, spec, GAMMA) as buffer:
            trainer = learner.Learner(
                str(directory / 'learner'),
                agent.train_step_counter,
                agent,
                lambda: buffer.as_dataset(sample_batch_size=32),
            )
            loss = trainer.run(iterations=UPDATES).loss.numpy()
        print(f'{buffer.num_frames()} transitions, {optimizer.updates} updates, loss {loss:.4f}')
        assert np.isfinite(loss)
        optimizer.close()


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
