"""Export: a checkpoint's parameters in, a TF-Agents SavedModel policy out.

Runs at the end of training and by itself:
  python pipelines/export.py --run_dir runs/my-run
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from infra.parameter_server.checkpoint import Checkpoint
from infra.process import exit_with_launcher
from pipelines import config as config_lib
from pipelines.checkpoints import read_newest
from pipelines.errors import UsageError
from pipelines.files import replaced_directory
from pipelines.run_directory import RunDirectory, readable


def export(config: config_lib.ExperimentConfig, saved: Checkpoint, output: pathlib.Path) -> None:
    """Writes the greedy policy of `saved` as a SavedModel into the directory `output`.

    What is there already is replaced when the new one is complete.
    """
    import tensorflow as tf
    from tf_agents.policies import policy_saver

    from pipelines.agent import build_policy

    policy = build_policy(config)
    policy.set_parameters(saved.parameters)
    train_step = tf.Variable(saved.clock['updates'], dtype=tf.int64)
    with replaced_directory(output) as staging:
        policy_saver.PolicySaver(policy.model.agent.policy, train_step=train_step).save(
            str(staging)
        )


def main(argv: Sequence[str]) -> int:
    """Exports the newest checkpoint of a run to its `policy/`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='export.py', description="Write a run's newest parameters as a TF-Agents policy."
    )
    parser.add_argument('--run_dir', required=True, help='directory of the run, or gs://...')
    arguments = parser.parse_args(argv)
    exit_with_launcher()
    try:
        with readable(arguments.run_dir, ('policy',)) as path:
            return _export_newest(RunDirectory.existing(path), arguments.run_dir)
    except UsageError as error:
        print(f'export.py: {error}', file=sys.stderr)
        return 2


def _export_newest(directory: RunDirectory, told: str) -> int:
    """Exports and says so of the run's directory, `told`; returns the exit code.

    Raises:
      UsageError: the configuration or the checkpoints cannot be read.
    """
    config = config_lib.load(directory.config_file)
    saved = read_newest(directory, lambda text: print(f'export.py: {text}', file=sys.stderr))
    import tensorflow as tf

    try:
        export(config, saved, directory.policy)
    except (ValueError, OSError, tf.errors.OpError) as error:
        reason = str(error).splitlines()[0]
        print(f'export.py: {told}: nothing exported: {reason}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('export.py: interrupted; policy/ stays as it was.', file=sys.stderr)
        return 130
    print(f'{told}/{directory.policy.name}: policy after {saved.clock["updates"]} updates')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
