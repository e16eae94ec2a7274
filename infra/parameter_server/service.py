"""Messages of clients in, calls of a shard and replies out; checks the contents of every message.

Each client has a thread, which waits for its next message, calls the shard and replies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.parameter_server import checkpoint, protocol
from infra.parameter_server.channel import Channel, ChannelClosed
from infra.parameter_server.layout import Layout
from infra.parameter_server.ledger import MAX_RECORD_BYTES
from infra.parameter_server.shared_memory import (
    GRADIENT,
    PARAMETERS,
    TARGET,
    Segment,
    host_identity,
)
from infra.parameter_server.wire import FLOAT32, WIRES, Encoding

if TYPE_CHECKING:  # importing it imports TensorFlow, which takes seconds
    from infra.parameter_server.shard import Shard

_LOG = logging.getLogger(__name__)
_HELLO_SECONDS = 10.0  # for TLS's handshake and the first message
_POLL_SECONDS = 0.1  # longest delay of `stop`; pause after a failed accept
_LONGEST_SESSION = 64  # characters; a client's own has 32
_LONGEST_NAME = 256  # characters of a worker's kind or name
_LONGEST_OWNER = 4096  # characters of a run's name, which is its directory


class _Connection:
    """One client's stream, with the memory of its tensors.

    Attributes:
      channel: of its messages.
      session: the client's name.
      layout: the client's layout of the network.
      tensors: float32 [n] by name (see `Segment`).
      shared: whether the client maps `tensors` too.
    """

    def __init__(self, shard: Shard, channel: Channel, session: str, header: dict) -> None:
        """Maps the client's segment if possible, else allocates private memory.

        Raises:
          LayoutMismatchError: client and shard differ in layout, index or number of shards.
        """
        import tensorflow as tf

        self.channel = channel
        self.session = session
        _check_place(shard, header)
        self.layout = Layout(**header['layout'])
        shard.check_layout(self.layout)
        part = shard.slice_of(self.layout)
        segment = _open_segment(shard, header, part.stop - part.start)
        self.shared = segment is not None
        self.tensors = (segment or Segment.private(part.stop - part.start)).tensors
        # TensorFlow reads the gradient where the client wrote it, without copy or conversion.
        capsule = self.tensors[GRADIENT].__dlpack__()
        self._gradient_tensor = tf.experimental.dlpack.from_dlpack(capsule)
        self._wire = WIRES[header['wire']]
        self._has_values = False

    def receive(self) -> tuple[dict[str, Any], Exception | None]:
        """Returns the next message's header; its values are in the segment.

        Returns an error too if the body is not what it must be: the stream then ends, since the
        body may not have been read.
        """
        header, size_bytes = self.channel.receive()
        self._has_values = self.shared
        # First parameters are float32 on any wire.
        first = header.get('operation') == 'initialise'
        try:
            if size_bytes:
                self._receive_body(FLOAT32 if first else self._wire.gradients, size_bytes)
        except ValueError as error:
            return header, error
        return header, None

    def _receive_body(self, encoding: Encoding, size_bytes: int) -> None:
        """Receives values in this encoding.

        Raises:
          ValueError: the body is too long, or not in this encoding.
        """
        values = self.tensors[GRADIENT]
        if size_bytes > (most := encoding.most_bytes(values.size)):
            raise ValueError(f'a body of {size_bytes} bytes; {most} are allowed')
        if encoding is FLOAT32 and size_bytes == most:
            self.channel.receive_into(values)
        else:
            body = np.empty(size_bytes, np.uint8)
            self.channel.receive_into(body)
            encoding.decode(body, values)
        self._has_values = True

    def gradient(self, header: dict[str, Any]) -> Any:
        """Returns the argument of `Shard.push`: the message's gradient, or why it lacks one."""
        if header.get('flaw'):
            return protocol.text_of(header, 'flaw', _LONGEST_NAME)
        if not self._has_values:
            return 'the message holds no gradient'
        return self.tensors[GRADIENT], self._gradient_tensor

    def first_values(self) -> np.ndarray:
        """Returns the values of `initialise`, float32 [n]; raises ValueError without."""
        if not self._has_values:
            raise ValueError('the message holds no parameters')
        return self.tensors[GRADIENT]

    def reply_body(self, tensor: str) -> np.ndarray | None:
        """Returns the tensor `tensor` as a body, None if the client reads it in shared memory."""
        if self.shared:
            return None
        return self._wire.parameters.encode(self.tensors[tensor])


