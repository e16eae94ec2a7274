"""TF-Agents' ParallelPyEnvironment: two games, each in a process of its own, as one batch.

python tests/examples/play_in_processes.py
"""

import functools

from tf_agents.drivers import py_driver
from tf_agents.environments import parallel_py_environment
from tf_agents.metrics import py_metrics
from tf_agents.policies import random_py_policy
from tf_agents.system import system_multiprocessing as multiprocessing

from agents.config import EnvironmentConfig
from agents.py_environment import SingleAtariPyEnvironment

GAMES = 2
STEPS = 400  # agent steps of both games together; the last batch may go one beyond


def main(_: list[str]) -> None:
    """Acts at random for STEPS steps."""
    config = EnvironmentConfig('breakout')
    # The environment is made where it plays; what travels there is this constructor. Each game has
    # its own seed, or both would start alike.
    constructors = [functools.partial(SingleAtariPyEnvironment, config, i) for i in range(GAMES)]
    with parallel_py_environment.ParallelPyEnvironment(constructors) as games:
        policy = random_py_policy.RandomPyPolicy(
            games.time_step_spec(), games.action_spec(), seed=0
        )
        steps, episodes = py_metrics.EnvironmentSteps(), py_metrics.NumberOfEpisodes()
        driver = py_driver.PyDriver(games, policy, [steps, episodes], max_steps=STEPS)
        driver.run(games.reset())
    print(f'{steps.result()} steps, {episodes.result()} episodes')


if __name__ == '__main__':
    # TF-Agents starts no process unless its main function is called this way.
    multiprocessing.handle_main(main)
