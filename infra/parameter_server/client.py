"""The client of all parameter shards: gradients and agent steps in, parameters and the clock out.

Every wait is bounded by `timeout_seconds`. When a stream breaks, for instance because a shard
restarts, the client reconnects with exponential back-off and repeats the message. The shards count
each message once.
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
from infra.parameter_server.connection import Request, ShardConnection, StreamBroken
from infra.parameter_server.layout import Layout
from infra.parameter_server.protocol import NotInitialisedError, ParameterServerUnavailable
from infra.parameter_server.shared_memory import PARAMETERS, TARGET
from infra.parameter_server.wire import WIRES
from infra.tls import client_context

_FIRST_BACKOFF_SECONDS = 0.05
_LAST_BACKOFF_SECONDS = 1.0
# Time for the first writer to initialise all shards before another client completes its work.
_WINNER_SECONDS = 5.0
_RESTART_REMEDY = 'start it again, or check the address'


@dataclasses.dataclass(frozen=True)
class Clock:
    """The global clock, kept by shard 0.

    Attributes:
      updates: gradients applied.
      agent_steps: decisions of all actors.
      stopping: whether workers must end.
    """

    updates: int
    agent_steps: int
    stopping: bool


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Parameters of all shards, or only their versions if no shard has newer ones.

    Attributes:
      parts: one float32 [n] per shard, in order, together [layout.size]; None if unchanged since
        this client's last call. The client's `copy_parts` sets how long they stay valid.
      version: global updates in them, as shard 0 counts; a push names the version of the parameters
        that its gradient was computed from.
      target_versions: global update of each shard's target network.
      clock: the global clock.
    """

    parts: tuple[np.ndarray, ...] | None
    version: int
    target_versions: tuple[int, ...]
    clock: Clock

    @property
    def values(self) -> np.ndarray | None:
        """A copy of `parts` as one float32 [layout.size]; None if unchanged."""
        return None if self.parts is None else np.concatenate(self.parts)


@dataclasses.dataclass(frozen=True)
class PushReply:
    """The shards' reply to a gradient.

    Attributes:
      snapshot: the parameters after the push (without values if it was applied and `pull` false).
      rejected: None if the gradient was applied, else 'stale' or 'invalid'.
      message: reason of the rejection, else ''.
      staleness: updates made since the parameters that the gradient was computed from.
    """

    snapshot: Snapshot
    rejected: str | None
    message: str
    staleness: int


