"""States that a shard keeps itself, for shards that a supervisor restarts instead of a run.

In: a directory of this shard alone, and its state periodically. Out: the newest readable state, at
the next start. They are independent of a run's checkpoints, which hold all shards.
"""

from __future__ import annotations

import logging
import os
import pathlib
import re
import shutil

from infra.disk import hold
from infra.parameter_server import checkpoint
from infra.parameter_server.checkpoint import DamagedCheckpointError, ShardState

_KEEP = 2
_DAMAGED = 'damaged-'
_NAME = re.compile(r'state-(\d{8})')
_LOG = logging.getLogger(__name__)


class OwnState:
    """The newest states of one shard in a directory that this process locks."""

    def __init__(self, directory: str, shard: int, num_shards: int, optimizer: str) -> None:
        """Creates the directory and removes incomplete states of a predecessor.

        Raises:
          OSError: the directory is not writable, or is in use by another process.
        """
        self._directory = pathlib.Path(directory)
        self._place = shard, num_shards
        self._optimizer = optimizer
        self._lock = hold(directory)
        for path in self._numbered().values():
            if not checkpoint.is_published(str(path)):
                shutil.rmtree(path)

    def newest(self) -> ShardState | None:
        """The newest readable state, None if no state was ever written.

        Raises:
          CheckpointMismatchError: the state belongs to another shard or another optimizer.
          DamagedCheckpointError: all states are damaged; a shard that started empty instead would
            silently lose the run.
        """
        for _, path in sorted(self._numbered().items(), reverse=True):
            try:
                return checkpoint.read_only_part(str(path), *self._place, self._optimizer)
            except DamagedCheckpointError as error:
                _LOG.warning('%s; trying the state before', error)
                self._set_aside(path)
        damaged = sorted(path.name for path in self._directory.glob(f'{_DAMAGED}*'))
        if damaged:
            raise DamagedCheckpointError(
                f'{self._directory}: the state is damaged ({", ".join(damaged)}); put it back, or'
                ' remove these to start empty'
            )
        return None

    def save(self, state: ShardState) -> None:
        """Writes a state and removes all but the newest two.

        Raises:
          OSError: the state cannot be written; the previous one remains the newest.
        """
        before = self._numbered()
        path = self._directory / f'state-{max(before, default=0) + 1:08d}'
        try:
            part = checkpoint.write_part(str(path), *self._place, state)
            checkpoint.publish(str(path), self._optimizer, [part])
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        for number in sorted(before)[: -(_KEEP - 1)]:
            shutil.rmtree(before[number], ignore_errors=True)

    def _set_aside(self, path: pathlib.Path) -> None:
        """Renames a damaged state, so that it counts no longer."""
        aside = path.with_name(f'{_DAMAGED}{path.name}')
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)

    def close(self) -> None:
        """Unlocks the directory."""
        self._lock.close()

    def _numbered(self) -> dict[int, pathlib.Path]:
        matches = ((_NAME.fullmatch(name), name) for name in os.listdir(self._directory))
        return {int(match.group(1)): self._directory / name for match, name in matches if match}
