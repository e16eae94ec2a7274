"""A shard's state kept by the shard itself: for shards that no run starts again, but a supervisor.

In: a directory of this shard's own, and its state now and then. Out: the newest state that can be
read, at the next start. A run's checkpoints, of all shards together, are another matter.
"""

from __future__ import annotations

import logging
import os
import pathlib
import re
import shutil

from infra.directories import hold
from infra.parameter_server import checkpoint
from infra.parameter_server.checkpoint import DamagedCheckpointError, ShardState

_KEEP = 2
_DAMAGED = 'damaged-'
_NAME = re.compile(r'state-(\d{8})')
_LOG = logging.getLogger(__name__)


class OwnState:
    """The states of one shard in its directory, oldest out first; held by this process alone."""

    def __init__(self, directory: str, shard: int, num_shards: int, optimizer: str) -> None:
        """Makes the directory, and removes what a predecessor left half-written.

        Raises:
          OSError: it cannot be made or written, or another process has it.
        """
        self._directory = pathlib.Path(directory)
        self._place = shard, num_shards
        self._optimizer = optimizer
        self._lock = hold(directory)
        for path in self._numbered().values():
            if not checkpoint.is_published(str(path)):
                shutil.rmtree(path)

    def newest(self) -> ShardState | None:
        """The newest state that can be read, None where none was ever written.

        Raises:
          CheckpointMismatchError: it is of another shard, or of another optimizer.
          DamagedCheckpointError: there were states, and none can be read: a shard that started
            empty would forget the run without a word.
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
          OSError: it cannot be written; the one before stays the newest.
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
        """Gives the directory free."""
        self._lock.close()

    def _numbered(self) -> dict[int, pathlib.Path]:
        matches = ((_NAME.fullmatch(name), name) for name in os.listdir(self._directory))
        return {int(match.group(1)): self._directory / name for match, name in matches if match}
