"""The client: gradients and agent steps go to all shards at once, parameters come back.

Every wait is bounded by `timeout_seconds`. A broken stream (a shard restarted) is opened again
with exponential back-off and the message repeated; the shards count each message once.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from infra.parameter_server import checkpoint, protocol
from infra.parameter_server.connection import Request, ShardConnection, StreamBroken, Watchdog
from infra.parameter_server.layout import Layout
from infra.parameter_server.protocol import NotInitialisedError, ParameterServerUnavailable
from infra.parameter_server.shared_memory import PARAMETERS, TARGET

_FIRST_BACKOFF_SECONDS = 0.05
_LAST_BACKOFF_SECONDS = 1.0
# How long the first writer may take from shard 0 to the last before others finish its work.
_WINNER_SECONDS = 5.0
_RESTART_REMEDY = 'start it again, or check the address'


@dataclasses.dataclass(frozen=True)
class Clock:
    """The global clock, kept by shard 0.

    Attributes:
      updates: gradients applied.
      agent_steps: decisions of all actors.
      stopping: whether somebody requested a stop.
    """

    updates: int
    agent_steps: int
    stopping: bool


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Parameters as the shards had them, or the news that they have not changed.

    Attributes:
      parts: each shard's float32 [n], in order, together [layout.size]; None: not modified since
        this client last got them. See `copy_parts` of the client for how long they hold.
      versions: gradients applied, per shard; a gradient is pushed with those it was computed from.
      target_versions: the version at which each shard took its target network.
      clock: the global clock.
    """

    parts: tuple[np.ndarray, ...] | None
    versions: tuple[int, ...]
    target_versions: tuple[int, ...]
    clock: Clock

    @property
    def values(self) -> np.ndarray | None:
        """A copy of `parts` as one float32 [layout.size]; None: not modified."""
        return None if self.parts is None else np.concatenate(self.parts)


@dataclasses.dataclass(frozen=True)
class PushReply:
    """What became of a gradient.

    Attributes:
      snapshot: the parameters after it (no values when `pull` was false).
      rejected: per shard, None when it was applied, else 'stale' or 'invalid'.
      message: why the first refusing shard refused, '' when none did.
    """

    snapshot: Snapshot
    rejected: tuple[str | None, ...]
    message: str

    @property
    def reason(self) -> str | None:
        """The first refusal, None when every shard applied the gradient."""
        return next((reason for reason in self.rejected if reason), None)


