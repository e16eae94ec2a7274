"""Export: a checkpoint's parameters in, a TF-Agents SavedModel policy out.

Runs at the end of training, or as a command:
  .venv/bin/python pipelines/export.py --run_dir runs/my-run
"""

import argparse
import contextlib
import logging
import pathlib
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence

if __name__ == '__main__':  # this checkout's packages, whatever PYTHONPATH and the environment hold
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: imports would print a traceback
    sys.path[: not sys.flags.safe_path] = [str(pathlib.Path(__file__).resolve().parents[1])]

from infra.disk import replaced_directory
from infra.flags import Parser, nonempty_path
from infra.output import protect_output
from infra.parameter_server.checkpoint import Checkpoint
from infra.process import exit_with_launcher
from pipelines.errors import UsageError, one_line_errors, system_reason
from pipelines.experiment import config as config_lib
from pipelines.launch.interrupts import stoppable
from pipelines.storage import saved_policies
from pipelines.storage.checkpoints import read_parameters
from pipelines.storage.outputs import writable
from pipelines.storage.reading import CHECKPOINT_FLAG, readable
from pipelines.storage.run_directory import BEST, RunDirectory, loading_hint
from pipelines.storage.space import temporary_files


def export(config: config_lib.ExperimentConfig, saved: Checkpoint, output: pathlib.Path) -> None:
    """Writes the greedy policy of `saved` as a SavedModel; replaces `output` when complete."""
    import tensorflow as tf
    from tf_agents.policies import policy_saver

    from pipelines.experiment.builders import build_policy

    policy = build_policy(config)
    policy.set_parameters(saved.average)
    train_step = tf.Variable(saved.clock['updates'], dtype=tf.int64)
    with replaced_directory(output) as staging, _quiet_saving():
        saver = policy_saver.PolicySaver(policy.model.agent.policy, train_step=train_step)
        saver.save(str(staging))
        saved_policies.describe(staging, config.environment)


@contextlib.contextmanager
def _quiet_saving() -> Iterator[None]:
    """Hides warnings that TensorFlow prints for every TF-Agents policy."""
    logger = logging.getLogger('absl')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='Encoding a StructuredValue')
            yield
    finally:
        logger.setLevel(level)


@one_line_errors('export.py', OSError)
@stoppable('export.py', 'No policy is written.')
def main(argv: Sequence[str]) -> int:
    """Exports a checkpoint of a run; returns the exit code."""
    arguments = _parse(argv)
    exit_with_launcher()
    which = arguments.checkpoint
    name = 'policy_best' if which == BEST else 'policy'
    target = arguments.output or f'{arguments.run_dir}/{name}'
    outputs = () if arguments.output else (name,)
    with temporary_files(), readable(arguments.run_dir, outputs, which) as path:
        directory = RunDirectory.existing(path)
        own = directory.best_policy if which == BEST else directory.policy
        output = _output(arguments.output) if arguments.output else writable(str(own))
        updates = _export_checkpoint(directory, which, output)
    print(f'{target}: policy after {updates} updates')
    if hint := loading_hint(output):
        print(hint)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog='export.py', description="Write a run's parameters as a TF-Agents policy.")
    parser.add_argument(
        '--run_dir', type=nonempty_path, required=True, help='Run directory, local or gs://...'
    )
    parser.add_argument('--checkpoint', **CHECKPOINT_FLAG)
    parser.add_argument(
        '--output',
        type=nonempty_path,
        help='Directory for the policy. Default: policy/ in --run_dir, policy_best/ for the best.',
    )
    return parser.parse_args(argv)


def _output(path: str) -> pathlib.Path:
    """The directory of `--output`.

    Raises:
      UsageError: see `writable`; or it is not empty and not a policy.
      OSError: it is not readable.
    """
    output = writable(path)
    empty = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not (empty or (output / saved_policies.MODEL).is_file()):  # others have a policy.json, too
        raise UsageError(f'--output {path}: not a policy. Fix: name a new directory or a policy.')
    return output


def _export_checkpoint(directory: RunDirectory, which: str, output: pathlib.Path) -> int:
    """Exports `which` to `output`; returns the number of updates behind the policy.

    Raises:
      UsageError: the configuration or the checkpoint is not readable, or `output` not writable.
    """
    config = config_lib.load(directory.config_file)
    _, saved = read_parameters(
        directory, which, lambda text: print(f'export.py: {text}', file=sys.stderr)
    )
    import tensorflow as tf

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        export(config, saved, output)
    except (ValueError, OSError, tf.errors.OpError) as error:
        reason = system_reason(error) or (str(error) or repr(error)).splitlines()[0]
        raise UsageError(
            f'{output}: not exported ({reason}). Fix: if it is not writable, name another --output.'
        ) from error
    return saved.clock['updates']


if __name__ == '__main__':
    protect_output()
    sys.exit(main(sys.argv[1:]))