class Service(socketserver.ThreadingTCPServer):
    """Listens for clients and turns their messages into calls of the shard.

    TLS's handshake is in a client's own thread.
    """

    allow_reuse_address = True
    block_on_close = False
    daemon_threads = True
    request_queue_size = 1024

    def __init__(
        self,
        shard: Shard,
        host: str,
        port: int,
        tls: ssl.SSLContext | None,
        checkpoint_root: str | None,
    ) -> None:
        """
        Args:
          shard: to call.
          host, port: to listen on; port 0 for any free one.
          tls: context of a TLS server; None for no TLS.
          checkpoint_root: directory below which `save` may write; None sends parts to the client.

        Raises:
          OSError, OverflowError: host or port cannot be listened on.
        """
        self.address_family = socket.AF_INET6 if ':' in host else socket.AF_INET
        super().__init__((host, port), socketserver.BaseRequestHandler)
        self._shard, self._tls, self._checkpoint_root = shard, tls, checkpoint_root
        self._open: set[Channel] = set()
        self._clients = 0  # of `_open`, those that the shard has accepted
        self._stopped = False
        self._lock = threading.Lock()
        self._operations = {
            'initialise': self._initialise,
            'pull': self._pull,
            'push': self._push,
            'apply': self._apply,
            'pull_target': self._pull_target,
            'report': self._report,
            'claim': self._claim,
            'enlist': self._enlist,
            'begin_segments': self._begin_segments,
            'finish_segment': self._finish_segment,
            'commit_segments': self._commit_segments,
            'stop': self._stop,
            'save': self._save,
        }

    def start(self) -> None:
        """Accepts clients, on a thread of its own."""
        threading.Thread(target=self.serve_forever, args=[_POLL_SECONDS], daemon=True).start()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serves one client until its stream ends, on its own thread."""
        deadline = time.monotonic() + _HELLO_SECONDS
        request.settimeout(_HELLO_SECONDS)
        stream = self._tls.wrap_socket(request, server_side=True) if self._tls else request
        with contextlib.closing(Channel(stream, deadline)) as channel, self._listed(channel):
            self._welcome(channel)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client closed its stream, died, or sent nonsense: other streams are unaffected."""
        _LOG.debug('stream of %s ended', client_address, exc_info=True)

    def get_request(self) -> Any:
        """Accepts a connection."""
        try:
            return super().get_request()
        except OSError as error:
            _LOG.warning('no connection accepted: %s', error)
            time.sleep(_POLL_SECONDS)  # it may be that this process has no file left to open
            raise

    def stop(self) -> None:
        """Accepts no more clients and ends the streams of all."""
        self.shutdown()
        self.server_close()
        with self._lock:
            self._stopped = True
            for channel in self._open:
                channel.break_off()

    @contextlib.contextmanager
    def _listed(self, channel: Channel) -> Iterator[None]:
        with self._lock:
            if self._stopped:
                raise ChannelClosed('the server has stopped')
            self._open.add(channel)
        try:
            yield
        finally:
            with self._lock:
                self._open.remove(channel)

    def _welcome(self, channel: Channel) -> None:
        try:
            header, size_bytes = channel.receive()
            if size_bytes:
                raise ValueError('the first message has no body')
            if header.get('operation') == protocol.HEALTH:
                channel.send(self._shard.report())
                return
            session = protocol.text_of(header, 'session', _LONGEST_SESSION)
            self._shard.open_session(session)
        except OSError:
            raise
        except Exception as error:
            channel.send(_error_reply(error))
            return
        try:
            self._serve(channel, session, header)
        finally:
            self._shard.close_session(session)

    def _serve(self, channel: Channel, session: str, header: dict[str, Any]) -> None:
        try:
            connection = _Connection(self._shard, channel, session, header)
        except Exception as error:
            channel.send(_error_reply(error))
            return
        self._count_client(+1)
        try:
            channel.send({'shared_memory': connection.shared})
            channel.wait_until(float('inf'))
            while self._answer(connection):
                pass
        finally:
            self._count_client(-1)

    def _answer(self, connection: _Connection) -> bool:
        """Replies to the next message; returns whether the stream can continue."""
        try:
            header, misfit = connection.receive()
        except ValueError as error:
            header, misfit = {}, error
        operation = header.get('operation')
        try:
            if misfit is not None:
                raise misfit
            protocol.count_of(header, 'sequence')
            self._shard.check_layout(connection.layout)
            reply = self._operations[header['operation']](connection, header)
        except Exception as error:
            # A bad message must not affect the shard's other clients.
            reply = _error_reply(error)
        reply['sequence'] = header.get('sequence')
        body = reply.pop('body', None)
        if reply.get('modified'):
            body = connection.reply_body(TARGET if operation == 'pull_target' else PARAMETERS)
        connection.channel.send(reply, body)
        return misfit is None

    def _initialise(self, connection: _Connection, header: dict) -> dict:
        self._adopt_clock(header)
        values = connection.first_values()
        return {'first': self._shard.initialise(connection.layout, values, *_clock_seen(header))}

    def _pull(self, connection: _Connection, header: dict) -> dict:
        self._adopt_clock(header)
        agent_steps = protocol.count_of(header, 'agent_steps')
        self._shard.add_agent_steps(connection.session, agent_steps)
        if self._shard.layout is None:
            return {'error': protocol.UNINITIALISED, **self._shard.clock()}
        known = header.get('known')
        return self._shard.copy_parameters(known, connection.tensors[PARAMETERS])

    def _push(self, connection: _Connection, header: dict) -> dict:
        self._adopt_clock(header)
        version = protocol.count_of(header, 'version')
        return self._take_gradient(self._shard.push, connection, header, version)

    def _apply(self, connection: _Connection, header: dict) -> dict:
        # The update's number sets the clock, so a target network due then includes the gradient.
        update = protocol.count_of(header, 'update')
        return self._take_gradient(self._shard.apply, connection, header, update)

    def _take_gradient(self, take: Any, connection: _Connection, header: dict, number: int) -> dict:
        if self._shard.layout is None:
            return {'error': protocol.UNINITIALISED, **self._shard.clock()}
        gradient = connection.gradient(header)
        verdict = take(connection.session, header['sequence'], gradient, number)
        if header.get('pull') is True:
            known = header.get('known')
            reply = self._shard.copy_parameters(known, connection.tensors[PARAMETERS])
        else:
            reply = self._shard.clock()
        return {**reply, **dataclasses.asdict(verdict)}

    def _adopt_clock(self, header: dict) -> None:
        self._shard.adopt_clock(*_clock_seen(header))

    def _pull_target(self, connection: _Connection, header: dict) -> dict:
        if self._shard.layout is None:
            return {'error': protocol.UNINITIALISED, **self._shard.clock()}
        return self._shard.copy_target(header.get('known'), connection.tensors[TARGET])

    def _report(self, connection: _Connection, header: dict) -> dict:
        self._adopt_clock(header)
        if header.get('owner'):
            self._shard.control.renew(protocol.text_of(header, 'owner', _LONGEST_OWNER))
        return {'report': {**self._shard.report(), 'clients': self._clients}}

    def _claim(self, connection: _Connection, header: dict) -> dict:
        self._shard.control.claim(protocol.text_of(header, 'owner', _LONGEST_OWNER))
        return self._shard.clock()

    def _enlist(self, connection: _Connection, header: dict) -> dict:
        kind = _kind_of(header)
        worker = protocol.text_of(header, 'worker', _LONGEST_NAME)
        before = self._shard.control.enlist(connection.session, kind, worker)
        return {**self._shard.clock(), 'before': before}

    def _begin_segments(self, connection: _Connection, header: dict) -> dict:
        committed = protocol.count_of(header, 'committed')
        first, records = self._shard.ledger.begin(*_worker_of(header), committed)
        return {'first': first, 'records': records}

    def _finish_segment(self, connection: _Connection, header: dict) -> dict:
        record = protocol.text_of(header, 'record', MAX_RECORD_BYTES)
        first, segment = (protocol.count_of(header, name) for name in ('first', 'segment'))
        following = self._shard.ledger.finish(*_worker_of(header), first, segment, record)
        return {**self._shard.clock(), 'next': following}

    def _commit_segments(self, connection: _Connection, header: dict) -> dict:
        self._shard.ledger.commit_all()
        return self._shard.clock()

    def _stop(self, connection: _Connection, header: dict) -> dict:
        self._shard.control.request_stop()
        return self._shard.clock()

    def _save(self, connection: _Connection, header: dict) -> dict:
        # Writes a copy on this stream's thread, so that other clients' updates continue.
        config = self._shard.config
        place = self._shard.index, config.num_parameter_shards
        state = self._shard.snapshot()
        directory = self._permitted(header.get('directory'))
        if directory is None:
            part, archive = checkpoint.packed_part(*place, state)
            body = np.frombuffer(archive, np.uint8)
            return {'part': part, 'optimizer': config.optimizer, 'octets': True, 'body': body}
        part = checkpoint.write_part(directory, *place, state)
        return {'part': part, 'optimizer': config.optimizer}

    def _permitted(self, directory: Any) -> str | None:
        """Returns a client's directory if it is below the checkpoint root, else None.

        The directory must exist and hold neither a checkpoint nor a part of this shard. So a client
        can neither overwrite checkpoints nor create directories.
        """
        if not isinstance(directory, str) or self._checkpoint_root is None:
            return None
        root, real = map(os.path.realpath, (self._checkpoint_root, directory))
        place = self._shard.index, self._shard.config.num_parameter_shards
        taken = not os.path.isdir(real) or checkpoint.holds_part(real, *place)
        return real if real.startswith(f'{root}{os.sep}') and not taken else None

    def _count_client(self, change: int) -> None:
        with self._lock:
            self._clients += change


