"""One shard's state: gradients of its slice in, versions and parameters out. No transport here."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from typing import Any

import numpy as np
import tensorflow as tf

from infra.parameter_server.checkpoint import ShardState
from infra.parameter_server.config import ParameterServerConfig
from infra.parameter_server.layout import Layout
from infra.parameter_server.optimizers import OptimizedSlice
from infra.parameter_server.protocol import INVALID, STALE, LayoutMismatchError

# A session is some 100 bytes; a run has one per worker process, and few restarts.
_MAX_SESSIONS = 10_000

LEASE_SECONDS = 600.0
"""A run that has claimed a shard and not been heard of for so long has left it: its workers, which
an engine may keep alive for days, are told to stop."""


@dataclasses.dataclass
class _Session:
    """What the shard remembers of one client, so that a repeated message counts once."""

    sequence: int = -1
    rejected: str | None = None
    message: str = ''
    agent_steps: int = 0


class Shard:
    """A slice of the parameters, its optimizer, version, target snapshot, and the global clock.

    All methods may be called from several threads; each holds the lock only while it computes.

    Attributes:
      layout: None until the first writer initialises the shard or a state is restored.
    """

    def __init__(self, config: ParameterServerConfig, index: int) -> None:
        """Raises ValueError when `index` is not one of the configured shards."""
        if not 0 <= index < config.num_parameter_shards:
            raise ValueError(
                f'shard {index} does not exist; with num_parameter_shards='
                f'{config.num_parameter_shards} use 0 to {config.num_parameter_shards - 1}'
            )
        self.config = config
        self.index = index
        self.layout: Layout | None = None
        self._lock = threading.Lock()
        self._sessions: collections.OrderedDict[str, _Session] = collections.OrderedDict()
        self._rejected = {STALE: 0, INVALID: 0}
        self._version = self._target_version = 0
        self._agent_steps = 0
        self._stopping = False
        self._owner = ''
        self._renewed = 0.0
        # By kind and name of a worker: the sessions in which it was run.
        self._enlisted: dict[tuple[str, str], list[str]] = {}

    @property
    def size(self) -> int:
        """Parameters in this shard; 0 before it is initialised."""
        return 0 if self.layout is None else self._target.size

    def slice_of(self, layout: Layout) -> slice:
        """Returns the part of a layout this shard would own."""
        return layout.slices(self.config.num_parameter_shards)[self.index]

    def check_layout(self, layout: Layout) -> None:
        """Raises LayoutMismatchError unless the shard is empty or holds this very layout."""
        if self.layout is not None and self.layout.fingerprint != layout.fingerprint:
            raise LayoutMismatchError(
                f'the client has {layout.describe()} but the shard holds '
                f'{self.layout.describe()}; use the same game and network, or other servers'
            )

    def initialise(self, layout: Layout, values: np.ndarray) -> bool:
        """Sets the first parameters, float32 [n]; the first writer wins.

        Returns:
          Whether these values were taken.

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
            self._slice.parameters.assign(values)
            np.copyto(self._target, values)
            self.layout = layout
            return True

    def restore(self, state: ShardState, keep_owner: bool = False) -> None:
        """Takes over a saved state, whose arrays are already those of this shard's slice.

        Args:
          keep_owner: whether the run that had the shard still has it: its servers are started
            again, not the run.
        """
        with self._lock:
            self._allocate(state.layout)
            for name, variable in self._slice.state.items():
                variable.assign(state.arrays[name])
            np.copyto(self._target, state.arrays['target'])
            self._version = state.counters['version']
            self._target_version = state.counters['target_version']
            self._agent_steps = state.counters['agent_steps']
            for session, (sequence, agent_steps) in state.counters['sessions'].items():
                self._sessions[session] = _Session(sequence, agent_steps=agent_steps)
            for kind, name, sessions in state.counters.get('enlisted', []):
                self._enlisted[kind, name] = list(sessions)
            if keep_owner:
                self._owner = state.counters.get('owner', '')
                self._stopping = state.counters.get('stopping', False)
                self._renewed = time.monotonic()
            self.layout = state.layout

    def push(self, session: str, sequence: int, gradient: Any, version: int) -> tuple:
        """Applies one gradient once, or says why not.

        Args:
          session: the client's name.
          sequence: grows with each new message of the session; a repeat has the same.
          gradient: (float32 [n] array, float32 [n] tensor on the same memory), or a string that
            says why there is none.
          version: of the parameters the gradient was computed from.

        Returns:
          (None, '') when it was applied, now or before; else (reason, message).
        """
        with self._lock:
            memory = self._session(session)
            if sequence > memory.sequence:
                memory.rejected, memory.message = self._refusal(gradient, version)
                if memory.rejected is None:
                    self._apply(gradient[1])
                else:
                    self._rejected[memory.rejected] += 1
                memory.sequence = sequence
            return memory.rejected, memory.message

    def add_agent_steps(self, session: str, total: int) -> None:
        """Counts agent steps; `total` is the session's own count since it began, so that a
        repeated message adds nothing."""
        with self._lock:
            memory = self._session(session)
            self._agent_steps += max(0, total - memory.agent_steps)
            memory.agent_steps = max(total, memory.agent_steps)

    def claim(self, owner: str) -> None:
        """Gives the shard to a run that begins, by whatever name it gives itself, or goes on.

        Raises:
          ValueError: another run has it.
        """
        self.renew(owner)
        with self._lock:
            self._stopping = False

    def renew(self, owner: str) -> None:
        """Prolongs a run's lease; a shard that has forgotten its run belongs to it again.

        Raises:
          ValueError: another run has it.
        """
        with self._lock:
            if self._owner not in ('', owner):
                raise ValueError(
                    f'shard {self.index} belongs to the run {self._owner}; start other servers'
                )
            self._owner = owner
            self._renewed = time.monotonic()

    def enlist(self, session: str, kind: str, name: str) -> int:
        """Notes that a worker has begun; returns how often it was begun in other sessions before.

        An engine that replaces a dead worker runs the same element again: only here can the two be
        told apart.
        """
        with self._lock:
            sessions = self._enlisted.setdefault((kind, name), [])
            if session not in sessions:
                sessions.append(session)
            return sessions.index(session)

    def request_stop(self) -> None:
        """Makes every later clock say `stopping`."""
        self._stopping = True

    def copy_parameters(self, known: int, out: np.ndarray) -> dict[str, Any]:
        """Copies the parameters to `out` unless their version is `known`; returns the clock."""
        with self._lock:
            modified = known != self._version
            if modified:
                self._slice.copy_parameters(out)
            return {**self._clock(), 'modified': modified}

    def copy_target(self, known: int, out: np.ndarray) -> dict[str, Any]:
        """Copies the target snapshot to `out` unless its version is `known`."""
        with self._lock:
            modified = known != self._target_version
            if modified:
                np.copyto(out, self._target)
            return {**self._clock(), 'modified': modified}

    def clock(self) -> dict[str, Any]:
        """Returns versions, agent steps and whether a stop was requested."""
        with self._lock:
            return self._clock()

    def report(self) -> dict[str, Any]:
        """Returns the shard's counters and configuration."""
        with self._lock:
            return {
                'shard': self.index,
                'config': dataclasses.asdict(self.config),
                'initialised': self.layout is not None,
                'owner': self._owner,
                'rejected': dict(self._rejected),
                'reruns': self._reruns(),
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
        """`snapshot` before the process ends: no update is answered, and so lost, after it."""
        self._lock.acquire()  # never given back: clients ask again when the shard is back
        return self._snapshot()

    def _snapshot(self) -> ShardState:
        if self.layout is None:
            raise ValueError(f'shard {self.index} has no parameters to save; initialise first')
        arrays = {name: var.numpy() for name, var in self._slice.state.items()}
        sessions = {name: [s.sequence, s.agent_steps] for name, s in self._sessions.items()}
        counters = {
            'version': self._version,
            'target_version': self._target_version,
            'agent_steps': self._agent_steps,
            'sessions': sessions,
            'enlisted': [[*worker, begun] for worker, begun in self._enlisted.items()],
            'owner': self._owner,
            'stopping': self._stopping,
        }
        arrays['target'] = self._target.copy()
        slots = ('parameters', 'target', *self._slice.slot_names)
        return ShardState(self.layout, arrays, slots, counters)

    def _allocate(self, layout: Layout) -> None:
        part = self.slice_of(layout)
        self._slice = OptimizedSlice(self.config, part.stop - part.start)
        self._target = np.zeros(part.stop - part.start, np.float32)
        self._finite = np.empty(part.stop - part.start, bool)

    def _reruns(self) -> dict[str, int]:
        """By kind, how often workers were begun again."""
        reruns: collections.Counter[str] = collections.Counter()
        for (kind, _), sessions in self._enlisted.items():
            reruns[kind] += len(sessions) - 1
        return dict(reruns)

    def _session(self, name: str) -> _Session:
        memory = self._sessions.setdefault(name, _Session())
        self._sessions.move_to_end(name)
        if len(self._sessions) > _MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return memory

    def _refusal(self, gradient: Any, version: int) -> tuple[str | None, str]:
        """Returns (reason, message), or (None, '') when the gradient may be applied."""
        if isinstance(gradient, str):
            return INVALID, gradient
        staleness = self._version - version
        if staleness > self.config.max_staleness:
            return STALE, (
                f'shard {self.index}: the gradient is {staleness} updates old, '
                f'max_staleness is {self.config.max_staleness}'
            )
        if staleness < 0:
            return STALE, (
                f'shard {self.index}: the gradient was computed from version {version}, the shard '
                f'is at {self._version}: it restarted from an older state; pull again'
            )
        if not np.isfinite(gradient[0], out=self._finite).all():
            return INVALID, f'shard {self.index}: the gradient is not finite'
        return None, ''

    def _apply(self, gradient: tf.Tensor) -> None:
        self._slice.step(gradient)
        self._version += 1
        if self._version % self.config.target_update_period == 0:
            self._slice.copy_parameters(self._target)
            self._target_version = self._version

    def _is_left(self) -> bool:
        return bool(self._owner) and time.monotonic() - self._renewed > LEASE_SECONDS

    def _clock(self) -> dict[str, Any]:
        return {
            'version': self._version,
            'target_version': self._target_version,
            'agent_steps': self._agent_steps,
            'stopping': self._stopping or self._is_left(),
        }