class ParameterClient:
    """A connection to all shards; a context manager. Calls from several threads run in turn.

    Attributes:
      layout: of the network.
      connections: one stream to each shard, in order.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        layout: Layout,
        *,
        wire: str = 'float32',
        shared_memory: bool = True,
        copy_parts: bool = True,
        timeout_seconds: float = 30.0,
        tls_roots: bytes | None = None,
    ) -> None:
        """Checks the arguments; the first call connects.

        Args:
          addresses: `host:port` of every shard, in order.
          layout: of the network.
          wire: of `WIRES`; tensors in shared memory are always float32.
          shared_memory: whether to exchange tensors with shards on this host in shared memory.
          copy_parts: whether a snapshot owns its parts, or a later pull (failed too) changes them.
          timeout_seconds: approximate bound of a call; a push has two steps and twice the bound.
          tls_roots: PEM roots of the shards' certificates; None for no TLS.

        Raises:
          ValueError: `addresses` is empty, one is not `host:port`, or the wire is unknown.
        """
        _check_arguments(addresses, wire)
        self.layout = layout
        self._timeout_seconds = timeout_seconds
        self._copy_parts = copy_parts
        self._parts = layout.slices(len(addresses))
        self._transport: tuple[Any, ...] = wire, shared_memory, tls_roots
        self.connections = _connections(addresses, layout, *self._transport)
        self._lock = threading.Lock()
        self._executor = concurrent.futures.ThreadPoolExecutor(1, 'parameter-push')
        self._outstanding: concurrent.futures.Future | None = None
        self._sequence = self._agent_steps = 0
        self._clock = Clock(0, 0, False)  # the latest seen; never runs backwards
        # The last parts of each shard; a shard sends its part only if it has changed.
        nothing: list[Any] = [None] * len(addresses)
        self._latest = {PARAMETERS: [*nothing], TARGET: [*nothing]}

    def __enter__(self) -> ParameterClient:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def another(self) -> ParameterClient:
        """A client of the same shards with the same settings and connections of its own."""
        wire, shared_memory, tls_roots = self._transport
        return ParameterClient(
            [connection.address for connection in self.connections],
            self.layout,
            wire=wire,
            shared_memory=shared_memory,
            copy_parts=self._copy_parts,
            timeout_seconds=self._timeout_seconds,
            tls_roots=tls_roots,
        )

    def initialise(self, values: np.ndarray) -> bool:
        """Offers initial parameters, float32 [layout.size]; shard 0 accepts those of one client.

        Returns once every shard has parameters. A client whose offer was not accepted waits for the
        winner to initialise the other shards. If the winner fails meanwhile, this client's values
        initialise the remaining shards.

        Returns:
          Whether shard 0 accepted these values.

        Raises:
          ValueError: the size of the values is wrong, or they are not finite.
          ParameterServerError: a shard refuses the request, or does not reply in time.
        """
        values = self._check(values)
        if not np.isfinite(values).all():
            raise ValueError('first parameters must be finite; check the network')
        first = self._offer([0], values)[0]['first']
        rest = list(range(1, len(self.connections)))
        if not first:
            patience = min(_WINNER_SECONDS, self._timeout_seconds / 2)
            rest = self._wait_for_winner(rest, time.monotonic() + patience)
        if rest:
            self._offer(rest, values)
        return first

    def pull(self, agent_steps: int = 0) -> Snapshot:
        """Reports the agent steps made since the last call and returns the parameters.

        Waits until the shards are initialised. If a call fails, the next one reports its steps too.

        Raises:
          NotInitialisedError: a shard is not initialised in time.
          ParameterServerError: a shard refuses the request, or does not reply in time.
        """
        with self._lock:
            self._agent_steps += agent_steps
            return self._pull('pull', PARAMETERS)

    def pull_target(self) -> Snapshot:
        """Returns the target network: the parameters at the last multiple of the target period.

        Raises:
          NotInitialisedError: a shard is not initialised in time.
          ParameterServerError: a shard refuses the request, or does not reply in time.
        """
        with self._lock:
            return self._pull('pull_target', TARGET)

    def push(self, gradient: np.ndarray, version: int, pull: bool = True) -> PushReply:
        """Pushes a gradient, float32 [layout.size]; with `pull` the reply has the new parameters.

        Shard 0 accepts or rejects the gradient; the other shards receive accepted ones only. A
        gradient that is not finite, or has a norm above `protocol.LARGEST_NORM`, is not sent and
        counts as invalid.

        Args:
          gradient: of the loss, in layout order.
          version: `Snapshot.version` of the parameters it was computed from.
          pull: whether the replies carry parameters; after a rejection they always do.

        Raises:
          ValueError: the length of the gradient is wrong.
          NotInitialisedError: a shard restarted without a checkpoint; others may have applied the
            gradient. `initialise` with the last values fills the empty shard.
          ParameterServerError: a shard refuses the request, or does not reply in time; the gradient
            may have been applied.
        """
        with self._lock:
            return self._push(self._stage(gradient, version, pull, copy=False))

    def push_async(
        self, gradient: np.ndarray, version: int, pull: bool = True
    ) -> concurrent.futures.Future[PushReply]:
        """Like `push`, but returns once the gradient is copied; at most one may be outstanding.

        Raises:
          RuntimeError: the previous push is still outstanding.
          ValueError: the length of the gradient is wrong.
        """
        if self._outstanding is not None and not self._outstanding.done():
            raise RuntimeError('a push is still outstanding; call result() on its future first')
        self._lock.acquire()
        try:
            requests = self._stage(gradient, version, pull, copy=True)
            self._outstanding = self._executor.submit(self._push_and_release, requests)
        except BaseException:
            self._lock.release()
            raise
        return self._outstanding

    def report(self, timeout_seconds: float | None = None, owner: str = '') -> dict[str, Any]:
        """Returns {'shards': [counters per shard]}: versions, rejected {stale, invalid}, clients.

        Args:
          timeout_seconds: bound of the wait; None for the client's own bound.
          owner: the run whose lease on the shards this renews; empty to renew none.

        Raises:
          ParameterServerError: a shard does not reply in time, or belongs to another run.
        """
        everybody = range(len(self.connections))
        replies = self._ask(everybody, 'report', timeout_seconds, owner=owner)
        return {'shards': [reply['report'] for reply in replies]}

    def claim(self, owner: str) -> None:
        """Claims the shards for a run; claims of other runs are refused from then on.

        The run must renew its lease by `report` with its name. After ten minutes without, the clock
        says `stopping`.

        Raises:
          RequestRefusedError: the shards belong to another run.
          ParameterServerError: shard 0 does not reply in time.
        """
        self._ask([0], 'claim', owner=owner)

    def enlist(self, kind: str, worker: str) -> int:
        """Registers this client's worker with shard 0; returns how often it was started before.

        Args:
          kind: kind of the worker, such as 'actor'.
          worker: its name, unique among workers of that kind.

        Raises:
          ParameterServerError: shard 0 refuses the request, or does not reply in time.
        """
        return self._ask([0], 'enlist', kind=kind, worker=worker)[0]['before']

    def begin_segments(self, kind: str, worker: int, committed: int) -> tuple[int, list[str]]:
        """Returns what shard 0 knows of a worker's segments (see `Ledger.begin`).

        Args:
          kind: kind of the worker.
          worker: its number.
          committed: number of the first segment whose results the engine has not committed.

        Raises:
          ParameterServerError: shard 0 refuses the request, or does not reply in time.
        """
        reply = self._ask([0], 'begin_segments', kind=kind, number=worker, committed=committed)[0]
        return reply['first'], reply['records']

    def finish_segment(self, kind: str, worker: int, first: int, segment: int, record: str) -> int:
        """Records a finished segment at shard 0; returns the next one (see `Ledger.finish`).

        Raises:
          ParameterServerError: shard 0 refuses the request, or does not reply in time.
        """
        values: dict[str, Any] = {'first': first, 'segment': segment, 'record': record}
        return self._ask([0], 'finish_segment', kind=kind, number=worker, **values)[0]['next']

    def commit_segments(self) -> None:
        """Drops all records of segments: the engine has committed the results of every element.

        Raises:
          ParameterServerError: shard 0 does not reply in time.
        """
        self._ask([0], 'commit_segments')

    def request_stop(self, timeout_seconds: float | None = None) -> None:
        """Makes every later clock say `stopping`.

        Args:
          timeout_seconds: bound of the wait; None for the client's own bound.

        Raises:
          ParameterServerError: shard 0 does not reply in time.
        """
        self._ask([0], 'stop', timeout_seconds)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes a checkpoint while other clients' updates continue.

        A shard on this machine writes its part itself if the directory is below its checkpoint
        root. Other shards send their parts to this client.

        Raises:
          FileExistsError: the directory already holds a checkpoint.
          OSError: the directory is not writable.
          ParameterServerError: a shard fails to write, or does not reply in time; the directory
            then is no checkpoint.
        """
        path = os.path.abspath(directory)
        if checkpoint.is_published(path):
            raise FileExistsError(f'{path} already holds a checkpoint; save to another directory')
        os.makedirs(path, exist_ok=True)  # shards write only to an existing directory
        with self._lock:
            requests = [
                Request(each, {**self._header('save'), 'directory': path if each.is_here else None})
                for each in self.connections
            ]
            replies = self._exchange(requests)
        for request in requests:
            if request.reply_body is not None:
                checkpoint.unpack_part(path, request.reply_body.tobytes())
        checkpoint.publish(path, replies[0]['optimizer'], [reply['part'] for reply in replies])

    def close(self) -> None:
        """Closes the streams; waits a bounded time for an outstanding push."""
        self._executor.shutdown(wait=True)
        with self._lock:
            for connection in self.connections:
                connection.drop()

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
                connection = self.connections[shard]
                body = values[self._parts[shard]]
                requests.append(Request(connection, self._header('initialise'), body))
            return self._exchange(requests)

    def _wait_for_winner(self, shards: list[int], deadline: float) -> list[int]:
        """Returns the shards that have no parameters at the deadline."""
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
            for connection in self.connections
        ]
        requests[0].header['agent_steps'] = self._agent_steps
        return self._snapshot(requests, self._exchange(requests, wait_initialised=True), tensor)

    def _stage(self, gradient: np.ndarray, version: int, pull: bool, copy: bool) -> list[Request]:
        gradient = self._check(gradient)
        flaw = (
            '' if protocol.is_applicable(gradient) else 'the gradient is not finite, or too large'
        )
        requests = []
        for shard, (connection, part) in enumerate(zip(self.connections, self._parts)):
            header = self._header('apply' if shard else 'push')
            header |= {'pull': pull, 'flaw': flaw}
            body = gradient[part]
            if copy and not flaw:
                body = connection.stage(body)
            requests.append(Request(connection, header, None if flaw else body, PARAMETERS))
        requests[0].header['version'] = int(version)
        return requests

    def _push(self, requests: list[Request]) -> PushReply:
        """Sends the gradient to shard 0, then to the other shards if shard 0 accepts it."""
        judge, *others = requests
        verdict = self._exchange([judge])[0]
        replies = [verdict]
        if verdict['rejected'] is None:
            judge.accepted()
            for request in others:
                request.header['update'] = verdict['update']
            replies += self._exchange(others)
            for request, reply in zip(others, replies[1:]):
                if reply['rejected'] is None:
                    request.accepted()
            snapshot = self._snapshot(requests, replies, PARAMETERS)
        else:
            snapshot = self._pull('pull', PARAMETERS)  # so that the next gradient is not stale
        refused = next((reply for reply in replies if reply['rejected']), verdict)
        return PushReply(snapshot, refused['rejected'], refused['message'], verdict['staleness'])

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
        first, seen = replies[0], self._clock
        self._clock = Clock(
            updates=max(first['version'], seen.updates),
            agent_steps=max(first['agent_steps'], seen.agent_steps),
            stopping=first['stopping'],
        )
        return Snapshot(
            parts=tuple(parts) if modified else None,
            version=first['version'],
            target_versions=tuple(reply['target_version'] for reply in replies),
            clock=self._clock,
        )

    def _header(self, operation: str) -> dict[str, Any]:
        self._sequence += 1
        return {
            'operation': operation,
            'sequence': self._sequence,
            'agent_steps': 0,
            # Moves the clock of a shard that restarted from an older state.
            'seen_updates': self._clock.updates,
            'seen_agent_steps': self._clock.agent_steps,
        }

    def _ask(
        self,
        shards: Sequence[int],
        operation: str,
        timeout_seconds: float | None = None,
        **fields: Any,
    ) -> list[dict]:
        with self._lock:
            requests = [
                Request(self.connections[s], {**self._header(operation), **fields}) for s in shards
            ]
            return self._exchange(requests, timeout_seconds=timeout_seconds)

    def _exchange(
        self,
        requests: list[Request],
        wait_initialised: bool = False,
        timeout_seconds: float | None = None,
    ) -> list[dict]:
        """Sends all requests, then collects all replies; repeats requests whose stream broke."""
        deadline = time.monotonic() + (timeout_seconds or self._timeout_seconds)
        replies: list[dict | None] = [None] * len(requests)
        backoff = _FIRST_BACKOFF_SECONDS
        while True:
            pending = [i for i, reply in enumerate(replies) if reply is None]
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
        """Fills in `replies`; returns the first problem that a repetition may solve.

        Raises the first failure that a repetition cannot solve.
        """
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
        # Raised only after every pending reply is read, to keep requests and replies in step.
        if failure is not None:
            raise failure
        return problem


def _check_arguments(addresses: Sequence[str], wire: str) -> None:
    if not addresses:
        raise ValueError('no parameter shard given; pass at least one host:port')
    if wire not in WIRES:
        raise ValueError(f'wire is {wire!r}; use one of {", ".join(WIRES)}')


def _connections(
    addresses: Sequence[str],
    layout: Layout,
    wire: str,
    shared_memory: bool,
    tls_roots: bytes | None,
) -> list[ShardConnection]:
    """Creates one connection per shard, not yet open."""
    hello = {
        'protocol': protocol.PROTOCOL_VERSION,
        'session': uuid.uuid4().hex,
        'layout': layout.to_json(),
        'num_shards': len(addresses),
        'wire': wire,
    }
    sizes = [part.stop - part.start for part in layout.slices(len(addresses))]
    tls = client_context(tls_roots) if tls_roots else None
    return [
        ShardConnection(address, {**hello, 'shard': shard}, size, shared_memory, tls)
        for shard, (address, size) in enumerate(zip(addresses, sizes))
    ]


def _failure(request: Request, reply: dict, wait_initialised: bool) -> Exception | None:
    """Returns the reply's error if a repetition cannot solve it."""
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