def _clock_seen(header: dict[str, Any]) -> tuple[int, int]:
    """Returns (updates, agent steps) of the clock that a client has seen."""
    updates = protocol.count_of(header, 'seen_updates')
    return updates, protocol.count_of(header, 'seen_agent_steps')


def _kind_of(header: dict[str, Any]) -> str:
    """Returns the kind of a worker, one of `WORKER_KINDS`."""
    kind = header.get('kind')
    if kind not in protocol.WORKER_KINDS:
        raise ValueError(f'kind of a worker must be one of {", ".join(protocol.WORKER_KINDS)}')
    return kind


def _worker_of(header: dict[str, Any]) -> tuple[str, int]:
    """Returns kind and number of a worker."""
    return _kind_of(header), protocol.count_of(header, 'number')


def _check_place(shard: Shard, header: dict[str, Any]) -> None:
    num_shards = shard.config.num_parameter_shards
    if header['protocol'] != protocol.PROTOCOL_VERSION:
        raise protocol.LayoutMismatchError(
            f'the client speaks protocol {header["protocol"]}, the shard '
            f'{protocol.PROTOCOL_VERSION}; run the same version of the program'
        )
    if (header['shard'], header['num_shards']) != (shard.index, num_shards):
        raise protocol.LayoutMismatchError(
            f'the client takes this for shard {header["shard"]} of {header["num_shards"]}, but it '
            f'is shard {shard.index} of {num_shards}; give the addresses of all shards, in order'
        )


def _open_segment(shard: Shard, header: dict[str, Any], size: int) -> Segment | None:
    """Maps the client's segment; returns None if it has none that this process can map."""
    offer = header.get('segment')
    if not offer or not shard.config.shared_memory or offer['host'] != host_identity():
        return None
    try:
        return Segment.open(offer['name'], size)
    except (OSError, ValueError) as error:
        _LOG.info('no shared memory with %s: %s', header['session'], error)
        return None


def _error_reply(error: Exception) -> dict[str, Any]:
    for kind, error_class in protocol.ERRORS.items():
        if isinstance(error, error_class):
            return {'error': kind, 'message': str(error)}
    return {'error': 'refused', 'message': f'{type(error).__name__}: {error}'}
