"""One client's stream to one shard: requests in, replies out; reports broken streams."""

from __future__ import annotations

import ssl
from typing import Any

import numpy as np

from infra.addresses import split_address
from infra.parameter_server import channel, protocol
from infra.parameter_server.shared_memory import (
    GRADIENT,
    PARAMETERS,
    TARGET,
    Segment,
    host_identity,
    is_loopback,
)
from infra.parameter_server.wire import FLOAT32, WIRES, Feedback

_NOTHING = {PARAMETERS: -1, TARGET: -1}
# A part of a checkpoint holds the parameters, the target and an optimizer's few vectors.
_MOST_VECTORS = 16


class StreamBroken(Exception):
    """The stream ended or timed out; the client may open another."""


class ShardConnection:
    """A stream that opens on demand, with shared memory where shard and client allow it.

    Attributes:
      address: `host:port`.
      is_here: whether the shard is on this host.
      known: revision of each tensor that this client holds; -1 for none. Reset with the stream,
        since revisions of different servers are not comparable.
      channel: the open stream; None while it is closed.
      shared: whether the open stream's tensors are in shared memory.
      feedback: encodes this stream's gradients for the network.
    """

    def __init__(
        self,
        address: str,
        hello: dict[str, Any],
        size: int,
        shared_memory: bool,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """
        Args:
          address: `host:port` of the shard.
          hello: header of the first message, without the segment.
          size: number of parameters of the shard.
          shared_memory: whether to use shared memory with a shard on this host.
          tls: context of a TLS client; None for no TLS.
        """
        self.address = address
        self.known = dict(_NOTHING)
        self.channel: channel.Channel | None = None
        self._tls = tls
        self._hello = hello
        self._size = size
        wire = WIRES[hello['wire']]
        self.feedback = Feedback(wire.gradients, size)
        self._parameter_encoding = wire.parameters
        self._received = np.empty(wire.parameters.most_bytes(size), np.uint8)
        self.is_here = is_loopback(split_address(address)[0])
        self._wants_segment = shared_memory and self.is_here
        self._segment = Segment.private(size)
        self.shared = False

    def connect(self, deadline: float) -> None:
        """Opens the stream unless it is open; sends and receives wait until the deadline at most.

        Raises:
          StreamBroken: the shard does not reply.
          LayoutMismatchError, RequestRefusedError: the shard refuses this client.
        """
        if self.channel is not None:
            self.channel.wait_until(deadline)
            return
        try:
            self.channel = channel.connect(self.address, deadline, self._tls)
            reply = self._introduce(self.channel)
        except (OSError, ValueError) as error:
            raise self._broken(error) from error
        if 'error' in reply:
            self.drop()
            error_class = protocol.ERRORS[reply['error']]
            raise error_class(f'parameter shard {self.address}: {reply["message"]}')

    def stage(self, values: np.ndarray) -> np.ndarray:
        """Copies values, float32 [size], to where the shard reads them if memory is shared.

        Returns the copy. A copy that is there already stays.
        """
        place = self._segment.tensors[GRADIENT]
        if values is not place:
            np.copyto(place, values)
        return place

    def send(self, header: dict[str, Any], body: np.ndarray | None) -> None:
        """Sends one message on the open stream.

        Args:
          header: of the message.
          body: contiguous; None for none.

        Raises:
          StreamBroken: the shard does not take the message in time.
        """
        assert self.channel is not None
        try:
            self.channel.send(header, body)
        except OSError as error:
            raise self._broken(error) from error

    def receive(self, tensor: str | None) -> tuple[dict[str, Any], np.ndarray | None]:
        """Returns the next reply's header and its values, None if it has none.

        Values are float32 [size]; the next reply with the same tensor overwrites them. A reply with
        `octets` has bytes instead, uint8 [n].

        Args:
          tensor: `PARAMETERS` or `TARGET`, the tensor requested; None for none.

        Raises:
          StreamBroken: no reply arrives in time, or it is malformed.
        """
        assert self.channel is not None
        try:
            header, body_bytes = self.channel.receive(channel.LARGEST_REPLY_BYTES)
            if body_bytes:
                return header, self._body(self.channel, body_bytes, tensor)
        except (OSError, ValueError) as error:
            raise self._broken(error) from error
        if tensor is None or not self.shared or not header.get('modified'):
            return header, None
        return header, self._segment.tensors[tensor]

    def drop(self) -> None:
        """Closes the stream; the next message opens another."""
        stream, self.channel = self.channel, None
        self.known = dict(_NOTHING)
        if self.shared:  # the shard may still read there
            self._segment, self.shared = Segment.private(self._size), False
        if stream is not None:
            stream.close()

    def _broken(self, error: Exception) -> StreamBroken:
        self.drop()
        return StreamBroken(str(error) or type(error).__name__)

    def _introduce(self, stream: channel.Channel) -> dict[str, Any]:
        """Sends the first message, with an offer of shared memory; returns the reply."""
        segment = self._create_segment()
        try:
            offer = segment and {'name': segment.name, 'host': host_identity()}
            stream.send({**self._hello, 'segment': offer})
            reply, _ = stream.receive()
        finally:
            if segment is not None:
                segment.unlink()
        if segment is not None and reply.get('shared_memory'):
            self._segment, self.shared = segment, True
        return reply

    def _body(self, stream: channel.Channel, size_bytes: int, tensor: str | None) -> np.ndarray:
        if tensor is None:
            most = _MOST_VECTORS * 4 * self._size + channel.LARGEST_REPLY_BYTES
            if size_bytes > most:
                raise ValueError(f'a reply of {size_bytes} bytes; {most} are allowed')
            octets = np.empty(size_bytes, np.uint8)
            stream.receive_into(octets)
            return octets
        if size_bytes != self._received.nbytes:
            raise ValueError(f'{size_bytes} bytes came instead of {self._received.nbytes}')
        values = self._segment.tensors[tensor]
        if self._parameter_encoding is FLOAT32:
            stream.receive_into(values)
        else:
            stream.receive_into(self._received)
            self._parameter_encoding.decode(self._received, values)
        return values

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
        self._encoded: np.ndarray | None = None
        self._tensor = tensor

    def send(self, deadline: float) -> None:
        """Opens the stream if necessary and sends; raises StreamBroken or as `connect` does."""
        self.connection.connect(deadline)
        if self._tensor is not None:
            self.header['known'] = self.connection.known[self._tensor]
        self.connection.send(self.header, self._on_network())

    def _on_network(self) -> np.ndarray | None:
        """The body to send; None without a body, or with one in shared memory."""
        if self._body is None:
            return None
        if self.connection.shared:
            # A repetition says the same as the first message, whatever the memory is now.
            sent_before = self._encoded is not None
            self.connection.stage(self.connection.feedback.arrived if sent_before else self._body)
            return None
        if self.header['operation'] == 'initialise':  # exactly as they are
            return self._body
        if self._encoded is None:
            self._encoded = self.connection.feedback.encode(self._body)
        return self._encoded

    def receive(self) -> dict[str, Any]:
        """Returns the reply's header; raises StreamBroken."""
        reply, self.reply_body = self.connection.receive(self._tensor)
        if reply.get('sequence') != self.header['sequence']:
            self.connection.drop()
            raise StreamBroken(f'reply {reply.get("sequence")} to {self.header["sequence"]}')
        return reply

    def accepted(self) -> None:
        """The shard has applied the gradient."""
        if self._encoded is not None:
            self.connection.feedback.accepted()

    def remember(self, reply: dict[str, Any]) -> None:
        """Records the revision that the client now holds."""
        if self._tensor is not None and reply.get('modified'):
            revision = 'target_revision' if self._tensor == TARGET else 'revision'
            self.connection.known[self._tensor] = reply[revision]
