"""One client's stream to one shard: requests in, replies out; reports broken streams."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from infra.parameter_server import health, protocol
from infra.parameter_server.shared_memory import (
    GRADIENT,
    PARAMETERS,
    TARGET,
    Segment,
    host_identity,
    is_loopback,
)

_WATCH_SECONDS = 0.2
_NOTHING = {PARAMETERS: -1, TARGET: -1}
_BROKEN = (flight.FlightError, pa.ArrowException, StopIteration, OSError)


class StreamBroken(Exception):
    """The stream ended or was cancelled; the client may open another."""


class ShardConnection:
    """A stream that opens on demand, with shared memory where shard and client allow it.

    Attributes:
      address: `host:port`.
      known: revision of each tensor that this client holds; -1 for none. Reset with the stream,
        since revisions of different servers are not comparable.
    """

    def __init__(
        self,
        address: str,
        hello: dict[str, Any],
        size: int,
        shared_memory: bool,
        tls_roots: bytes | None = None,
    ) -> None:
        """
        Args:
          address: `host:port` of the shard.
          hello: header of the first message, without the segment.
          size: number of parameters of the shard.
          shared_memory: whether to use shared memory with a shard on this host.
          tls_roots: PEM roots of the shard's certificate; None for no TLS.
        """
        self.address = address
        self._tls_roots = tls_roots
        self.known = dict(_NOTHING)
        self._hello = hello
        self._size = size
        self._wire_dtype = hello['wire_dtype']
        self.is_here = is_loopback(address.rpartition(':')[0])
        self._wants_segment = shared_memory and self.is_here
        self._segment: Segment | None = None
        self._client: flight.FlightClient | None = None
        self._writer: Any = None
        self._reader: Any = None

    def connect(self, deadline: float) -> None:
        """Opens the stream unless it is open.

        Raises:
          StreamBroken: the shard does not reply.
          LayoutMismatchError, RequestRefusedError: the shard refuses this client.
        """
        if self._reader is not None:
            return
        try:
            reply = self._open(deadline)
        except (*_BROKEN, ValueError) as error:
            self.drop()
            raise StreamBroken(_first_line(error)) from error
        if 'error' in reply:
            self.drop()
            error_class = protocol.ERRORS[reply['error']]
            raise error_class(f'parameter shard {self.address}: {reply["message"]}')

    def stage(self, values: np.ndarray, copy: bool = False, exact: bool = False) -> np.ndarray:
        """Prepares values for `send`.

        Args:
          values: float32 [size].
          copy: whether the caller may change `values` before `send`.
          exact: whether to send float32 whatever the wire type.

        Returns:
          The array to pass to `send`: in shared memory, or of the wire type.
        """
        if self._segment is not None:
            np.copyto(self._segment.tensors[GRADIENT], values)
            return self._segment.tensors[GRADIENT]
        wire_type = protocol.WIRE_TYPES['float32' if exact else self._wire_dtype]
        if not copy and wire_type == values.dtype:
            return values
        staged = np.empty(values.size, wire_type)
        protocol.convert(values, staged)
        return staged

    def send(self, header: dict[str, Any], body: np.ndarray | None) -> None:
        """Sends one message on the open stream; raises StreamBroken."""
        try:
            metadata = protocol.encode_header(header)
            if body is not None and self._segment is not None:
                if body is not self._segment.tensors[GRADIENT]:
                    protocol.convert(body, self._segment.tensors[GRADIENT])
                body = None
            if body is None:
                self._writer.write_metadata(metadata)
                return
            if header['operation'] != 'initialise' and body.dtype.name != self._wire_dtype:
                converted = np.empty(body.size, protocol.WIRE_TYPES[self._wire_dtype])
                protocol.convert(body, converted)
                body = converted
            self._writer.write_with_metadata(protocol.encode_body(body), metadata)
        except _BROKEN as error:
            self.drop()
            raise StreamBroken(_first_line(error)) from error

    def receive(self, tensor: str | None) -> tuple[dict[str, Any], np.ndarray | None]:
        """Returns the next reply's header and its values, None if it has none.

        Values are float32 [size]; in shared memory the next reply overwrites them. A reply with
        `octets` has bytes instead, uint8 [n].

        Args:
          tensor: `PARAMETERS` or `TARGET`, the tensor requested; None for none.

        Raises:
          StreamBroken: no reply arrives, or it is malformed.
        """
        try:
            chunk = self._reader.read_chunk()
            header = protocol.decode_header(chunk.app_metadata, protocol.LARGEST_REPLY_BYTES)
            if chunk.data is not None:
                octets = header.get('octets')
                values = protocol.decode_octets(chunk.data) if octets else self._decode(chunk.data)
                return header, values
        except (*_BROKEN, ValueError) as error:
            self.drop()
            raise StreamBroken(_first_line(error)) from error
        if tensor is None or self._segment is None or not header.get('modified'):
            return header, None
        return header, self._segment.tensors[tensor]

    def cancel(self) -> None:
        """Interrupts a thread that waits on the stream; called from another thread."""
        reader = self._reader
        if reader is not None:
            reader.cancel()

    def close(self) -> None:
        """Signals the end of requests to the shard and drops the stream."""
        if self._writer is not None:
            with contextlib.suppress(*_BROKEN):
                self._writer.done_writing()
        self.drop()

    def drop(self) -> None:
        """Cancels the stream; the next message opens another."""
        reader, self._reader = self._reader, None
        writer, self._writer = self._writer, None
        client, self._client = self._client, None
        self._segment = None
        self.known = dict(_NOTHING)
        # Cancels first, so that closing does not wait for a shard that hangs.
        for end in (reader and reader.cancel, writer and writer.close, client and client.close):
            with contextlib.suppress(*_BROKEN):
                if end is not None:
                    end()

    def _open(self, deadline: float) -> dict[str, Any]:
        self._client = health.connect(self.address, self._tls_roots)
        # Calls with a time-out first, because opening the stream may block for ever.
        health.ask(self._client, max(0.05, deadline - time.monotonic()))
        descriptor = flight.FlightDescriptor.for_command(b'parameters')
        self._writer, self._reader = self._client.do_exchange(descriptor)
        self._writer.begin(protocol.SCHEMA)
        segment = self._create_segment()
        try:
            offer = segment and {'name': segment.name, 'host': host_identity()}
            hello = {**self._hello, 'segment': offer}
            self._writer.write_metadata(protocol.encode_header(hello))
            metadata = self._reader.read_chunk().app_metadata
            reply = protocol.decode_header(metadata, protocol.LARGEST_REPLY_BYTES)
        finally:
            if segment is not None:
                segment.unlink()
        self._segment = segment if reply.get('shared_memory') else None
        return reply

    def _decode(self, batch: pa.RecordBatch) -> np.ndarray:
        values = protocol.decode_body(batch, self._wire_dtype)
        if values.size != self._size:
            raise ValueError(f'{values.size} values came instead of {self._size}')
        if values.dtype == np.float32:
            return values
        converted = np.empty(self._size, np.float32)
        protocol.convert(values, converted)
        return converted

    def _create_segment(self) -> Segment | None:
        if not self._wants_segment or host_identity() is None:
            return None
        try:
            return Segment.create(self._size)
        except OSError:
            return None  # A full or absent /dev/shm costs speed, not the run.


class Request:
    """One message to one shard, which can be repeated after its stream breaks.

    Attributes:
      connection: to the shard.
      header: operation and arguments; a repetition has the same sequence number.
      reply_body: the values of the last reply, float32 [size], or its bytes, uint8 [n].
    """

    def __init__(
        self,
        connection: ShardConnection,
        header: dict[str, Any],
        body: np.ndarray | None = None,
        tensor: str | None = None,
    ) -> None:
        self.connection = connection
        self.header = header
        self.reply_body: np.ndarray | None = None
        self._body = body
        self._tensor = tensor

    def send(self, deadline: float) -> None:
        """Opens the stream if necessary and sends; raises StreamBroken or as `connect` does."""
        self.connection.connect(deadline)
        if self._tensor is not None:
            self.header['known'] = self.connection.known[self._tensor]
        self.connection.send(self.header, self._body)

    def receive(self) -> dict[str, Any]:
        """Returns the reply's header; raises StreamBroken."""
        reply, self.reply_body = self.connection.receive(self._tensor)
        if reply.get('sequence') != self.header['sequence']:
            self.connection.drop()
            raise StreamBroken(f'reply {reply.get("sequence")} to {self.header["sequence"]}')
        return reply

    def remember(self, reply: dict[str, Any]) -> None:
        """Records the revision that the client now holds."""
        if self._tensor is not None and reply.get('modified'):
            revision = 'target_revision' if self._tensor == TARGET else 'revision'
            self.connection.known[self._tensor] = reply[revision]


class Watchdog:
    """Cancels the streams of a call that runs past its deadline: Flight reads have no time-out."""

    def __init__(self, connections: Sequence[ShardConnection]) -> None:
        self._connections = connections
        self._deadline = float('inf')
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def until(self, deadline: float) -> Iterator[None]:
        """Applies the deadline to the calls made in the context."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        self._deadline = deadline
        try:
            yield
        finally:
            self._deadline = float('inf')

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(_WATCH_SECONDS):
            if time.monotonic() > self._deadline:
                for connection in self._connections:
                    connection.cancel()


def _first_line(error: Exception) -> str:
    if isinstance(error, StopIteration):
        return 'the stream ended'
    return str(error).split('. gRPC client debug context')[0].splitlines()[0]
