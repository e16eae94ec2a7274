"""Adder: agent steps of E environments in, overlapping windows of rows out to one replay shard.

    rows t-stack+1 .. t+n  ->  item for step t

One Reverb writer takes up to eight environments, one column each, because a stream and its thread
cost more than the frames they carry. The writer sends every row once; neighbouring items share it.
"""

import collections
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from infra.replay.config import EXPERIENCE_TABLE
from infra.replay.errors import ReplaySpecMismatch, ReplayTimeout, ReplayUnavailable
from infra.replay.priorities import priority_of
from infra.replay.status import require_spec
from infra.replay.trajectory import Steps, TrajectorySpec, pack_rows

# Rows compressed together. Longer chunks reduce Reverb's cost per row, but a sampled window
# transfers whole chunks (figures in benchmark_replay.py).
CHUNK_LENGTH = 4
# Reverb logs a warning from 50 unconfirmed items of a writer on. The limit leaves eight
# environments room for one unsent chunk each, and for some items in flight.
WRITER_ENVIRONMENTS = 8
MAX_WRITER_ITEMS = 49
_SLICE_SECONDS = 0.2  # longest delay until a stop request is noticed
_PROBE_SECONDS = 2  # Reverb's client takes whole seconds only
_CLOSE_SECONDS = 2.0


_Ends = tuple[np.ndarray, np.ndarray]
"""Of a step: truncated bool[E], the episode was cut after it; ended bool[E]."""


def never() -> bool:
    """The default of `should_stop`."""
    return False


