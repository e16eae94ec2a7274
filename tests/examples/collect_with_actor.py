"""TF-Agents' train.Actor plays one game and writes its transitions to Reverb, as a learner needs.

    python tests/examples/collect_with_actor.py

An Actor takes batches of games too. The game is a single one here because TF-Agents' Reverb
observers follow one episode at a time: their trajectories may have no batch dimension.
"""

import reverb
import tensorflow as tf
from tf_agents.policies import py_tf_eager_policy, random_tf_policy
from tf_agents.replay_buffers import reverb_utils
from tf_agents.specs import tensor_spec
from tf_agents.train import actor
from tf_agents.train.utils import train_utils

from agents.config import EnvironmentConfig
from agents.py_environment import SingleAtariPyEnvironment

TABLE, STEPS, RUNS = 'experience', 200, 3


def main() -> None:
    """Acts RUNS times for STEPS agent steps and prints what arrived."""
    tf.random.set_seed(0)
    server = reverb.Server([reverb.Table.queue(TABLE, max_size=10_000)])
    client = reverb.Client(f'localhost:{server.port}')
    with SingleAtariPyEnvironment(EnvironmentConfig('space_invaders'), seed=0) as game:
        policy = random_tf_policy.RandomTFPolicy(
            tensor_spec.from_spec(game.time_step_spec()), tensor_spec.from_spec(game.action_spec())
        )
        # Two steps make a transition; every step starts one.
        transitions = reverb_utils.ReverbAddTrajectoryObserver(client, TABLE, 2, stride_length=1)
        player = actor.Actor(
            game,
            # The policy is TensorFlow's and wants batches: this wrapper adds and removes them.
            py_tf_eager_policy.PyTFEagerPolicy(policy, use_tf_function=True),
            train_utils.create_train_step(),
            steps_per_run=STEPS,
            observers=[transitions],
            metrics=actor.collect_metrics(buffer_size=10),
        )
        for _ in range(RUNS):
            player.run()
        transitions.close()
    for metric in player.metrics:
        print(f'{metric.name} = {metric.result():g}')
    print(f'transitions = {client.server_info()[TABLE].current_size}')
    server.stop()


if __name__ == '__main__':
    main()
