"""Checkpoints of a whole run: parameters, optimizer, target, replay and counters, together.

In: running servers. Out: `checkpoints/checkpoint-<n>/` with `parameters/`, `replay/shard-<i>/` and
`run.json`, published when complete; between them `servers/parameters-<n>/`, parameters alone; and
the state from which each server starts or restarts.
"""

import dataclasses
import logging
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infra.cluster import PARAMETER_SERVER
from infra.disk import Generations, differences, digests, remove, set_aside, write_json
from infra.parameter_server import checkpoint as parameter_checkpoint
from infra.parameter_server.checkpoint import DamagedCheckpointError
from infra.parameter_server.client import ParameterClient
from infra.replay import server as replay_server
from infra.sealed import parse_object, seal, unseal
from pipelines.errors import UsageError
from pipelines.experiment.config import ExperimentConfig
from pipelines.storage.run_directory import (
    BEST,
    CHECKPOINT_RUN_FILE,
    SERVERS,
    RunDirectory,
    no_checkpoint,
)

_KEEP = 2
PARAMETERS = 'parameters'
"""Directory of the parameters in a checkpoint; begins the name of those saved alone."""
_REPLAY = 'replay'
_REPLAY_FILES = 'replay_files'  # in run.json: [bytes, CRC-32] by path below `replay/`
_COUNTS = {'agent_steps', 'submissions'}  # in run.json; the first versions have none
_SAVE_SECONDS = 120.0
_SAVE_SECONDS_PER_TRANSITION = 1.5e-4  # 3 kB each, at 20 MB/s


class Checkpoints:
    """Writes a run's checkpoints and selects the one that its servers start from.

    `restore` may be called from another thread than the other methods.

    Attributes:
      with_replay: whether checkpoints include the replay.
      newest: name and counters of the newest checkpoint; None before the first.
    """

    def __init__(
        self, directory: RunDirectory, config: ExperimentConfig, replay_is_ours: bool = True
    ):
        """`replay_is_ours`: False for attached servers, which are neither saved nor restored."""
        self._directory = directory
        self.with_replay = replay_is_ours and config.run.checkpoint_replay
        transitions = config.replay.replay_capacity
        self._save_seconds = _SAVE_SECONDS + transitions * _SAVE_SECONDS_PER_TRANSITION
        self.newest: tuple[str, Mapping[str, Any]] | None = None
        self._newest: pathlib.Path | None = None  # with the replay
        # Of this run since it was started or resumed, newest first; the oldest may be removed.
        self._parameters: tuple[pathlib.Path, ...] = ()

    def open(self, resume: bool, notify: Callable[[str], None]) -> Mapping[str, Any] | None:
        """Finds the newest readable checkpoint; returns its counters, None for a new run.

        Damaged ones are renamed and reported to `notify`. If none is whole, the newest with
        readable parameters is used, with an empty replay.

        Raises:
          UsageError: `resume`, and no checkpoint is readable.
        """
        if not resume:
            return None
        found = _find(self._directory)
        for path, error in found.damaged:
            aside = set_aside(path)
            notify(f'{error}; renamed to {aside.name}, trying the one before')
        if not found.with_replay:
            notify(f'{found.path.name}: its replay is damaged; resuming with an empty one')
        self._newest = found.path if found.with_replay else None
        self._parameters = (found.path / PARAMETERS,)
        self.newest = found.path.name, found.counters
        notify(f'resuming from {found.path.name}: {found.counters["updates"]} updates')
        return found.counters

    def restore(self, component: str, shard: int) -> pathlib.Path | None:
        """The state from which a server (re)starts; None: empty."""
        if component == PARAMETER_SERVER:
            return self._newest_parameters()
        if self._newest is None:
            return None
        replay = self._newest / _REPLAY / f'shard-{shard}'
        return replay if replay.exists() else None

    def _newest_parameters(self) -> pathlib.Path | None:
        """The newest readable parameters; if there are none, the newest.

        A server that started empty would silently lose the run; one that cannot start says why.
        """
        candidates = self._parameters
        for path in candidates:
            try:
                parameter_checkpoint.require_usable(str(path))
                return path
            except DamagedCheckpointError as error:
                logging.warning('not restored: %s', error)
        return candidates[0] if candidates else None

    def save_parameters(self, client: ParameterClient) -> None:
        """Writes the parameter server's state alone, for a shard that dies before the next `save`.

        Cheaper than `save`, since it leaves out the replay; `--resume` does not use it.

        Raises:
          OSError: the directory is not writable; the previous state stays in force.
          ParameterServerError: a shard did not write its part; likewise.
        """
        saved = Generations(self._directory.path / SERVERS, PARAMETERS)
        saved.parent.mkdir(exist_ok=True)
        path = saved.next()
        try:
            client.save(path)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        self._in_force(path)
        remove(saved.paths()[_KEEP:])

    def save(
        self, client: ParameterClient, replay: Sequence[str], counters: Mapping[str, Any]
    ) -> None:
        """Writes and publishes a checkpoint; removes all but the newest two.

        Raises:
          OSError: the directory is not writable; nothing is published.
          ParameterServerError, ReplayUnavailable: a shard did not write its part; likewise.
        """
        with self._directory.new_checkpoint() as staging:
            client.save(staging / PARAMETERS)
            if replay and self.with_replay:
                (staging / _REPLAY).mkdir()
                for shard, path in enumerate(replay_server.save(replay, self._save_seconds)):
                    shutil.move(path, staging / _REPLAY / f'shard-{shard}')
            files = {_REPLAY_FILES: digests(staging / _REPLAY)}
            write_json(staging / CHECKPOINT_RUN_FILE, seal({**counters, **files}))
        self._newest = self._directory.latest_checkpoints()[0]
        self.newest = self._newest.name, counters
        self._in_force(self._newest / PARAMETERS)
        self._directory.prune(_KEEP)
        logging.info('wrote %s', self._newest)

    def _in_force(self, parameters: pathlib.Path) -> None:
        # Two full checkpoints and two of parameters alone exist at most.
        self._parameters = (parameters, *self._parameters)[: 2 * _KEEP]


