"""Messages over a stream socket: a header and a tensor in, the same out.

    4 bytes  `MAGIC`
    4 bytes  length of the header
    8 bytes  length of the body, 0 for none
    header   JSON object
    body     bytes of a tensor

A body is sent from the array that holds it and received into the array that needs it. What a
message costs: docs/performance.md, "Messages to the parameter shards".
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import ssl
import struct
import time
from typing import Any

import numpy as np

from infra.addresses import split_address

MAGIC = b'GORL'
"""Begins every message."""

LARGEST_HEADER_BYTES = 1 << 20
"""Largest header of most messages. The layout of a network is the largest part, some kB."""

LARGEST_REPLY_BYTES = 1 << 26
"""Largest header of a reply. The reply to `save` lists all clients and workers, up to 5 MB."""

_PREFIX = struct.Struct('!4sIQ')
# A host that vanished without a word is noticed after two minutes: on an idle connection after
# 60 + 4 * 15 s, else when nothing was acknowledged for 120,000 ms.
_VANISHED = {
    socket.TCP_KEEPIDLE: 60,
    socket.TCP_KEEPINTVL: 15,
    socket.TCP_KEEPCNT: 4,
    socket.TCP_USER_TIMEOUT: 120_000,
}
_LEAST_SECONDS = 1e-3  # a time-out of 0 would mean: do not wait


class ChannelClosed(OSError):
    """The other side has closed the connection, or sends something else than messages."""


def connect(address: str, deadline: float, tls: ssl.SSLContext | None = None) -> Channel:
    """Connects to `host:port`.

    Args:
      address: of the server.
      deadline: monotonic time until which this call and the channel's calls may wait.
      tls: context of a TLS client; None for no TLS.

    Raises:
      OSError: the server is unreachable, does not answer in time, or has a wrong certificate.
    """
    host, port = split_address(address)
    plain = socket.create_connection((host, port), _seconds_until(deadline))
    try:
        plain.settimeout(_seconds_until(deadline))
        return Channel(tls.wrap_socket(plain, server_hostname=host) if tls else plain, deadline)
    except BaseException:
        plain.close()
        raise


class Channel:
    """A connected socket that sends and receives messages; for one thread at a time."""

    def __init__(self, connected: socket.socket, deadline: float = math.inf) -> None:
        """Takes the ownership of the socket; `deadline` is as in `wait_until`."""
        self._socket = connected
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _VANISHED.items():
            connected.setsockopt(socket.IPPROTO_TCP, option, value)
        self.wait_until(deadline)

    def wait_until(self, deadline: float) -> None:
        """Sets the monotonic time until which later calls may wait; infinity for no bound."""
        self._deadline = deadline
        if deadline == math.inf:
            self._socket.settimeout(None)

    def send(self, header: dict[str, Any], body: np.ndarray | None = None) -> None:
        """Sends a message; the body is a contiguous array.

        Raises:
          OSError: the connection is broken, or the other side does not read in time.
        """
        text = json.dumps(header).encode()
        size = 0 if body is None else body.nbytes
        self._empty(memoryview(_PREFIX.pack(MAGIC, len(text), size) + text))
        if body is not None:
            self._empty(body.view(np.uint8).data)

    def receive(self, largest: int = LARGEST_HEADER_BYTES) -> tuple[dict[str, Any], int]:
        """Returns the next message's header and the length of its body in bytes.

        The caller must then take the body, if there is one, by `receive_into`.

        Raises:
          ChannelClosed: the other side closed the connection, or sends no messages.
          OSError: the connection is broken, or nothing arrives in time.
          ValueError: the header is larger than `largest` bytes, or not a JSON object.
        """
        prefix = bytearray(_PREFIX.size)
        self._fill(memoryview(prefix))
        magic, header_bytes, body_bytes = _PREFIX.unpack(prefix)
        if magic != MAGIC:
            raise ChannelClosed(f'got {magic!r} in place of a message: another program')
        if header_bytes > largest:
            raise ValueError(f'a header of {header_bytes} bytes; {largest} are allowed')
        text = bytearray(header_bytes)
        self._fill(memoryview(text))
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError(f'a header must be a JSON object, got {header!r:.40}')
        return header, body_bytes

    def receive_into(self, out: np.ndarray) -> None:
        """Fills a contiguous array with the body of the message whose header came last.

        Raises:
          ChannelClosed: the other side closed the connection.
          OSError: the connection is broken, or nothing arrives in time.
        """
        self._fill(out.view(np.uint8).data)

    def break_off(self) -> None:
        """Ends the connection, so that calls of other threads fail; `close` must follow."""
        with contextlib.suppress(OSError):
            # Not that of TLS, which would let another thread's call continue in plain text.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def _fill(self, view: memoryview) -> None:
        while view:
            self._bound()
            count = self._socket.recv_into(view)
            if not count:
                raise ChannelClosed('the other side closed the connection')
            view = view[count:]

    def _empty(self, view: memoryview) -> None:
        while view:
            self._bound()
            view = view[self._socket.send(view) :]

    def _bound(self) -> None:
        """Lets the next call of the socket wait until the deadline."""
        if self._deadline != math.inf:
            self._socket.settimeout(_seconds_until(self._deadline))


def _seconds_until(deadline: float) -> float:
    return max(_LEAST_SECONDS, deadline - time.monotonic())
