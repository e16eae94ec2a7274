"""Snapshots of a run's parameters, and the best of them.

In: `servers/parameters-<n>` and `checkpoints/checkpoint-<n>/parameters`, which the launcher writes
and prunes. Out: a private copy by hard links, and `best/` with `parameters/` and `evaluation.json`.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

from infra.disk import Generations, read_json, replaced_directory, sync, write_json
from infra.parameter_server import checkpoint
from infra.parameter_server.checkpoint import Checkpoint, DamagedCheckpointError
from pipelines.errors import UsageError
from pipelines.events import finite
from pipelines.experiment import config as config_lib
from pipelines.storage.checkpoints import PARAMETERS
from pipelines.storage.evaluations import EVALUATION_FILE
from pipelines.storage.run_directory import SERVERS, RunDirectory

WORK = SERVERS / 'evaluator'
"""The evaluator's own files, below the run directory."""
ALIVE_FILE = 'alive'
"""Touched every few seconds by an evaluator that does not hang; in `WORK`."""
_RULES = ('protocol', 'epsilon', 'max_frames')


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The parameters of a run at one moment.

    Attributes:
      path: directory that holds their files until the next snapshot.
      checkpoint: their content.
      time: when they were saved, seconds since 1970.
    """

    path: pathlib.Path
    checkpoint: Checkpoint
    time: float


class Snapshots:
    """Takes snapshots of an active run, whose launcher may prune any directory at any moment."""

    def __init__(self, directory: RunDirectory, since: float):
        """`since`: ignores what was saved before, seconds since 1970.

        A resumed run finds parameters that were saved after its checkpoint; it has lost them.
        """
        self._directory, self._since = directory, since
        self._own = directory.path / WORK / PARAMETERS
        self._unfit: set[_Saved] = set()

    def take(self, least_updates: int) -> Snapshot | None:
        """Reads the newest parameters; None if none of `least_updates` or more is readable.

        Skips directories that are damaged or vanish while they are read.

        Args:
          least_updates: at least that of the call before.

        Raises:
          OSError: the evaluator's own directory is not writable.
        """
        for saved in self._candidates(least_updates):
            shutil.rmtree(self._own, ignore_errors=True)
            try:
                _link(saved.path, self._own)
                read = checkpoint.read_checkpoint(str(self._own))
                return Snapshot(self._own, read, saved.time_ns / 1e9)
            except (DamagedCheckpointError, FileNotFoundError):
                self._unfit.add(saved)
        return None

    def _candidates(self, least_updates: int) -> list['_Saved']:
        """What has enough updates, newest first."""
        found = []
        for path in self._paths():
            with contextlib.suppress(DamagedCheckpointError, OSError):  # incomplete, or pruned
                saved = _Saved(path, (path / checkpoint.MANIFEST).stat().st_mtime_ns)
                if saved in self._unfit:
                    continue
                updates = checkpoint.read_clock(str(path))['updates']
                if saved.time_ns / 1e9 >= self._since and updates >= least_updates:
                    found.append((updates, saved.time_ns, saved))
                else:
                    self._unfit.add(saved)
        return [saved for *_, saved in sorted(found, key=lambda entry: entry[:2], reverse=True)]

    def _paths(self) -> Iterator[pathlib.Path]:
        """All parameters that the launcher has saved and not pruned."""
        with contextlib.suppress(OSError):
            yield from Generations(self._directory.path / SERVERS, PARAMETERS).paths()
        with contextlib.suppress(UsageError, OSError):
            yield from (path / PARAMETERS for path in self._directory.latest_checkpoints())


@dataclasses.dataclass(frozen=True)
class _Saved:
    """A directory of parameters, and when it was completed; a number may be used again."""

    path: pathlib.Path
    time_ns: int


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    """Makes `target` a copy of the files of a directory, by hard links where possible."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without hard links
            shutil.copy2(file, target / file.name)


def evaluation_row(
    clock: Mapping[str, int], action_repeat: int, result: Mapping[str, Any]
) -> dict[str, Any]:
    """What `evaluations.jsonl` and `best/` have in common about an evaluation.

    Args:
      clock: of the checkpoint that played: its `agent_steps` and `updates`.
      action_repeat: emulator frames of an agent step.
      result: scores and rules.
    """
    return {
        'time': round(time.time(), 3),
        'frames': clock['agent_steps'] * action_repeat,
        'updates': clock['updates'],
        **{name: result[name] for name in ('episodes', 'mean', 'std', 'returns', *_RULES)},
    }


def is_best(evaluation: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
    """Whether an evaluation is at least as good as the best so far; of equal ones the newer counts.

    So it does for the same parameters. Scores by other rules do not compare: after a resume with
    other rules the best starts anew.
    """
    if best is None or any(evaluation[name] != best.get(name) for name in _RULES):
        return True
    same = evaluation['updates'] == best.get('updates')
    return same or bool(evaluation['mean'] >= best['mean'])


def keep_best(
    directory: RunDirectory, parameters: pathlib.Path, evaluation: Mapping[str, Any]
) -> None:
    """Replaces `best/` by the files in `parameters` and their evaluation.

    Raises:
      OSError: the directory is not writable.
    """
    with replaced_directory(directory.best) as staging:
        _link(parameters, staging / PARAMETERS)
        write_json(staging / EVALUATION_FILE, evaluation)
        sync(staging / PARAMETERS)


def keep_checkpoint_if_best(directory: RunDirectory, result: Mapping[str, Any]) -> None:
    """Replaces `best/` by the checkpoint of an evaluation after training, if it `is_best`.

    Does nothing if games of it failed, or the checkpoint has been pruned.

    Args:
      directory: of the run.
      result: as in `evaluation.json`.

    Raises:
      OSError: the directory is not writable.
      DamagedCheckpointError: the checkpoint is damaged.
      UsageError: the configuration is not readable.
    """
    parameters = directory.checkpoints / result['policy']['checkpoint'] / PARAMETERS
    if result['failed'] or not parameters.is_dir():
        return
    clock = checkpoint.read_clock(str(parameters))
    action_repeat = config_lib.load(directory.config_file).environment.action_repeat
    row = evaluation_row(clock, action_repeat, result)
    if is_best(row, read_best(directory)):
        keep_best(directory, parameters, row | {'best': True})


def read_best(directory: RunDirectory) -> dict[str, Any] | None:
    """The evaluation of `best/`, None if there is none or a file of it is damaged."""
    try:
        checkpoint.validate(str(directory.best / PARAMETERS))
    except DamagedCheckpointError:
        return None
    best = read_json(directory.best / EVALUATION_FILE) or {}
    return best if finite(best.get('mean')) is not None else None