class ParameterClient:
    """A connection to all shards; a context manager. Calls from several threads take turns."""

    def __init__(
        self,
        addresses: Sequence[str],
        layout: Layout,
        *,
        wire_dtype: str = 'float32',
        shared_memory: bool = True,
        copy_parts: bool = True,
        timeout_seconds: float = 30.0,
        tls_roots: bytes | None = None,
    ) -> None:
        """Prepares; the first call connects.

        Args:
          addresses: `host:port` of every shard, in order.
          layout: of the network.
          wire_dtype: 'float32' or 'bfloat16'; tensors in shared memory are always float32.
          shared_memory: whether to use it with shards on this host.
          copy_parts: whether a snapshot's parts are its own. Without, they are where the shards
            write the next ones: faster, and good until the next call for parameters or target.
          timeout_seconds: no call takes longer than about this.
          tls_roots: PEM, what the shards' certificates are signed by; None: no TLS.

        Raises:
          ValueError: there is no address, or the wire type does not exist.
        """
        _check_arguments(addresses, wire_dtype)
        self.layout = layout
        self._timeout_seconds = timeout_seconds
        self._copy_parts = copy_parts
        self._parts = layout.slices(len(addresses))
        self._connections = _connections(addresses, layout, wire_dtype, shared_memory, tls_roots)
        self._watchdog = Watchdog(self._connections)
        self._lock = threading.Lock()
        self._executor = concurrent.futures.ThreadPoolExecutor(1, 'parameter-push')
        self._outstanding: concurrent.futures.Future | None = None
        self._sequence = self._agent_steps = 0
        # What the shards sent last; a part stays as it is while its shard has nothing new.
        nothing = [None] * len(addresses)
        self._latest: dict[str, list[Any]] = {PARAMETERS: [*nothing], TARGET: [*nothing]}

    def __enter__(self) -> ParameterClient:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def initialise(self, values: np.ndarray) -> bool:
        """Offers the first parameters, float32 [layout.size]; the first writer wins on shard 0.

        Returns when every shard has parameters. A client that lost waits for the winner to reach
        the other shards; if the winner died on its way, its own values fill what is missing.

        Returns:
          Whether these values became the parameters.

        Raises:
          ValueError: the values have another size or are not finite.
          ParameterServerError: a shard refused, or did not answer in time.
        """
        values = self._check(values)
        if not np.isfinite(values).all():
            raise ValueError('first parameters must be finite; check the network')
        first = self._offer([0], values)[0]['first']
        rest = list(range(1, len(self._connections)))
        if not first:
            patience = min(_WINNER_SECONDS, self._timeout_seconds / 2)
            rest = self._wait_for_winner(rest, time.monotonic() + patience)
        if rest:
            self._offer(rest, values)
        return first

    def pull(self, agent_steps: int = 0) -> Snapshot:
        """Returns the parameters, and adds the agent steps made since the last call.

        Waits for the shards to be initialised. A call that failed is made good by the next one.

        Raises:
          NotInitialisedError: nobody initialised the shards in time.
          ParameterServerError: a shard refused, or did not answer in time.
        """
        with self._lock:
            self._agent_steps += agent_steps
            return self._pull('pull', PARAMETERS)

    def pull_target(self) -> Snapshot:
        """Returns the target network: the parameters at the last multiple of the target period.

        Raises:
          NotInitialisedError: nobody initialised the shards in time.
          ParameterServerError: a shard refused, or did not answer in time.
        """
        with self._lock:
            return self._pull('pull_target', TARGET)

    def push(self, gradient: np.ndarray, versions: Sequence[int], pull: bool = True) -> PushReply:
        """Sends a gradient, float32 [layout.size], and with `pull` gets the parameters after it.

        Args:
          gradient: of the loss, in layout order.
          versions: `Snapshot.versions` of the parameters it was computed from.
          pull: whether to bring parameters back in the same round trip.

        Raises:
          ValueError: the gradient or the versions have another length.
          NotInitialisedError: a shard restarted without a checkpoint; the others applied the
            gradient. `initialise` with the last values fills the empty one.
          ParameterServerError: a shard refused, or did not answer in time; the gradient may have
            been applied.
        """
        with self._lock:
            return self._push(self._stage(gradient, versions, pull, copy=False))

    def push_async(
        self, gradient: np.ndarray, versions: Sequence[int], pull: bool = True
    ) -> concurrent.futures.Future[PushReply]:
        """Like `push`, but returns once the gradient is copied; at most one may be outstanding.

        Raises:
          RuntimeError: the reply of the last one has not been waited for.
          ValueError: the gradient or the versions have another length.
        """
        if self._outstanding is not None and not self._outstanding.done():
            raise RuntimeError('a push is still outstanding; call result() on its future first')
        self._lock.acquire()
        try:
            requests = self._stage(gradient, versions, pull, copy=True)
            self._outstanding = self._executor.submit(self._push_and_release, requests)
        except BaseException:
            self._lock.release()
            raise
        return self._outstanding

    def report(self, timeout_seconds: float | None = None, owner: str = '') -> dict[str, Any]:
        """Returns {'shards': [counters per shard]}: versions, rejected {stale, invalid}, clients.

        Args:
          timeout_seconds: how long to wait; None: as long as for any other call.
          owner: the run that has claimed the shards, whose lease this prolongs; empty: nobody's.

        Raises:
          ParameterServerError: a shard did not answer in time.
        """
        everybody = range(len(self._connections))
        replies = self._ask(everybody, 'report', timeout_seconds, owner=owner)
        return {'shards': [reply['report'] for reply in replies]}

    def claim(self, owner: str) -> None:
        """Takes the shards for one run; a client that asks for them with another name is refused.

        The run must be heard of, by `report` with its name, or the clock says `stopping` after ten
        minutes.

        Raises:
          RequestRefusedError: another run has them.
          ParameterServerError: shard 0 did not answer in time.
        """
        self._ask([0], 'claim', owner=owner)

    def enlist(self, kind: str, worker: str) -> int:
        """Tells shard 0 which worker this client is of; returns how often it was begun before.

        Args:
          kind: of the worker, such as 'actor'.
          worker: its name among those of its kind.

        Raises:
          ParameterServerError: shard 0 did not answer in time.
        """
        return self._ask([0], 'enlist', kind=kind, worker=worker)[0]['before']

    def request_stop(self, timeout_seconds: float | None = None) -> None:
        """Makes the clock say `stopping` to everyone from now on.

        Args:
          timeout_seconds: how long to wait; None: as long as for any other call.

        Raises:
          ParameterServerError: shard 0 did not answer in time.
        """
        self._ask([0], 'stop', timeout_seconds)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes a checkpoint; others' updates go on meanwhile.

        Shards on this machine write their parts, those on others send theirs.

        Raises:
          FileExistsError: the directory already holds a checkpoint.
          OSError: it cannot be written.
          ParameterServerError: a shard could not write, or did not answer in time; the directory
            then is no checkpoint.
        """
        path = os.path.abspath(directory)
        if checkpoint.is_published(path):
            raise FileExistsError(f'{path} already holds a checkpoint; save to another directory')
        with self._lock:
            requests = [
                Request(each, {**self._header('save'), 'directory': path if each.is_here else None})
                for each in self._connections
            ]
            replies = self._exchange(requests)
        for request in requests:
            if request.reply_body is not None:
                checkpoint.unpack_part(path, request.reply_body.tobytes())
        checkpoint.publish(path, replies[0]['optimizer'], [reply['part'] for reply in replies])

    def close(self) -> None:
        """Ends the streams; waits a bounded time for an outstanding push."""
        self._executor.shutdown(wait=True)
        with self._lock:
            self._watchdog.close()
            for connection in self._connections:
                connection.close()

    def _check(self, values: np.ndarray) -> np.ndarray:
        values = np.ascontiguousarray(values, np.float32)
        if values.shape != (self.layout.size,):
            raise ValueError(
                f'values of shape {values.shape} do not fit the layout; pass [{self.layout.size}]'
            )
        return values

    def _offer(self, shards: list[int], values: np.ndarray) -> list[dict]:
        with self._lock:
            requests = []
            for shard in shards:
                connection = self._connections[shard]
                body = connection.stage(values[self._parts[shard]], exact=True)
                requests.append(Request(connection, self._header('initialise'), body))
            return self._exchange(requests)

    def _wait_for_winner(self, shards: list[int], deadline: float) -> list[int]:
        """Returns the shards that still have no parameters at the deadline."""
        while shards:
            replies = self._ask(shards, 'report')
            shards = [s for s, r in zip(shards, replies) if not r['report']['initialised']]
            if time.monotonic() > deadline:
                break
            if shards:
                time.sleep(_FIRST_BACKOFF_SECONDS)
        return shards

    def _pull(self, operation: str, tensor: str) -> Snapshot:
        requests = [
            Request(connection, self._header(operation), tensor=tensor)
            for connection in self._connections
        ]
        requests[0].header['agent_steps'] = self._agent_steps
        return self._snapshot(requests, self._exchange(requests, wait_initialised=True), tensor)

    def _stage(
        self, gradient: np.ndarray, versions: Sequence[int], pull: bool, copy: bool
    ) -> list[Request]:
        gradient = self._check(gradient)
        if len(versions) != len(self._connections):
            raise ValueError(
                f'{len(versions)} versions for {len(self._connections)} shards; '
                'pass the versions of a snapshot'
            )
        requests = []
        for connection, part, version in zip(self._connections, self._parts, versions):
            header = {**self._header('push'), 'version': int(version), 'pull': pull}
            body = connection.stage(gradient[part], copy=copy)
            requests.append(Request(connection, header, body, PARAMETERS))
        return requests

    def _push(self, requests: list[Request]) -> PushReply:
        replies = self._exchange(requests)
        return PushReply(
            snapshot=self._snapshot(requests, replies, PARAMETERS),
            rejected=tuple(reply['rejected'] for reply in replies),
            message=next((reply['message'] for reply in replies if reply['rejected']), ''),
        )

    def _push_and_release(self, requests: list[Request]) -> PushReply:
        try:
            return self._push(requests)
        finally:
            self._lock.release()

    def _snapshot(self, requests: list[Request], replies: list[dict], tensor: str) -> Snapshot:
        parts = self._latest[tensor]
        modified = False
        for shard, (request, reply) in enumerate(zip(requests, replies)):
            if request.reply_body is not None:
                modified = True
                parts[shard] = request.reply_body.copy() if self._copy_parts else request.reply_body
            request.remember(reply)
        return Snapshot(
            parts=tuple(parts) if modified else None,
            versions=tuple(reply['version'] for reply in replies),
            target_versions=tuple(reply['target_version'] for reply in replies),
            clock=Clock(replies[0]['version'], replies[0]['agent_steps'], replies[0]['stopping']),
        )

    def _header(self, operation: str) -> dict[str, Any]:
        self._sequence += 1
        return {'operation': operation, 'sequence': self._sequence, 'agent_steps': 0}

    def _ask(
        self,
        shards: Sequence[int],
        operation: str,
        timeout_seconds: float | None = None,
        **fields: Any,
    ) -> list[dict]:
        with self._lock:
            requests = [
                Request(self._connections[s], {**self._header(operation), **fields}) for s in shards
            ]
            return self._exchange(requests, timeout_seconds=timeout_seconds)

    def _exchange(
        self,
        requests: list[Request],
        wait_initialised: bool = False,
        timeout_seconds: float | None = None,
    ) -> list[dict]:
        """Sends all requests, then collects all replies; repeats those whose stream broke."""
        deadline = time.monotonic() + (timeout_seconds or self._timeout_seconds)
        replies: list[dict | None] = [None] * len(requests)
        backoff = _FIRST_BACKOFF_SECONDS
        while True:
            pending = [i for i, reply in enumerate(replies) if reply is None]
            with self._watchdog.until(deadline):
                problem = self._attempt(requests, replies, pending, deadline, wait_initialised)
            if problem is None:
                return replies  # type: ignore[return-value]
            if time.monotonic() + backoff > deadline:
                raise problem
            time.sleep(backoff)
            backoff = min(2 * backoff, _LAST_BACKOFF_SECONDS)

    def _attempt(
        self,
        requests: list[Request],
        replies: list[dict | None],
        pending: list[int],
        deadline: float,
        wait_initialised: bool,
    ) -> ParameterServerUnavailable | None:
        """Fills in `replies`; returns the first problem that may pass with time."""
        problem: ParameterServerUnavailable | None = None
        sent = []
        for index in pending:
            try:
                requests[index].send(deadline)
                sent.append(index)
            except StreamBroken as broken:
                problem = problem or _unavailable(requests[index], broken)
        failure: Exception | None = None
        for index in sent:
            try:
                reply = requests[index].receive()
            except StreamBroken as broken:
                problem = problem or _unavailable(requests[index], broken)
                continue
            failure = failure or _failure(requests[index], reply, wait_initialised)
            if reply.get('error') is None:
                replies[index] = reply
            elif failure is None:
                problem = problem or _uninitialised(requests[index])
        # Only now: every reply on its way had to be read, or the streams would be out of step.
        if failure is not None:
            raise failure
        return problem


def _check_arguments(addresses: Sequence[str], wire_dtype: str) -> None:
    if not addresses:
        raise ValueError('no parameter shard given; pass at least one host:port')
    if wire_dtype not in protocol.WIRE_TYPES:
        raise ValueError(
            f'wire_dtype is {wire_dtype!r}; use one of {", ".join(protocol.WIRE_TYPES)}'
        )


def _connections(
    addresses: Sequence[str],
    layout: Layout,
    wire_dtype: str,
    shared_memory: bool,
    tls_roots: bytes | None,
) -> list[ShardConnection]:
    """One for each shard, none of them open yet."""
    hello = {
        'protocol': protocol.PROTOCOL_VERSION,
        'session': uuid.uuid4().hex,
        'layout': layout.to_json(),
        'num_shards': len(addresses),
        'wire_dtype': wire_dtype,
    }
    sizes = [part.stop - part.start for part in layout.slices(len(addresses))]
    return [
        ShardConnection(address, {**hello, 'shard': shard}, size, shared_memory, tls_roots)
        for shard, (address, size) in enumerate(zip(addresses, sizes))
    ]


def _failure(request: Request, reply: dict, wait_initialised: bool) -> Exception | None:
    """Returns the error that asking again cannot mend."""
    error = reply.get('error')
    if error is None or (error == protocol.UNINITIALISED and wait_initialised):
        return None
    if error == protocol.UNINITIALISED:
        return _uninitialised(request)
    address = request.connection.address
    return protocol.ERRORS[error](f'parameter shard {address}: {reply["message"]}')


def _uninitialised(request: Request) -> NotInitialisedError:
    return NotInitialisedError(
        request.connection.address,
        'it has no parameters',
        'call initialise(), or restart it with --restore',
    )


def _unavailable(request: Request, broken: StreamBroken) -> ParameterServerUnavailable:
    return ParameterServerUnavailable(request.connection.address, str(broken), _RESTART_REMEDY)
