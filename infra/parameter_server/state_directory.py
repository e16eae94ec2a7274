"""States that a shard keeps itself, for shards that a supervisor restarts instead of a run.

In: a directory of this shard alone, and its state periodically. Out: the newest readable state, at
the next start. They are independent of a run's checkpoints, which hold all shards.
"""

from __future__ import annotations

import logging
import pathlib
import shutil

from infra import disk
from infra.parameter_server import checkpoint
from infra.parameter_server.checkpoint import DamagedCheckpointError, ShardState

_KEEP = 2
_LOG = logging.getLogger(__name__)


class OwnState:
    """The newest states of one shard in a directory that this process locks."""

    def __init__(self, directory: str, shard: int, num_shards: int, optimizer: str) -> None:
        """Creates the directory and removes incomplete states of a predecessor.

        Raises:
          OSError: the directory is not writable, or is in use by another process.
        """
        self._states = disk.Generations(pathlib.Path(directory), 'state')
        self._place = shard, num_shards
        self._optimizer = optimizer
        self._lock = disk.hold(directory)
        disk.remove_leftovers(self._states.parent)
        for path in self._states.paths():
            if not checkpoint.is_published(str(path)):
                shutil.rmtree(path)

    def newest(self) -> ShardState | None:
        """The newest readable state, None if no state was ever written.

        Raises:
          CheckpointMismatchError: the state belongs to another shard or another optimizer.
          DamagedCheckpointError: all states are damaged; a shard that started empty instead would
            silently lose the run.
        """
        for path in self._states.paths():
            try:
                return checkpoint.read_only_part(str(path), *self._place, self._optimizer)
            except DamagedCheckpointError as error:
                _LOG.warning('%s; trying the state before', error)
                disk.set_aside(path)
        directory = self._states.parent
        damaged = sorted(path.name for path in directory.glob(f'{disk.DAMAGED}*'))
        if damaged:
            raise DamagedCheckpointError(
                f'{directory}: the state is damaged ({", ".join(damaged)}). Fix: put it back,'
                ' or remove these to start empty.'
            )
        return None

    def save(self, state: ShardState) -> None:
        """Writes a state and removes all but the newest two.

        Raises:
          OSError: the state cannot be written; the previous one remains the newest.
        """
        path = self._states.next()
        try:
            part = checkpoint.write_part(str(path), *self._place, state)
            checkpoint.publish(str(path), self._optimizer, [part])
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        disk.remove(self._states.paths()[_KEEP:])

    def close(self) -> None:
        """Unlocks the directory."""
        self._lock.close()
