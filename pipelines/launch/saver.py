"""Writes checkpoints in a thread: what to save in, files and their outcome out.

A save may wait for a shard that hangs and write gigabytes; supervision must continue meanwhile.
"""

import concurrent.futures
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infra.parameter_server.client import ParameterClient
from infra.parameter_server.protocol import ParameterServerError
from infra.replay.errors import ReplayError
from pipelines.errors import reason_of, with_remedy
from pipelines.storage.checkpoints import Checkpoints


class Saver:
    """Writes one checkpoint at a time, in a thread.

    Attributes:
      whole: whether a whole checkpoint is being written, not the parameters alone.
      replay: addresses of the replay shards in it, which may not answer while they write.
    """

    def __init__(
        self, checkpoints: Checkpoints, client: ParameterClient, tell: Callable[[str], None]
    ):
        """
        Args:
          checkpoints: of the run.
          client: used by nothing else, since calls of one client take turns.
          tell: receives a line for each checkpoint that cannot be written.
        """
        self._checkpoints, self._client, self._tell = checkpoints, client, tell
        self._saving: concurrent.futures.Future[None] | None = None
        self.whole = False
        self.replay: Sequence[str] = ()

    @property
    def newest(self) -> tuple[str, Mapping[str, Any]] | None:
        """Name and counters of the newest checkpoint; None before the first."""
        return self._checkpoints.newest

    @property
    def busy(self) -> bool:
        """Whether a save is in progress."""
        return self._saving is not None and not self._saving.done()

    def save(self, replay: Sequence[str], counters: Mapping[str, Any]) -> bool:
        """Starts a checkpoint; returns whether it includes the replay shards."""
        self.whole = True
        self.replay = replay if self._checkpoints.with_replay else ()
        self._begin(lambda: self._checkpoints.save(self._client, replay, counters))
        return bool(self.replay)

    def save_parameters(self) -> None:
        """Starts to save the parameters alone."""
        self._begin(lambda: self._checkpoints.save_parameters(self._client))

    def ended(self) -> bool:
        """Returns whether a save has succeeded since the last call; reports a failed one.

        After a failure the previous checkpoint remains current.
        """
        if self._saving is None or self.busy:
            return False
        saving, self._saving = self._saving, None
        self.whole, self.replay = False, ()
        try:
            saving.result()
        except Exception as error:  # of any kind: the previous one remains and the next will come
            logging.exception('no checkpoint')
            foreseen = isinstance(error, OSError | ParameterServerError | ReplayError)
            kind = '' if foreseen else f'unexpected {type(error).__name__}: '
            self._tell(with_remedy(f'checkpoint: not written ({kind}{reason_of(error)})', error))
            return False
        return True

    def _begin(self, write: Callable[[], None]) -> None:
        future: concurrent.futures.Future[None] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(write())
            except BaseException as error:  # raised again or reported by `ended`
                future.set_exception(error)

        self._saving = future
        threading.Thread(target=run, name='saver', daemon=True).start()
