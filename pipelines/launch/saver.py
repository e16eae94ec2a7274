"""Saves a run beside its watch: what to save in, files and their outcome out.

A save waits for shards that hang, and a replay writes gigabytes; meanwhile the watch must go on.
"""

import concurrent.futures
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infra.parameter_server.client import ParameterClient
from infra.parameter_server.protocol import ParameterServerError
from infra.replay.errors import ReplayError
from pipelines.storage.checkpoints import Checkpoints


class Saver:
    """Writes one checkpoint at a time, in a thread.

    Attributes:
      whole: whether a checkpoint is being written, not the parameters alone.
      replay: addresses of the replay shards that belong to it; they may answer nobody meanwhile.
    """

    def __init__(
        self, checkpoints: Checkpoints, client: ParameterClient, tell: Callable[[str], None]
    ):
        """Saves nothing yet.

        Args:
          checkpoints: of the run.
          client: for this alone, since calls of one client take turns.
          tell: is told of a checkpoint that cannot be written.
        """
        self._checkpoints, self._client, self._tell = checkpoints, client, tell
        self._saving: concurrent.futures.Future[None] | None = None
        self.whole = False
        self.replay: Sequence[str] = ()

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return self._saving is not None and not self._saving.done()

    def save(self, replay: Sequence[str], counters: Mapping[str, Any]) -> bool:
        """Begins a checkpoint; returns whether the replay shards at these addresses are in it."""
        self.whole = True
        self.replay = replay if self._checkpoints.with_replay else ()
        self._begin(lambda: self._checkpoints.save(self._client, replay, counters))
        return bool(self.replay)

    def save_parameters(self) -> None:
        """Begins to save the parameters alone."""
        self._begin(lambda: self._checkpoints.save_parameters(self._client))

    def ended(self) -> bool:
        """Whether what was begun last has just been written; what could not be is told here.

        The checkpoint before it stays in force.
        """
        if self._saving is None or self.busy:
            return False
        saving, self._saving = self._saving, None
        self.whole, self.replay = False, ()
        try:
            saving.result()
        except Exception as error:  # of any kind: the one before is there, and the next is due
            logging.exception('no checkpoint')
            foreseen = isinstance(error, OSError | ParameterServerError | ReplayError)
            kind = '' if foreseen else f'unexpected {type(error).__name__}: '
            self._tell(f'no checkpoint written: {kind}{error}')
            return False
        return True

    def _begin(self, write: Callable[[], None]) -> None:
        future: concurrent.futures.Future[None] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(write())
            except BaseException as error:  # raised again, or told, where it is asked for
                future.set_exception(error)

        self._saving = future
        threading.Thread(target=run, name='saver', daemon=True).start()
