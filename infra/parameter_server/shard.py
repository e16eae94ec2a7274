"""One shard's state, without transport: gradients of its slice in, versions and parameters out.

Shard 0 keeps the clock. It counts the run's updates, accepts or rejects each gradient and numbers
the accepted ones. The other shards apply them under the same number. So either all shards apply a
gradient or no shard does, and all copy their target networks at the same updates.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from infra.parameter_server.checkpoint import ShardState
from infra.parameter_server.config import ParameterServerConfig
from infra.parameter_server.layout import Layout
from infra.parameter_server.ledger import Ledger
from infra.parameter_server.optimizers import OptimizedSlice
from infra.parameter_server.protocol import (
    INVALID,
    PROTOCOL_VERSION,
    STALE,
    LayoutMismatchError,
    is_applicable,
)
from infra.parameter_server.run_control import RunControl
from infra.parameter_server.sessions import Sessions, Verdict

_LOG = logging.getLogger(__name__)

MOST_LOST_UPDATES = 1_000_000
"""Largest number of updates by which clients may advance the clock of a restarted shard, in total.
It exceeds the updates that any saved state misses."""

MOST_LOST_AGENT_STEPS = 100_000_000
"""Likewise for agent steps."""


class Shard:
    """A slice of the parameters with its optimizer, version, target network and the global clock.

    All methods are thread-safe; each holds the lock only while it computes.

    Attributes:
      control: owner, workers and the request to stop.
      ledger: of the workers' finished segments, kept at shard 0.
      layout: None until a client initialises the shard or a state is restored.
    """

    def __init__(self, config: ParameterServerConfig, index: int) -> None:
        """Raises ValueError if `index` is not one of the configured shards."""
        if not 0 <= index < config.num_parameter_shards:
            raise ValueError(
                f'shard {index} does not exist; with num_parameter_shards='
                f'{config.num_parameter_shards} use 0 to {config.num_parameter_shards - 1}'
            )
        self.config = config
        self.index = index
        self.control = RunControl(index)
        self.ledger = Ledger()
        self.layout: Layout | None = None
        self._lock = threading.Lock()
        self._sessions = Sessions(index)
        self._rejected = {STALE: 0, INVALID: 0}
        # Versions are global updates as shard 0 counts them. Revisions count changes at this shard,
        # so that clients receive only what is new to them.
        self._version = self._target_version = 0
        self._revision = self._target_revision = 0
        self._agent_steps = self._agent_steps_seen = 0
        self._set_limits()
        self._rollbacks = 0

    @property
    def size(self) -> int:
        """Number of parameters in this shard, 0 before it is initialised."""
        return 0 if self.layout is None else self._target.size

    def slice_of(self, layout: Layout) -> slice:
        """Returns this shard's slice of a layout."""
        return layout.slices(self.config.num_parameter_shards)[self.index]

    def check_layout(self, layout: Layout) -> None:
        """Raises LayoutMismatchError unless the shard is empty or holds the same layout."""
        if self.layout is not None and self.layout.fingerprint != layout.fingerprint:
            raise LayoutMismatchError(
                f'the client has {layout.describe()} but the shard holds '
                f'{self.layout.describe()}; use the same game and network, or other servers'
            )

    def initialise(
        self, layout: Layout, values: np.ndarray, updates: int = 0, agent_steps: int = 0
    ) -> bool:
        """Sets the initial parameters, float32 [n], and the clock, unless they are set.

        Args:
          layout: of the whole network.
          values: this shard's slice, float32 [n].
          updates, agent_steps: of the clock; above 0 if the shard lost the state of an older run.

        Returns:
          Whether the shard accepted the values.

        Raises:
          LayoutMismatchError: the shard holds parameters of another layout.
          ValueError: the values have the wrong shape, or are not finite.
        """
        part = self.slice_of(layout)
        if values.shape != (part.stop - part.start,) or not np.isfinite(values).all():
            raise ValueError(
                f'first parameters of shard {self.index} must be {part.stop - part.start} '
                f'finite float32 numbers, got shape {values.shape}'
            )
        with self._lock:
            self.check_layout(layout)
            if self.layout is not None:
                return False
            self._allocate(layout)
            self._slice.initialise(values)
            self._version, self._agent_steps_seen = updates, agent_steps
            self._set_limits()
            self._take_target()
            self._keep_good()
            self.layout = layout
            return True

    def restore(self, state: ShardState, keep_owner: bool = False) -> None:
        """Restores a saved state.

        Args:
          state: with the arrays of this shard's slice.
          keep_owner: whether the owner keeps the shard, because its servers restart, not the run.
        """
        with self._lock:
            self._allocate(state.layout)
            self._slice.restore(state.arrays)
            np.copyto(self._target, state.arrays['target'])
            self._version = state.counters['version']
            self._target_version = state.counters['target_version']
            if self._target_version != self._target_due():
                # The saved shard had missed updates, so its target is of an older update.
                self._take_target()
            self._revision += 1
            self._target_revision += 1
            self._keep_good()
            self._agent_steps_seen = state.counters['agent_steps']
            self._agent_steps = state.counters.get('agent_steps_counted', self._agent_steps_seen)
            self._set_limits()
            self._sessions.restore(state.counters['sessions'])
            self.control.restore(state.counters, keep_owner)
            self.ledger.restore(state.counters.get('segments', []))
            self.layout = state.layout

    def open_session(self, name: str) -> None:
        """Counts a stream of a client, which is new or reconnects.

        Raises:
          ValueError: too many clients are connected, or this client has too many streams.
        """
        with self._lock:
            self._sessions.open(name)

    def close_session(self, name: str) -> None:
        """Counts the end of a client's stream; the client may reconnect."""
        with self._lock:
            self._sessions.close(name)

    def adopt_clock(self, updates: int, agent_steps: int) -> None:
        """Advances the clock to what a client has seen, which a restarted shard may lack.

        An empty shard gets its clock with its initial parameters. Only shard 0 counts agent steps.

        Raises:
          ValueError: the client's clock is further ahead than any restart explains.
        """
        with self._lock:
            if self.layout is None:
                return
            self._adopt(updates)
            if self.index == 0:
                self._require_near('agent step', agent_steps, self._largest_agent_steps)
                self._agent_steps_seen = max(self._agent_steps_seen, agent_steps)

    def push(self, session: str, sequence: int, gradient: Any, version: int) -> Verdict:
        """Accepts or rejects a gradient, as shard 0, and applies an accepted one once.

        Args:
          session: the client's name.
          sequence: grows with each new message of the session; a repetition has the same.
          gradient: (float32 [n] array, float32 [n] tensor on the same memory), or a string with the
            reason why there is no gradient.
          version: global updates in the parameters that the gradient was computed from.

        Raises:
          ValueError: this is not shard 0, or `version` is further ahead than any restart explains.
        """
        if self.index != 0:
            raise ValueError(f'shard {self.index} judges no gradients; push to shard 0 first')

        def judge() -> Verdict:
            self._adopt(version)
            staleness = self._version - version
            rejected, message = self._flaw(gradient)
            if rejected is None and staleness > self.config.max_staleness:
                rejected, message = (
                    STALE,
                    (
                        f'the gradient is {staleness} updates old, max_staleness is'
                        f' {self.config.max_staleness}'
                    ),
                )
            if rejected is None:
                self._apply(gradient[1], self._version + 1)
            return Verdict(rejected, message, self._version, staleness)

        return self._once(session, sequence, judge)

    def apply(self, session: str, sequence: int, gradient: Any, update: int) -> Verdict:
        """Applies once a gradient that shard 0 has accepted as global update number `update`.

        The other arguments are as in `push`. Rejects only gradients that are not finite or too
        large.

        Raises:
          ValueError: this is shard 0, or `update` is further ahead than any restart explains.
        """
        if self.index == 0:
            raise ValueError('shard 0 applies nothing that it has not judged; push to it')

        def follow() -> Verdict:
            self._require_near('update', update, self._largest_version)
            rejected, message = self._flaw(gradient)
            if rejected is None:
                self._apply(gradient[1], update)
            return Verdict(rejected, message, update, 0)

        return self._once(session, sequence, follow)

    def add_agent_steps(self, session: str, total: int) -> None:
        """Counts agent steps; `total` is the session's count since its start.

        A repeated message therefore adds nothing.
        """
        with self._lock:
            new = self._sessions.new_steps(session, total)
            self._agent_steps += new
            self._largest_agent_steps += new

    def copy_parameters(self, known: int | None, out: np.ndarray) -> dict[str, Any]:
        """Copies the parameters to `out` unless their revision is `known`; returns the clock."""
        with self._lock:
            modified = known != self._revision
            if modified:
                self._copy_finite(out)
            return {**self._clock(), 'modified': modified}

    def copy_target(self, known: int | None, out: np.ndarray) -> dict[str, Any]:
        """Copies the target network to `out` unless its revision is `known`; returns the clock."""
        with self._lock:
            modified = known != self._target_revision
            if modified:
                np.copyto(out, self._target)
            return {**self._clock(), 'modified': modified}

    def clock(self) -> dict[str, Any]:
        """Returns versions, revisions, agent steps and whether workers must stop."""
        with self._lock:
            return self._clock()

    def report(self) -> dict[str, Any]:
        """Returns the shard's counters and configuration."""
        with self._lock:
            return {
                'protocol': PROTOCOL_VERSION,
                'shard': self.index,
                'config': dataclasses.asdict(self.config),
                'initialised': self.layout is not None,
                'rejected': dict(self._rejected),
                'rollbacks': self._rollbacks,
                'dropped_records': self.ledger.dropped,
                **self.control.report(),
                **self._clock(),
            }

    def snapshot(self) -> ShardState:
        """Returns a copy of the state, made between two updates.

        Raises:
          ValueError: the shard has no parameters yet.
        """
        with self._lock:
            return self._snapshot()

    def last_snapshot(self) -> ShardState:
        """Like `snapshot`, but blocks later requests, so that no acknowledged update is lost.

        Call it only before the process ends.
        """
        self._lock.acquire()  # never released: clients repeat their requests after the restart
        return self._snapshot()

    def _snapshot(self) -> ShardState:
        if self.layout is None:
            raise ValueError(f'shard {self.index} has no parameters to save; initialise first')
        self._slice.require_in_place()
        self._keep_good()
        counters = {
            # First: a segment that is done twice is better than one that is lost.
            'segments': self.ledger.counters(),
            'version': self._version,
            'target_version': self._target_version,
            'agent_steps': max(self._agent_steps, self._agent_steps_seen),
            'agent_steps_counted': self._agent_steps,
            'sessions': self._sessions.counters(),
            **self.control.counters(),
        }
        arrays = {**self._good, 'target': self._target.copy()}
        slots = ('parameters', 'target', *self._slice.slot_names)
        return ShardState(self.layout, arrays, slots, counters)

    def _allocate(self, layout: Layout) -> None:
        part = self.slice_of(layout)
        self._slice = OptimizedSlice(self.config, part.stop - part.start)
        self._target = np.zeros(part.stop - part.start, np.float32)
        self._is_finite = np.empty(part.stop - part.start, bool)
        self._good: dict[str, np.ndarray] = {}

    def _once(self, session: str, sequence: int, judge: Callable[[], Verdict]) -> Verdict:
        """Returns the verdict on a gradient, calling `judge` only for a new message."""
        with self._lock:
            verdict, new = self._sessions.once(session, sequence, judge)
            if new and verdict is not None and verdict.rejected is not None:
                self._rejected[verdict.rejected] += 1
            return verdict or Verdict(None, '', self._version, 0)

    def _flaw(self, gradient: Any) -> tuple[str | None, str]:
        """Returns (reason, message) of an inapplicable gradient, else (None, '')."""
        if isinstance(gradient, str):
            return INVALID, f'shard {self.index}: {gradient}'
        if not is_applicable(gradient[0]):
            return INVALID, f'shard {self.index}: the gradient is not finite, or too large'
        return None, ''

    def _apply(self, gradient: tf.Tensor, update: int) -> None:
        self._slice.step(gradient, update)
        self._revision += 1
        self._largest_version += 1
        self._advance(update)

    def _set_limits(self) -> None:
        """Bounds how far clients may advance the clock, from its value at a start."""
        # Other shards allow twice as much, so that they accept every clock of shard 0.
        times = 1 if self.index == 0 else 2
        self._largest_version = self._version + times * MOST_LOST_UPDATES
        self._largest_agent_steps = (
            max(self._agent_steps, self._agent_steps_seen) + MOST_LOST_AGENT_STEPS
        )

    def _adopt(self, updates: int) -> None:
        self._require_near('update', updates, self._largest_version)
        self._advance(updates)

    def _require_near(self, unit: str, count: int, largest: int) -> None:
        if count > largest:
            raise ValueError(
                f'shard {self.index} is at update {self._version}: no restart explains {unit}'
                f' {count}; resume the run from its last checkpoint'
            )

    def _advance(self, updates: int) -> None:
        """Advances the version and copies the target network if a multiple of its period passed."""
        self._version = max(self._version, updates)
        if self.layout is not None and self._target_due() > self._target_version:
            self._take_target()
            self._keep_good()

    def _target_due(self) -> int:
        """The last multiple of the target period, whose parameters are the target network."""
        return self._version // self.config.target_update_period * self.config.target_update_period

    def _take_target(self) -> None:
        self._copy_finite(self._target)
        self._target_version = self._target_due()
        self._target_revision += 1

    def _copy_finite(self, out: np.ndarray) -> None:
        """Copies the parameters to `out`; rolls back first if they are not finite."""
        if not np.isfinite(self._slice.parameters, out=self._is_finite).all():
            self._roll_back()
        np.copyto(out, self._slice.parameters)

    def _keep_good(self) -> None:
        """Keeps a copy of a finite state to roll back to; rolls back if the state is not finite."""
        state = self._slice.copy_state()
        if all(np.isfinite(array).all() for array in state.values()):
            self._good = state
        else:
            self._roll_back()

    def _roll_back(self) -> None:
        _LOG.error(
            'shard %d is not finite at update %d: it goes back to its last good state',
            self.index,
            self._version,
        )
        self._slice.restore(self._good)
        self._revision += 1
        self._rollbacks += 1

    def _clock(self) -> dict[str, Any]:
        return {
            'version': self._version,
            'revision': self._revision,
            'target_version': self._target_version,
            'target_revision': self._target_revision,
            # A restart may lose steps of clients that ended. The clock then pauses.
            'agent_steps': max(self._agent_steps, self._agent_steps_seen),
            'stopping': self.control.stopping,
        }
