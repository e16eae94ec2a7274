"""The evaluator of an active run: snapshots of its parameters in, scores and the best of them out.

The launcher (pipelines/launch/evaluator.py) starts it as `python -m pipelines.evaluator RUN_DIR`.
It plays a few games with each snapshot and pauses between their steps, so that its CPU time stays
within `--evaluator_cpu_share`. It writes `evaluations.jsonl`, `best/` and files of its own.
"""

import argparse
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from infra.disk import hold
from infra.flags import Parser, integer
from infra.output import protect_output
from infra.process import exit_with_launcher
from pipelines.errors import one_line_errors
from pipelines.evaluation import results
from pipelines.evaluation.allowance import Allowance, rate_of
from pipelines.evaluation.play import Act, CancelledError, Game, play
from pipelines.experiment import config as config_lib
from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.protocols import protocol
from pipelines.storage.run_directory import RunDirectory
from pipelines.storage.snapshots import (
    ALIVE_FILE,
    WORK,
    Snapshot,
    Snapshots,
    evaluation_row,
    is_best,
    keep_best,
    read_best,
)

_POLL_SECONDS = 5.0
_SLICE_SECONDS = 0.2
_ALIVE_SECONDS = 5.0
_STREAM = 5  # of seeds; games, actors' environments and exploration have others


def seed_of_games(seed: int) -> int:
    """The seed of the evaluations during training, the same for all of a run.

    Equal seeds make the scores of two snapshots comparable. It differs from the run's own, so that
    the final evaluation has games by which no snapshot was selected.
    """
    return int(np.random.SeedSequence([seed, _STREAM]).generate_state(1, np.uint64)[0])


class Pace:
    """Pauses this process while its CPU time exceeds the allowance; shows that it is alive."""

    def __init__(self, allowance: Allowance, alive_file: pathlib.Path):
        self._allowance, self._alive_file = allowance, alive_file
        self._alive_due = 0.0
        self.stopped = False  # set by a signal handler

    def keep(self) -> bool:
        """Pauses if needed; returns whether to stop."""
        self._show()
        if pause := self._allowance.pause_seconds():
            self.sleep(pause)
        return self.stopped

    def sleep(self, seconds: float) -> None:
        """Sleeps; ends early when the launcher requests the end."""
        until = time.monotonic() + seconds
        while not self.stopped and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _SLICE_SECONDS))
            self._show()

    def _show(self) -> None:
        if (now := time.monotonic()) >= self._alive_due:
            self._alive_file.touch()
            self._alive_due = now + _ALIVE_SECONDS


class Evaluator:
    """Plays games with the newest policy of an active run, again and again."""

    def __init__(
        self,
        directory: RunDirectory,
        config: ExperimentConfig,
        pace: Pace,
        since: float,
        origin: float,
        updates: int,
    ):
        """
        Args:
          directory: of the run.
          config: its experiment.
          pace: pauses the games.
          since: ignores what was saved before, seconds since 1970.
          origin: the moment at which the run's `wall_seconds` were 0, seconds since 1970.
          updates: of the last evaluation.
        """
        run = config.run
        self._directory, self._config, self._pace, self._origin = directory, config, pace, origin
        self._snapshots, self._updates = Snapshots(directory, since), updates
        values = {**run.evaluation_rules, 'episodes': run.evaluator_episodes}
        self._rules = protocol(run.evaluation_protocol, values)
        self._seed = seed_of_games(run.seed)
        self._best = read_best(directory)

    def run(self) -> None:
        """Evaluates until the launcher requests the end.

        Raises:
          OSError: the directory is not writable.
        """
        policy = self._policy()
        while not self._pace.keep():
            snapshot = self._snapshots.take(
                self._updates + self._config.run.evaluation_period_updates
            )
            if snapshot is None:
                self._pace.sleep(_POLL_SECONDS)
                continue
            policy.set_parameters(snapshot.checkpoint.average)
            try:
                self._record(snapshot, self._scores(lambda seen: int(policy.act(seen)[0])))
            except CancelledError:
                return

    def _policy(self) -> Any:
        from pipelines.experiment.builders import build_policy

        return build_policy(self._config)

    def _scores(self, act: Act) -> dict[str, Any]:
        """Raises CancelledError when the launcher requests the end."""
        environment, episodes = self._config.environment, range(self._rules.episodes)
        games = [Game(0, episode, self._seed, environment, self._rules) for episode in episodes]
        return results.combined([play(game, act, cancelled=self._pace.keep) for game in games])

    def _record(self, snapshot: Snapshot, scores: dict[str, Any]) -> None:
        """Writes a line of `evaluations.jsonl`, after `best/` if the score is the highest."""
        rules = self._rules
        result = {
            **scores,
            'protocol': rules.name,
            'epsilon': rules.epsilon,
            'max_frames': rules.max_frames,
        }
        action_repeat = self._config.environment.action_repeat
        row = evaluation_row(snapshot.checkpoint.clock, action_repeat, result)
        row['wall_seconds'] = round(max(0.0, snapshot.time - self._origin), 3)
        row['best'] = is_best(row, self._best)
        if row['best']:
            keep_best(self._directory, snapshot.path, row)
            self._best = row
        append_line(self._directory.evaluations_file, row)
        self._updates = row['updates']


def append_line(file: pathlib.Path, row: dict[str, Any]) -> None:
    """Appends a line of JSON to a file; completes a line that a kill has cut.

    Raises:
      OSError: the file is not writable.
    """
    line = (json.dumps(row) + '\n').encode()
    with file.open('a+b', buffering=0) as stream:
        if size := stream.seek(0, os.SEEK_END):
            stream.seek(size - 1)
            line = line if stream.read(1) == b'\n' else b'\n' + line
        stream.write(line)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog='evaluator', description='Evaluates an active run; see run.py.')
    parser.add_argument('run_dir', help='Directory of the run.')
    parser.add_argument('--since', type=float, default=0.0, help='Ignores what was saved before.')
    parser.add_argument('--origin', type=float, default=0.0, help='Start of the run, Unix time.')
    parser.add_argument('--updates', type=integer, default=0, help='Of the last evaluation.')
    parser.add_argument('--debt_seconds', type=float, default=0.0, help='CPU time to pay off.')
    return parser.parse_args(argv)


@one_line_errors('evaluator', OSError)
def main(argv: Sequence[str]) -> int:
    """Evaluates an active run until SIGTERM; returns the exit code."""
    arguments = _parse(argv)
    exit_with_launcher()
    directory = RunDirectory.existing(arguments.run_dir)
    config = config_lib.load(directory.config_file)
    work = directory.path / WORK
    with hold(work):
        allowance = Allowance(rate_of(config.run.evaluator_cpu_share), arguments.debt_seconds)
        pace = Pace(allowance, work / ALIVE_FILE)

        def stop(*_: Any) -> None:
            pace.stopped = True

        signal.signal(signal.SIGTERM, stop)
        Evaluator(
            directory, config, pace, arguments.since, arguments.origin, arguments.updates
        ).run()
    return 0


if __name__ == '__main__':
    protect_output()
    sys.exit(main(sys.argv[1:]))
