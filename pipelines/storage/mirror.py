"""The mirror of a remote run: a thread that uploads what changes in the local copy.

In: the local copy, in which the run writes. Out: its permanent files in the remote directory, from
which another machine can resume at any moment.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from pipelines.experiment.config import CONFIG_FILE
from pipelines.storage.object_store import RemoteError, Stamp, within
from pipelines.storage.remote_run import (
    PERIOD_SECONDS,
    RELEASE_SECONDS,
    RemoteRun,
    TakenOverError,
    checkpoint_of,
    files_below,
    run_file,
    stamp_of,
)
from pipelines.storage.run_directory import CHECKPOINT_RUN_FILE, SERVERS, RunDirectory

_LONGEST_DELAY_SECONDS = 120.0  # between two tries while it is unreachable
_RESEND_BYTES_PER_SECOND = 200_000  # average for a growing file, sent whole each time
_LAST_SECONDS = 300.0  # for the last pass, plus what is left to send at this rate:
_LAST_BYTES_PER_SECOND = 4e6
_LAST_DELAY_SECONDS = 2.0


class Mirror:
    """Uploads the local copy in a thread, from `__enter__` until `__exit__`.

    Never stops or slows the run: reports an error once and retries. A new run that leaves no trace
    on this machine (see `RunDirectory`) leaves none in the remote directory.

    Attributes:
      problem: after the end, why the remote directory is incomplete; empty if it is complete.
    """

    def __init__(self, remote: RemoteRun, directory: RunDirectory, notify: Callable[[str], None]):
        """`notify` is called from the thread, when an outage begins and when it ends."""
        self.problem = ''
        self._remote, self._directory, self._notify = remote, directory, notify
        self._sent = remote.sent
        self._sent_at: dict[str, float] = {}
        self._stop = threading.Event()
        self._deadline = 0.0  # of the last pass
        self._outage = self._taken = ''
        self._unwanted = False
        self._thread = threading.Thread(target=self._run, name='mirror', daemon=True)

    def __enter__(self) -> 'Mirror':
        self._remote.mark()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: Any
    ) -> None:
        unwanted = self._unwanted = self._directory.unwanted(error)
        seconds = RELEASE_SECONDS if unwanted else self._last_seconds()
        late = f'the upload did not end within {seconds:.0f} s'
        self.problem = late
        self._deadline = 0.0 if unwanted else time.monotonic() + seconds
        self._stop.set()
        self._thread.join(seconds)
        if self.problem == late:
            self.problem = self._outage or late
        if unwanted:
            self.problem = ''
            with contextlib.suppress(RemoteError):
                within(RELEASE_SECONDS, self._remote.url, self._discard)

    def _last_seconds(self) -> float:
        """How long the last pass may take."""
        left = sum(
            stamp[0] for name, stamp in self._local_files().items() if self._sent.get(name) != stamp
        )
        return _LAST_SECONDS + left / _LAST_BYTES_PER_SECOND

    def _discard(self) -> None:
        self._remote.place.delete(list(self._sent))

    def _run(self) -> None:
        delay = PERIOD_SECONDS
        while True:
            delay = PERIOD_SECONDS if self._try() else min(2 * delay, _LONGEST_DELAY_SECONDS)
            if self._stop.wait(delay) or self._taken:
                break
        self._stop.wait()
        while not self._taken and time.monotonic() < self._deadline:
            if self._try(last=True):
                self.problem = ''
                return
            time.sleep(_LAST_DELAY_SECONDS)
        self.problem = self._taken or self._outage or self.problem

    def _try(self, last: bool = False) -> bool:
        """Makes a pass; returns whether it succeeded, and reports when that changes."""
        try:
            self.copy(last)
        except TakenOverError as error:
            self._taken = str(error)
            self._notify(f'{error}; from now on this run is only in {self._directory.path}')
            return False
        except Exception as error:  # of any kind: the mirror must survive
            logging.warning('mirror', exc_info=error)
            if not self._outage:
                self._notify(f'upload failed, retrying: {error}')
            self._outage = str(error).partition('. Fix: ')[0]
            return False
        if self._outage:
            self._outage = ''
            self._notify(f'{self._remote.url}: reachable again, everything is uploaded')
        return True

    def copy(self, last: bool = False) -> None:
        """Makes one pass: sends what is new or changed, then deletes what is gone.

        `last`: also sends large files that have grown.

        Raises:
          RemoteError: the remote directory is unreachable.
          TakenOverError: another launcher owns it.
          OSError: a local file is not readable.
        """
        self._beat()
        # Newest first: the older one may be pruned soon.
        checkpoints = [path.name for path in self._directory.latest_checkpoints()]
        files = self._local_files()
        new = [name for name in checkpoints if not self._sent.get(run_file(name))]
        # Before the checkpoints: a resumed run needs the episodes that its checkpoint counts.
        for name, stamp in files.items():
            if not checkpoint_of(name) and (last or new or self._is_due(name, stamp)):
                self._send(name, stamp)
        for name in new:
            self._send_checkpoint(name)
        self._delete_gone()

    def _beat(self) -> None:
        if self._unwanted:
            raise RemoteError('upload cancelled')
        self._remote.beat()

    def _local_files(self) -> dict[str, Stamp]:
        """Stamps of all files to send, by name, the configuration first.

        Lacks some files of checkpoints that appear or vanish meanwhile.
        """
        root = self._directory.path
        complete = {path.name for path in self._directory.latest_checkpoints()}
        found: dict[str, Stamp] = {}
        for file in files_below(root):
            name = file.relative_to(root).as_posix()
            parts = name.split('/')
            hidden = any(part.startswith('.') for part in parts) or parts[0] == SERVERS.name
            unfinished = checkpoint_of(name) and checkpoint_of(name) not in complete
            if not hidden and not unfinished:
                with contextlib.suppress(FileNotFoundError):
                    found[name] = stamp_of(file)
        return dict(sorted(found.items(), key=lambda item: (item[0] != CONFIG_FILE, item[0])))

    def _is_due(self, name: str, stamp: Stamp) -> bool:
        """Whether to send a changed file now; the larger, the less often."""
        pause = stamp[0] / _RESEND_BYTES_PER_SECOND
        return time.monotonic() - self._sent_at.get(name, float('-inf')) >= pause

    def _send(self, name: str, stamp: Stamp | None = None) -> bool:
        """Sends a file if it has changed; returns False if it no longer exists."""
        if stamp is None or self._sent.get(name) != stamp:
            sent = self._remote.place.send(self._directory.path / name, name, self._beat)
            if sent is None:
                return False
            self._sent[name] = sent
            self._sent_at[name] = time.monotonic()
        self._beat()
        return True

    def _send_checkpoint(self, checkpoint: str) -> None:
        """Sends a checkpoint, `run.json` last; gives up if it is pruned meanwhile."""
        files = {n: s for n, s in self._local_files().items() if checkpoint_of(n) == checkpoint}
        last = run_file(checkpoint)
        if last in self._sent:  # of another checkpoint with this number
            self._delete([last])
        others = [name for name in self._sent if checkpoint_of(name) == checkpoint]
        self._delete([name for name in others if name not in files])
        for name, stamp in files.items():
            if name != last and not self._send(name, stamp):
                break
        else:
            if self._send(last):
                return
        self._notify(
            f'{checkpoint}: pruned before it was uploaded (slow network). Fix: raise'
            ' --checkpoint_period_seconds, or add --no-checkpoint_replay.'
        )

    def _delete_gone(self) -> None:
        """Deletes what no longer exists locally: checkpoints, and files that this mirror sent.

        Keeps the remote checkpoints until a local one is complete there.
        """
        here = self._local_files()
        if CONFIG_FILE not in here:
            return  # the local copy was removed: the remote run is all that is left
        gone = [name for name in self._sent if name not in here]
        there = [name for name in here if name == run_file(checkpoint_of(name))]
        safe = any(self._sent.get(name) for name in there)
        pruned = [name for name in gone if checkpoint_of(name) and safe]
        self._delete([name for name in pruned if name.endswith(f'/{CHECKPOINT_RUN_FILE}')])
        self._delete([name for name in pruned if name in self._sent])
        self._delete([name for name in gone if not checkpoint_of(name) and self._sent[name]])

    def _delete(self, names: Sequence[str]) -> None:
        if names:
            self._remote.place.delete(names)
        for name in names:
            del self._sent[name]