@dataclasses.dataclass(frozen=True)
class _Found:
    """The checkpoint to resume from.

    Attributes:
      path: its directory.
      counters: of the run.
      with_replay: whether its replay, if any, is readable.
      damaged: newer ones, and why they are unreadable.
    """

    path: pathlib.Path
    counters: Mapping[str, Any]
    with_replay: bool
    damaged: tuple[tuple[pathlib.Path, DamagedCheckpointError], ...]


def _find(directory: RunDirectory) -> _Found:
    """The newest whole checkpoint; if there is none, the newest with readable parameters.

    Raises:
      UsageError: no parameters are readable.
    """
    paths = _existing(directory)
    reason = ''
    for with_replay in (True, False):
        damaged: list[tuple[pathlib.Path, DamagedCheckpointError]] = []
        for path in paths:
            try:
                counters = _validate(path, with_replay)
                return _Found(path, counters, with_replay, tuple(damaged))
            except DamagedCheckpointError as error:
                damaged.append((path, error))
                reason = str(error)
    raise _unreadable(directory, reason)


def _existing(directory: RunDirectory, best: bool = False) -> list[pathlib.Path]:
    """The complete checkpoints, newest first.

    Raises:
      UsageError: there are none; it offers the `best` one.
    """
    if paths := directory.latest_checkpoints():
        return paths
    raise no_checkpoint(directory.path, best)


def _unreadable(directory: RunDirectory, reason: str, best: bool = False) -> UsageError:
    offer = 'add --checkpoint best, or ' * best
    return UsageError(
        f'{directory.path}: no checkpoint can be read ({reason}). Fix: {offer}start a new run in'
        ' another --run_dir.'
    )


def readable_counters(directory: RunDirectory) -> Mapping[str, Any]:
    """The counters from which the run would resume; changes nothing.

    Raises:
      UsageError: no checkpoint is readable.
    """
    return _find(directory).counters


def read_parameters(
    directory: RunDirectory, which: str, notify: Callable[[str], None]
) -> tuple[str, parameter_checkpoint.Checkpoint]:
    """The parameters of a run, active or not, and their checkpoint's name.

    Args:
      directory: of the run.
      which: 'newest' (that is readable), 'best' (by the run's own evaluations) or a number.
      notify: receives a line for each damaged checkpoint that 'newest' skips.

    Raises:
      UsageError: there are none, or they are damaged.
    """
    if which == 'newest':
        return _read_newest(directory, notify)
    path = directory.best if which == BEST else directory.checkpoint(int(which))
    if not path.is_dir():
        held = [checkpoint.name for checkpoint in directory.latest_checkpoints()]
        held += [BEST] * directory.best.is_dir()
        raise UsageError(
            f'{directory.path}: no checkpoint {which} (there are: {", ".join(held) or "none"}).'
            ' Fix: name one of them, or omit --checkpoint.'
        )
    try:
        return path.name, parameter_checkpoint.read_checkpoint(str(path / PARAMETERS))
    except DamagedCheckpointError as error:
        raise UsageError(f'{error}. Fix: name another --checkpoint.') from error


def _read_newest(
    directory: RunDirectory, notify: Callable[[str], None]
) -> tuple[str, parameter_checkpoint.Checkpoint]:
    """Raises UsageError if no parameters are readable."""
    damaged: list[str] = []
    best = directory.best.is_dir()
    for path in _existing(directory, best):
        try:
            saved = parameter_checkpoint.read_checkpoint(str(path / PARAMETERS))
        except DamagedCheckpointError as error:
            damaged.append(str(error))
            continue
        for reason in damaged:
            notify(f'{reason}; skipped')
        return path.name, saved
    raise _unreadable(directory, damaged[-1], best)


def _counters(path: pathlib.Path) -> dict[str, Any]:
    """The counters of a checkpoint, and the digests of its replay's files.

    Raises:
      DamagedCheckpointError: the file is missing or changed.
    """
    run_file = path / CHECKPOINT_RUN_FILE
    try:
        counters = unseal(parse_object(run_file.read_bytes()))
        for name in ('updates', *(_COUNTS & counters.keys())):
            if type(counters.get(name)) is not int or counters[name] < 0:
                raise ValueError(f'{name} is not a count')
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f'{run_file} is damaged ({error})') from error
    return counters


def _validate(path: pathlib.Path, with_replay: bool) -> dict[str, Any]:
    """The counters of a checkpoint that servers can start from; `with_replay` checks that, too.

    Raises:
      DamagedCheckpointError: a file is missing or changed, or a value is not finite.
    """
    parameter_checkpoint.require_usable(str(path / PARAMETERS))
    run_file = path / CHECKPOINT_RUN_FILE
    counters = _counters(path)
    expected = counters.pop(_REPLAY_FILES, None)
    if not with_replay:
        return counters
    found = digests(path / _REPLAY)
    if not isinstance(expected, dict):
        raise DamagedCheckpointError(f'{run_file} is damaged (no {_REPLAY_FILES})')
    for name, how in differences(expected, found).items():
        raise DamagedCheckpointError(f'{path / _REPLAY / name} is damaged ({how})')
    return counters
