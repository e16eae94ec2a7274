"""A TF-Agents actor that follows the parameter server of a run.

    python tests/examples/follow_a_run.py RUN_DIR      # a run of pipelines/run.py, going on

The variable container has the interface of TF-Agents' ReverbVariableContainer, so actors written
for that need no other change.
"""

import json
import pathlib
import sys

import tensorflow as tf
from tf_agents.drivers import py_driver
from tf_agents.policies import py_tf_eager_policy

from agents.adapters.parameters import (
    POLICY_KEY,
    TRAIN_STEP_KEY,
    ParameterServerVariableContainer,
)
from agents.py_environment import AtariPyEnvironment
from pipelines.experiment import builders
from pipelines.experiment import config as config_lib

STEPS, GAMES = 400, 2


def addresses(run_dir: pathlib.Path) -> list[str]:
    """Where the parameter shards of a run on this machine listen."""
    servers = run_dir / 'servers'
    shards = json.loads((servers / 'parameter_server.json').read_text())['num_parameter_shards']
    files = [servers / f'parameter_server_{shard}.ready' for shard in range(shards)]
    return [f'127.0.0.1:{json.loads(file.read_text())["port"]}' for file in files]


def main(run_dir: pathlib.Path) -> None:
    """Plays STEPS agent steps with the run's parameters of now and prints what that brought."""
    experiment = config_lib.load(run_dir / 'config.json')
    ours = builders.build_model(experiment).agent
    train_step = tf.Variable(0, dtype=tf.int64)
    variables = {POLICY_KEY: ours.policy.variables(), TRAIN_STEP_KEY: train_step}
    container = ParameterServerVariableContainer(addresses(run_dir))
    container.update(variables)
    container.close()
    rewards: list[float] = []
    with AtariPyEnvironment(experiment.environment, GAMES, seed=0, training=False) as games:
        policy = py_tf_eager_policy.PyTFEagerPolicy(ours.collect_policy, batch_time_steps=False)
        observers = [lambda step: rewards.append(float(sum(step.reward)))]
        py_driver.PyDriver(games, policy, observers, max_steps=STEPS).run(games.reset())
    print(f'{train_step.numpy()} updates, {sum(rewards):g} points in {STEPS} steps')


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]))
