"""Control of a run at a shard: its owner, its enlisted workers, and the request to stop."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Mapping
from typing import Any

MAX_ENLISTED = 10_000
"""Workers kept on record; a run has thousands at most, over all its submissions."""

LEASE_SECONDS = 600.0
"""Time after which an owner's claim expires unless renewed. The clock then says `stopping`, because
an engine may keep the workers of a dead run alive for days."""


class RunControl:
    """The owner of a shard, its lease, the enlisted workers and the request to stop.

    All methods are thread-safe.
    """

    def __init__(self, shard: int) -> None:
        self._shard = shard
        self._lock = threading.Lock()
        self._stop_requested = False
        self._owner = ''
        self._renewed = 0.0
        # (kind, name) of a worker to its current session and the number of sessions before.
        self._enlisted: collections.OrderedDict[tuple[str, str], tuple[str, int]] = (
            collections.OrderedDict()
        )
        self._reruns: collections.Counter[str] = collections.Counter()

    @property
    def stopping(self) -> bool:
        """Whether workers must end: a stop was requested, or the owner's lease has expired."""
        with self._lock:
            expired = bool(self._owner) and time.monotonic() - self._renewed > LEASE_SECONDS
            return self._stop_requested or expired

    def claim(self, owner: str) -> None:
        """Gives the shard to a run that starts or resumes, and clears a request to stop.

        Args:
          owner: any name that identifies the run.

        Raises:
          ValueError: the shard belongs to another run.
        """
        self.renew(owner)
        with self._lock:
            self._stop_requested = False

    def renew(self, owner: str) -> None:
        """Renews a run's lease; a shard without an owner adopts this one.

        Raises:
          ValueError: the shard belongs to another run.
        """
        with self._lock:
            if self._owner not in ('', owner):
                raise ValueError(
                    f'shard {self._shard} belongs to the run {self._owner}; start other servers'
                )
            self._owner = owner
            self._renewed = time.monotonic()

    def enlist(self, session: str, kind: str, name: str) -> int:
        """Records the start of a worker; returns how many other sessions ran it before.

        An engine that replaces a dead worker repeats the same element. Only the session
        distinguishes the two.
        """
        with self._lock:
            last, before = self._enlisted.get((kind, name), ('', -1))
            if session != last:
                before += 1
                if before > 0:
                    self._reruns[kind] += 1
                self._enlisted[kind, name] = session, before
                if len(self._enlisted) > MAX_ENLISTED:
                    self._enlisted.popitem(last=False)
            return before

    def request_stop(self) -> None:
        """Makes every later clock say `stopping`."""
        with self._lock:
            self._stop_requested = True

    def report(self) -> dict[str, Any]:
        """Returns the owner ('' for none) and the number of restarts for each kind of worker."""
        with self._lock:
            return {'owner': self._owner, 'reruns': dict(self._reruns)}

    def counters(self) -> dict[str, Any]:
        """Returns the values to save in a state; see `restore`."""
        with self._lock:
            return {
                'enlisted': [[*worker, *begun] for worker, begun in self._enlisted.items()],
                'owner': self._owner,
                'stopping': self._stop_requested,
            }

    def restore(self, counters: Mapping[str, Any], keep_owner: bool) -> None:
        """Restores the values that `counters` returned.

        Args:
          counters: from a saved state.
          keep_owner: whether the owner keeps the shard, because its servers restart, not the run.
        """
        with self._lock:
            for kind, name, *begun in counters.get('enlisted', []):
                session, before = begun if len(begun) == 2 else _last_of(*begun)
                self._enlisted[kind, name] = session, before
                self._reruns[kind] += before
            if keep_owner:
                self._owner = counters.get('owner', '')
                self._stop_requested = counters.get('stopping', False)
                self._renewed = time.monotonic()


def _last_of(sessions: list[str]) -> tuple[str, int]:
    """(session, number of sessions before it) of a worker, for states that list every session."""
    return sessions[-1], len(sessions) - 1
