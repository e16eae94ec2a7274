"""A trained policy of this project's, `policy/` of a run, in TF-Agents' own loader and driver.

python tests/examples/play_a_trained_policy.py runs/my-run
"""

import json
import pathlib
import sys

from tf_agents.drivers import py_driver
from tf_agents.policies import py_tf_eager_policy

from agents.config import EnvironmentConfig
from agents.py_environment import SingleAtariPyEnvironment

STEPS = 400


def main(run_dir: pathlib.Path) -> None:
    """Plays STEPS agent steps greedily and prints their points."""
    values = json.loads((run_dir / 'config.json').read_text())['environment']
    with SingleAtariPyEnvironment(EnvironmentConfig(**values), seed=0, training=False) as game:
        policy = py_tf_eager_policy.SavedModelPyTFEagerPolicy(
            str(run_dir / 'policy'), load_specs_from_pbtxt=True
        )
        rewards: list[float] = []
        observe = lambda step: rewards.append(float(step.reward))  # noqa: E731
        driver = py_driver.PyDriver(game, policy, [observe], max_steps=STEPS)
        driver.run(game.reset(), policy.get_initial_state())
    print(f'{policy.get_train_step()} updates, {sum(rewards):g} points in {STEPS} steps')


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]))
