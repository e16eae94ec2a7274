"""This project's agent, a dueling double C51, in a loop of TF-Agents' own parts.

    python tests/examples/our_agent_in_a_tf_agents_loop.py

No server of this project runs: the replay is TF-Agents' ReverbReplayBuffer, the optimizer a local
one and the target network the agent's own.
"""

import tempfile

import reverb
import tensorflow as tf
from tf_agents.drivers import py_driver
from tf_agents.policies import py_tf_eager_policy
from tf_agents.replay_buffers import reverb_replay_buffer, reverb_utils
from tf_agents.specs import tensor_spec
from tf_agents.train import learner
from tf_agents.train.utils import train_utils

from agents import dqn, networks
from agents.adapters.replay import UnbatchingObserver
from agents.config import EnvironmentConfig, NetworkConfig
from agents.heads import CategoricalHead
from agents.py_environment import AtariPyEnvironment

GAMES, STEPS, UPDATES, N_STEP, TABLE = 2, 300, 20, 2, 'experience'


def make_agent(games: AtariPyEnvironment) -> dqn.DqnAgent:
    """Any head, any network of this project, any optimizer of TensorFlow's."""
    head = CategoricalHead(num_atoms=51, v_min=-10.0, v_max=10.0)
    time_step_spec = tensor_spec.from_spec(games.time_step_spec())
    action_spec = tensor_spec.from_spec(games.action_spec())
    network = networks.q_network(
        time_step_spec.observation,
        action_spec,
        NetworkConfig('dqn2013', dueling=True),
        output_shape=head.output_shape,
    )
    return dqn.DqnAgent(
        time_step_spec,
        action_spec,
        network,
        tf.keras.optimizers.legacy.Adam(1e-4),
        head,
        double_dqn=True,
        n_step_update=N_STEP,
        gamma=0.99,
        target_update_period=10,
        epsilon_greedy=0.5,
        train_step_counter=train_utils.create_train_step(),
    )


def main() -> None:
    """Collects STEPS agent steps, trains for UPDATES, and prints the loss."""
    with AtariPyEnvironment(EnvironmentConfig('breakout'), GAMES, seed=0) as games:
        agent = make_agent(games)
        table = reverb.Table(
            TABLE,
            reverb.selectors.Uniform(),
            reverb.selectors.Fifo(),
            max_size=10_000,
            rate_limiter=reverb.rate_limiters.MinSize(100),
            signature=tensor_spec.add_outer_dim(agent.collect_data_spec),
        )
        server = reverb.Server([table])
        address = f'localhost:{server.port}'
        client = reverb.Client(address)
        observer = UnbatchingObserver(
            lambda: reverb_utils.ReverbAddTrajectoryObserver(client, TABLE, N_STEP + 1), GAMES
        )
        policy = py_tf_eager_policy.PyTFEagerPolicy(agent.collect_policy, batch_time_steps=False)
        py_driver.PyDriver(games, policy, [observer], max_steps=STEPS).run(games.reset())
        observer.close()
    replay = reverb_replay_buffer.ReverbReplayBuffer(
        agent.collect_data_spec, TABLE, N_STEP + 1, address
    )
    with tempfile.TemporaryDirectory() as directory:
        trainer = learner.Learner(
            directory,
            agent.train_step_counter,
            agent,
            lambda: replay.as_dataset(sample_batch_size=32, num_steps=N_STEP + 1),
        )
        loss = trainer.run(iterations=UPDATES).loss.numpy()
    print(
        f'{replay.num_frames()} items, {agent.train_step_counter.numpy()} updates, loss {loss:.3f}'
    )
    server.stop()


if __name__ == '__main__':
    main()
