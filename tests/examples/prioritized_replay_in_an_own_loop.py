"""Prioritized replay over this project's shards, for an agent of TF-Agents in a loop of one's own.

    python tests/examples/prioritized_replay_in_an_own_loop.py

TF-Agents has no prioritized replay of its own, and its Learner hands no weights on: the loop gives
them to `agent.train`, and the errors back to the shard that each transition came from.
"""

import contextlib

import numpy as np
import tensorflow as tf
from tf_agents.agents.dqn import dqn_agent
from tf_agents.drivers import py_driver
from tf_agents.networks import q_network
from tf_agents.policies import py_tf_eager_policy
from tf_agents.specs import tensor_spec

from agents.adapters.replay import ReplayObserver, ShardedReplayBuffer
from agents.config import EnvironmentConfig
from agents.py_environment import AtariPyEnvironment
from infra.replay.config import ReplayConfig
from infra.replay.priorities import importance_weights
from infra.replay.server import ShardConfig, build_tables, start_server, stop_server
from infra.replay.trajectory import TrajectorySpec

GAMES, STEPS, UPDATES, GAMMA, BETA = 2, 300, 30, 0.99, 0.4
SPEC = TrajectorySpec(n_step=1)
REPLAY = ReplayConfig(
    num_replay_shards=2,
    replay_capacity=10_000,
    min_replay_size=100,
    agent_steps_per_update=0.0,
    priority_exponent=0.6,
)


def make_agent(games: AtariPyEnvironment) -> dqn_agent.DqnAgent:
    """A DQN agent of TF-Agents itself."""
    time_step_spec = tensor_spec.from_spec(games.time_step_spec())
    action_spec = tensor_spec.from_spec(games.action_spec())
    network = q_network.QNetwork(
        time_step_spec.observation,
        action_spec,
        preprocessing_layers=tf.keras.layers.Rescaling(1 / 255),
        conv_layer_params=((16, 8, 4), (32, 4, 2)),
        fc_layer_params=(256,),
    )
    adam = tf.keras.optimizers.legacy.Adam(1e-4)
    return dqn_agent.DqnAgent(time_step_spec, action_spec, network, adam, gamma=GAMMA)


def main() -> None:
    """Collects STEPS agent steps, trains for UPDATES, and prints what became of the priorities."""
    with contextlib.ExitStack() as stack:
        addresses = []
        for shard in range(REPLAY.num_replay_shards):
            server = start_server(build_tables(ShardConfig(REPLAY, SPEC, telemetry=False), shard))
            stack.callback(stop_server, server)
            addresses.append(f'127.0.0.1:{server.port}')
        games = stack.enter_context(AtariPyEnvironment(EnvironmentConfig('pong'), GAMES, seed=0))
        agent = make_agent(games)
        with ReplayObserver(addresses, SPEC, GAMES) as observer:
            policy = py_tf_eager_policy.PyTFEagerPolicy(
                agent.collect_policy, batch_time_steps=False
            )
            py_driver.PyDriver(games, policy, [observer], max_steps=STEPS).run(games.reset())
            observer.flush()
        buffer = stack.enter_context(ShardedReplayBuffer(addresses, SPEC, GAMMA))
        unlike = 0
        for experience, info in buffer.as_dataset(sample_batch_size=32).take(UPDATES):
            weights = importance_weights(info.probability.numpy(), info.shard.numpy(), BETA)
            trained = agent.train(experience, weights=weights)
            buffer.update_priorities(info, trained.extra.td_error)
            unlike += len(np.unique(weights)) > 1
        print(f'{buffer.num_frames()} transitions, {unlike} batches with unlike weights')


if __name__ == '__main__':
    main()