class _Stream:
    """Sends the rows of a few environments to a shard through one Reverb writer."""

    def __init__(
        self, address: str, spec: TrajectorySpec, num_environments: int, max_in_flight: int
    ):
        """Opens no connection yet."""
        import reverb

        self._address = address
        self._client = reverb.Client(address)
        self._spec = spec
        self._columns = [str(e) for e in range(num_environments)]
        unsendable = (CHUNK_LENGTH - 1) * num_environments  # rows of chunks that are not full
        self._room = max(min(max_in_flight, MAX_WRITER_ITEMS) - num_environments, unsendable)
        # Rows that a new writer needs to continue in mid-stream; zeros precede the stream.
        before = np.zeros((num_environments, spec.row_bytes), np.uint8)
        self._recent = collections.deque([before] * (spec.frame_stack - 1), maxlen=spec.window)
        # The last rows' flags: cut after the row, and end of the episode.
        self._ends: collections.deque[_Ends] = collections.deque(maxlen=spec.n_step + 1)
        self._writer: Any = None
        self.items = 0

    def wait_for_room(self, timeout_seconds: float) -> None:
        """Waits until the writer accepts a step; raises what Reverb raises."""
        if self._writer is None:
            self._writer = self._open()
        self._writer.flush(self._room, timeout_ms=max(1, int(1000 * timeout_seconds)))

    def add(self, rows: np.ndarray, first: np.ndarray, ends: _Ends, priority: np.ndarray) -> None:
        """Appends rows uint8[E, row_bytes] and creates the items they complete."""
        self._recent.append(rows)
        if self._ends:  # an episode that starts without an end before it cuts the previous one
            truncated, ended = self._ends.pop()
            self._ends.append((truncated | (first & ~ended), ended))
        self._ends.append(ends)
        try:
            self._writer.append(self._by_column(rows))
            if len(self._ends) == self._spec.n_step + 1:
                self._create_items(priority)
        except Exception:  # Reverb's stream broke; the next wait reconnects
            self.abandon()

    def flush(self, timeout_seconds: float) -> bool:
        """Waits for confirmation of every item; false if the time ends first."""
        if self._writer is None:
            return not self.items
        try:
            self._writer.flush(timeout_ms=max(1, int(1000 * timeout_seconds)))
        except Exception:  # closed limiter or dead shard, so not confirmed
            return False
        return True

    def abandon(self) -> None:
        """Closes the writer without a flush, which could wait for ever."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _open(self) -> Any:
        """Opens a writer and sends it the recent rows, so that the stream continues."""
        info = self._client.server_info(timeout=_PROBE_SECONDS)  # else the writer waits for ever
        require_spec(info, self._spec, self._address)
        keep = self._spec.window + CHUNK_LENGTH
        writer = self._client.trajectory_writer(num_keep_alive_refs=keep)
        for column in self._columns:
            writer.configure((column,), num_keep_alive_refs=keep, max_chunk_length=CHUNK_LENGTH)
        for rows in self._recent:
            writer.append(self._by_column(rows))
        return writer

    def _by_column(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self._columns, rows, strict=True))

    def _create_items(self, priority: np.ndarray) -> None:
        """Creates one item per environment, whose window ends with the newest row."""
        history = self._writer.history
        cut = _has_no_bootstrap(list(self._ends)[:-1])  # steps t .. t+n-1
        for e, column in enumerate(self._columns):
            if cut[e]:
                continue
            window = history[column][-self._spec.window :]
            self._writer.create_item(EXPERIENCE_TABLE, priority[e], {'rows': window})
            self.items += 1


class Adder:
    """Writes the streams of E environments to one shard; use it in a `with`.

    Memory is bounded, because `add` waits while too many windows are unconfirmed. If a shard dies
    and restarts on the same address, the adder reconnects and sends unconfirmed rows again.

    Attributes:
      should_stop: called every 0.2 s during a wait; true ends it.
    """

    def __init__(
        self,
        address: str,
        spec: TrajectorySpec,
        num_environments: int,
        max_in_flight_items: int = MAX_WRITER_ITEMS,
        timeout_seconds: float = 60.0,
        should_stop: Callable[[], bool] = never,
    ):
        """Opens no connection; the first `add` connects to the shard.

        Args:
          address: host:port of the shard.
          spec: shape of rows and windows.
          num_environments: E, environments per `add`.
          max_in_flight_items: bound of unconfirmed windows of up to eight environments; one chunk
            of each environment is always allowed.
          timeout_seconds: longest wait for room for a row.
          should_stop: checked every 0.2 s during a wait.
        """
        import reverb

        self._address = address
        self._spec = spec
        self._num_environments = num_environments
        self._timeout = timeout_seconds
        self.should_stop = should_stop
        self._client = reverb.Client(address)
        starts = range(0, num_environments, WRITER_ENVIRONMENTS)
        self._slices = [
            slice(start, min(start + WRITER_ENVIRONMENTS, num_environments)) for start in starts
        ]
        self._streams = [
            _Stream(address, spec, part.stop - part.start, max_in_flight_items)
            for part in self._slices
        ]
        self._without_room = list(self._streams)
        self._deadline: float | None = None  # of the wait for the next row

    def __enter__(self) -> 'Adder':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def items(self) -> int:
        """Number of windows passed to Reverb so far."""
        return sum(stream.items for stream in self._streams)

    def add(self, steps: Steps, truncated: np.ndarray, error: np.ndarray | None = None) -> bool:
        """Adds one agent step of every environment, oldest first and without gaps.

        Args:
          steps: observations, actions, rewards and flags of E environments.
          truncated: bool[E], the episode was cut after the step, without an end. A step with
            `first` after neither an end nor a cut also cuts the episode before it.
          error: float[E], absolute or signed, of the transitions that these rows complete, which
            started n steps before. None sets priority 1, the largest error that one step's clipped
            reward causes before any learning.

        Returns:
          True, or False if `should_stop` ended the wait and no row was added.

        Raises:
          ReplayTimeout: the limiter stays closed for `timeout_seconds`; no row is added.
          ReplayUnavailable: the shard is unreachable for `timeout_seconds`; no row is added.
          ReplaySpecMismatch: the shard stores windows of another shape.
          ValueError: the arrays do not fit the spec.
        """
        rows = pack_rows(steps, self._spec)
        if len(rows) != self._num_environments:
            raise ValueError(f'{len(rows)} rows for {self._num_environments} environments')
        if not self.wait_for_room():
            return False
        self._without_room = list(self._streams)
        first, cut = np.asarray(steps.first, bool), np.array(truncated, bool)
        ended = np.asarray(steps.discount) == 0
        priority = self._priority(error)
        for part, stream in zip(self._slices, self._streams, strict=True):
            stream.add(rows[part], first[part], (cut[part], ended[part]), priority[part])
        return True

    def wait_for_room(self, seconds: float = math.inf) -> bool:
        """Waits until the next `add` need not wait; it raises the errors of a wait, as `add` does.

        Returns:
          True, or False if `should_stop` or `seconds` ended the wait; the next one continues it.
        """
        now = time.monotonic()
        end = now + seconds
        deadline = self._deadline = self._deadline or now + self._timeout
        while True:
            try:
                while self._without_room:
                    self._without_room[0].wait_for_room(_SLICE_SECONDS)
                    self._without_room.pop(0)
                self._deadline = None
                return True
            except ReplaySpecMismatch:
                raise
            except Exception as caught:  # DeadlineExceededError, or a broken stream
                error = caught
            now = time.monotonic()
            if self.should_stop() or now >= end:
                return False
            if now >= deadline:
                self._deadline = None
                self._raise_for(error)
            if not _is_deadline(error):
                self._without_room[0].abandon()
                time.sleep(_SLICE_SECONDS)

    def _priority(self, error: np.ndarray | None) -> np.ndarray:
        """Priorities float64[E] of the items that a step completes.

        Replaces values that are not finite, because such items would be lost.
        """
        initial = np.ones(self._num_environments)
        if error is None:
            return initial
        priority = priority_of(error)
        return np.where(np.isfinite(priority), priority, initial)

    def flush(self, timeout_seconds: float | None = None) -> bool:
        """Waits until every window is confirmed; false if the time ends first."""
        timeout = self._timeout if timeout_seconds is None else timeout_seconds
        deadline = time.monotonic() + timeout
        return all(stream.flush(deadline - time.monotonic()) for stream in self._streams)

    def close(self) -> None:
        """Sends remaining rows for at most two seconds; repeated calls have no effect."""
        self.flush(_CLOSE_SECONDS)
        for stream in self._streams:
            stream.abandon()

    def _raise_for(self, error: Exception) -> None:
        """Raises ReplayTimeout for a closed limiter and ReplayUnavailable for a dead shard."""
        waited = f'for {self._timeout:g} s'
        try:
            info = self._client.server_info(timeout=_PROBE_SECONDS)[EXPERIENCE_TABLE]
        except Exception:  # no reply, or a reply without our table
            raise ReplayUnavailable(
                f'replay shard {self._address} has not answered {waited}: is it running?'
            ) from error
        raise ReplayTimeout(
            f'replay shard {self._address} took no more rows {waited}: it holds'
            f' {info.current_size} transitions and waits for its learners'
        ) from error


def _has_no_bootstrap(ends: Sequence[_Ends]) -> np.ndarray:
    """Which environments' n steps were cut before an end, bool[E].

    Their next observation is unknown, so such a window is not a transition.
    """
    cut = np.zeros_like(ends[0][0])
    going_on = ~cut
    for truncated, ended in ends:
        cut |= going_on & truncated
        going_on &= ~ended
    return cut


def _is_deadline(error: Exception) -> bool:
    import reverb

    return isinstance(error, reverb.errors.DeadlineExceededError)
