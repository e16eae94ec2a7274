"""Clients of a shard: session names and sequences in, verdicts that count a message once out."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

MAX_SESSIONS = 10_000
"""Sessions kept, some 100 bytes each; a run has one per worker process and further push in flight,
and few restarts."""

MAX_STREAMS = 32
"""Open streams of one session: a client that reconnects may leave some behind for a while."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A shard's decision on a gradient.

    Attributes:
      rejected: None if the gradient was applied, else `STALE` or `INVALID`.
      message: reason of the rejection, else ''.
      update: the gradient's number, that is the global updates including it; the clock's updates if
        it was rejected.
      staleness: updates made since the parameters that the gradient was computed from.
    """

    rejected: str | None
    message: str
    update: int
    staleness: int


@dataclasses.dataclass
class _Session:
    sequence: int = -1
    verdict: Verdict | None = None
    agent_steps: int = 0
    streams: int = 0  # currently open


class Sessions:
    """Clients by name: last answered message, counted agent steps, open streams.

    Not thread-safe: the shard holds its lock during calls.
    """

    def __init__(self, shard: int) -> None:
        self._shard = shard
        self._sessions: collections.OrderedDict[str, _Session] = collections.OrderedDict()

    def open(self, name: str) -> None:
        """Counts a new stream of a client.

        Raises:
          ValueError: too many clients are connected, or this client has too many streams.
        """
        session = self._get(name)
        if session.streams >= MAX_STREAMS:
            raise ValueError(
                f'shard {self._shard} has {MAX_STREAMS} streams of this client already'
            )
        session.streams += 1

    def close(self, name: str) -> None:
        """Counts the end of a client's stream; the client may reconnect."""
        self._get(name).streams -= 1

    def new_steps(self, name: str, total: int) -> int:
        """Returns the steps that `total`, a session's count since its start, adds to the last."""
        session = self._get(name)
        new = max(0, total - session.agent_steps)
        session.agent_steps += new
        return new

    def once(
        self, name: str, sequence: int, judge: Callable[[], Verdict]
    ) -> tuple[Verdict | None, bool]:
        """Returns the verdict on a message's gradient, calling `judge` only for a new message.

        Returns:
          (verdict, whether the message is new). The verdict is None for a message answered before
          the last restart, if the saved state is of an older format without verdicts.
        """
        session = self._get(name)
        new = sequence > session.sequence
        if new:
            session.verdict = judge()
            session.sequence = sequence
        return session.verdict, new

    def counters(self) -> dict[str, list[Any]]:
        """Returns the values to save: sequence, agent steps, the verdict's two main fields."""
        return {
            name: [
                session.sequence,
                session.agent_steps,
                *([session.verdict.rejected, session.verdict.update] if session.verdict else []),
            ]
            for name, session in self._sessions.items()
        }

    def restore(self, counters: Mapping[str, list[Any]]) -> None:
        """Restores the values that `counters` returned."""
        for name, (sequence, agent_steps, *last) in counters.items():
            verdict = Verdict(last[0], '', last[1], 0) if last else None
            self._sessions[name] = _Session(sequence, verdict, agent_steps)

    def _get(self, name: str) -> _Session:
        session = self._sessions.setdefault(name, _Session())
        self._sessions.move_to_end(name)
        if len(self._sessions) > MAX_SESSIONS:
            # Keeps connected sessions, because their repeated messages would count twice.
            oldest = next((n for n, s in self._sessions.items() if not s.streams and n != name), '')
            if not oldest:
                del self._sessions[name]
                raise ValueError(
                    f'shard {self._shard} has {MAX_SESSIONS} clients already; end some of them'
                )
            del self._sessions[oldest]
        return session
