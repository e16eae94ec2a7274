"""The process around one shard: Flight messages in, replies out.

`python -m infra.parameter_server.server --config FILE --shard I [--port N] [--ready_file F]
[--host H] [--restore DIR | --state_dir DIR] [--checkpoint_root DIR] [--tls_certificate F
--tls_key F]`. It exits with code 0 on SIGTERM and 2 on bad input. This module checks the contents
of every message.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import pathlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from infra.flags import Parser, add_shard_flags, nonempty_path, positive_number
from infra.memory import OwnBound, available_memory
from infra.output import protect_output
from infra.parameter_server import checkpoint, protocol
from infra.parameter_server.config import ParameterServerConfig
from infra.parameter_server.layout import Layout
from infra.parameter_server.ledger import MAX_RECORD_BYTES
from infra.parameter_server.shared_memory import (
    GRADIENT,
    PARAMETERS,
    TARGET,
    Segment,
    host_identity,
)
from infra.parameter_server.state_directory import OwnState
from infra.process import announce_ready, end_signals, exit_with_launcher
from infra.sealed import parse_object
from infra.tls import read_pair

if TYPE_CHECKING:  # importing it imports TensorFlow, which takes seconds
    from infra.parameter_server.shard import Shard

_LOG = logging.getLogger(__name__)
_STOP_SECONDS = 5.0
_WAKE_SECONDS = 0.5
_STATE_SECONDS = 60.0  # between two states; a crash of the shard loses at most this much
_LONGEST_SESSION = 64  # characters; a client's own has 32
_LONGEST_NAME = 256  # characters of a worker's kind or name
_LEAST_MESSAGES_MIB = 1024  # lower limit of the default of --message_memory_mib
_STREAM_BYTES = 16 << 20  # memory of a stream besides tensors: its thread's stack, gRPC's buffers
_TENSORS = 8  # copies of its slice that a stream may hold
_LONGEST_OWNER = 4096  # characters of a run's name, which is its directory


class ServerStartError(Exception):
    """The server cannot start; the message names the value to change."""


class _Connection:
    """One client's stream, with the memory of its tensors.

    Attributes:
      session: the client's name.
      layout: the client's layout of the network.
      tensors: float32 [n] by name (see `Segment`).
      shared: whether the client maps `tensors` too.
    """

    def __init__(self, shard: Shard, session: str, header: dict[str, Any]) -> None:
        """Maps the client's segment if possible, else allocates private memory.

        Raises:
          LayoutMismatchError: client and shard differ in layout, index or number of shards.
        """
        import tensorflow as tf

        self.session = session
        self.layout = Layout(**header['layout'])
        self.wire_dtype = header['wire_dtype']
        wire_type = protocol.WIRE_TYPES[self.wire_dtype]
        _check_place(shard, header)
        shard.check_layout(self.layout)
        part = shard.slice_of(self.layout)
        segment = _open_segment(shard, header, part.stop - part.start)
        self.shared = segment is not None
        self.tensors = (segment or Segment.private(part.stop - part.start)).tensors
        # TensorFlow reads the gradient where the client wrote it, without copy or conversion.
        capsule = self.tensors[GRADIENT].__dlpack__()
        self.gradient_tensor = tf.experimental.dlpack.from_dlpack(capsule)
        self.wire_buffer = np.empty(part.stop - part.start, wire_type)

    def gradient(self, header: dict[str, Any], body: pa.RecordBatch | None) -> Any:
        """Copies a message's gradient to the segment; returns the argument of `Shard.push`."""
        if header.get('flaw'):
            return protocol.text_of(header, 'flaw', _LONGEST_NAME)
        try:
            self._receive(body, self.wire_dtype)
        except ValueError as error:
            return str(error)
        return self.tensors[GRADIENT], self.gradient_tensor

    def first_values(self, body: pa.RecordBatch | None) -> np.ndarray:
        """Returns the values of `initialise`, which are float32 on any wire."""
        self._receive(body, 'float32')
        return self.tensors[GRADIENT]

    def reply_body(self, tensor: str) -> pa.RecordBatch | None:
        """Returns the tensor `tensor` as a body, None if the client reads it in shared memory."""
        if self.shared:
            return None
        if self.wire_dtype == 'float32':
            return protocol.encode_body(self.tensors[tensor])
        protocol.convert(self.tensors[tensor], self.wire_buffer)
        return protocol.encode_body(self.wire_buffer)

    def _receive(self, body: pa.RecordBatch | None, wire_dtype: str) -> None:
        expected = self.tensors[GRADIENT].size
        if body is None:
            if not self.shared:
                raise ValueError(f'the message holds no values; {expected} were expected')
            return
        values = protocol.decode_body(body, wire_dtype)
        if values.size != expected:
            raise ValueError(f'the message holds {values.size} values instead of {expected}')
        protocol.convert(values, self.tensors[GRADIENT])


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


class _FlightServer(flight.FlightServerBase):
    """Turns the messages of each stream into calls of the shard."""

    def __init__(
        self,
        shard: Shard,
        address: str,
        tls: tuple[bytes, bytes] | None,
        checkpoint_root: str | None,
    ) -> None:
        if tls is None:
            super().__init__(f'grpc://{address}')
        else:
            super().__init__(f'grpc+tls://{address}', tls_certificates=[tls])
        self._shard = shard
        self._checkpoint_root = checkpoint_root
        self._clients = self._peak = 0
        self.bound: OwnBound | None = None
        self._clients_lock = threading.Lock()
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

    def do_action(self, context: Any, action: flight.Action) -> list[bytes]:
        """Replies to 'health' with the shard's report."""
        return [json.dumps(self._shard.report()).encode()]

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Serves one client until its stream ends, on its own thread."""
        writer.begin(protocol.SCHEMA)
        self._count_client(+1)
        try:
            self._serve(reader, writer)
        except (StopIteration, flight.FlightError, pa.ArrowException, OSError) as end:
            # The client closed its stream or died; other streams are unaffected.
            _LOG.debug('stream ended: %r', end)
        finally:
            self._count_client(-1)

    def _serve(self, reader: Any, writer: Any) -> None:
        chunk = reader.read_chunk()
        try:
            header = protocol.decode_header(chunk.app_metadata)
            session = protocol.text_of(header, 'session', _LONGEST_SESSION)
            self._shard.open_session(session)
        except Exception as error:
            writer.write_metadata(protocol.encode_header(_error_reply(error)))
            return
        try:
            self._serve_session(header, session, reader, writer)
        finally:
            self._shard.close_session(session)

    def _serve_session(
        self, header: dict[str, Any], session: str, reader: Any, writer: Any
    ) -> None:
        try:
            connection = _Connection(self._shard, session, header)
        except Exception as error:
            writer.write_metadata(protocol.encode_header(_error_reply(error)))
            return
        writer.write_metadata(protocol.encode_header({'shared_memory': connection.shared}))
        while True:
            chunk = reader.read_chunk()
            reply, body = self._answer(connection, chunk)
            metadata = protocol.encode_header(reply)
            if body is None:
                writer.write_metadata(metadata)
            else:
                writer.write_with_metadata(body, metadata)

    def _answer(self, connection: _Connection, chunk: Any) -> tuple[dict, pa.RecordBatch | None]:
        sequence = operation_name = None
        try:
            header = protocol.decode_header(chunk.app_metadata)
            sequence, operation_name = protocol.count_of(header, 'sequence'), header['operation']
            self._shard.check_layout(connection.layout)
            reply = self._operations[operation_name](connection, header, chunk.data)
        except Exception as error:
            # A bad message must not affect the shard's other clients.
            reply = _error_reply(error)
        reply['sequence'] = sequence
        body = reply.pop('body', None)
        if reply.get('modified'):
            tensor = TARGET if operation_name == 'pull_target' else PARAMETERS
            body = connection.reply_body(tensor)
        return reply, body

    def _initialise(self, connection: _Connection, header: dict, body: Any) -> dict:
        self._adopt_clock(header)
        values = connection.first_values(body)
        return {'first': self._shard.initialise(connection.layout, values, *_clock_seen(header))}

    def _pull(self, connection: _Connection, header: dict, body: Any) -> dict:
        self._adopt_clock(header)
        agent_steps = protocol.count_of(header, 'agent_steps')
        self._shard.add_agent_steps(connection.session, agent_steps)
        if self._shard.layout is None:
            return {'error': protocol.UNINITIALISED, **self._shard.clock()}
        known = header.get('known')
        return self._shard.copy_parameters(known, connection.tensors[PARAMETERS])

    def _push(self, connection: _Connection, header: dict, body: Any) -> dict:
        self._adopt_clock(header)
        version = protocol.count_of(header, 'version')
        return self._take_gradient(self._shard.push, connection, header, body, version)

    def _apply(self, connection: _Connection, header: dict, body: Any) -> dict:
        # The update's number sets the clock, so a target network due then includes the gradient.
        update = protocol.count_of(header, 'update')
        return self._take_gradient(self._shard.apply, connection, header, body, update)

    def _take_gradient(
        self, take: Any, connection: _Connection, header: dict, body: Any, number: int
    ) -> dict:
        if self._shard.layout is None:
            return {'error': protocol.UNINITIALISED, **self._shard.clock()}
        gradient = connection.gradient(header, body)
        verdict = take(connection.session, header['sequence'], gradient, number)
        if header.get('pull') is True:
            known = header.get('known')
            reply = self._shard.copy_parameters(known, connection.tensors[PARAMETERS])
        else:
            reply = self._shard.clock()
        return {**reply, **dataclasses.asdict(verdict)}

    def _adopt_clock(self, header: dict) -> None:
        self._shard.adopt_clock(*_clock_seen(header))

    def _pull_target(self, connection: _Connection, header: dict, body: Any) -> dict:
        if self._shard.layout is None:
            return {'error': protocol.UNINITIALISED, **self._shard.clock()}
        return self._shard.copy_target(header.get('known'), connection.tensors[TARGET])

    def _report(self, connection: _Connection, header: dict, body: Any) -> dict:
        self._adopt_clock(header)
        if header.get('owner'):
            self._shard.control.renew(protocol.text_of(header, 'owner', _LONGEST_OWNER))
        return {'report': {**self._shard.report(), 'clients': self._clients}}

    def _claim(self, connection: _Connection, header: dict, body: Any) -> dict:
        self._shard.control.claim(protocol.text_of(header, 'owner', _LONGEST_OWNER))
        return self._shard.clock()

    def _enlist(self, connection: _Connection, header: dict, body: Any) -> dict:
        kind = _kind_of(header)
        worker = protocol.text_of(header, 'worker', _LONGEST_NAME)
        before = self._shard.control.enlist(connection.session, kind, worker)
        return {**self._shard.clock(), 'before': before}

    def _begin_segments(self, connection: _Connection, header: dict, body: Any) -> dict:
        committed = protocol.count_of(header, 'committed')
        first, records = self._shard.ledger.begin(*_worker_of(header), committed)
        return {'first': first, 'records': records}

    def _finish_segment(self, connection: _Connection, header: dict, body: Any) -> dict:
        record = protocol.text_of(header, 'record', MAX_RECORD_BYTES)
        first, segment = (protocol.count_of(header, name) for name in ('first', 'segment'))
        following = self._shard.ledger.finish(*_worker_of(header), first, segment, record)
        return {**self._shard.clock(), 'next': following}

    def _commit_segments(self, connection: _Connection, header: dict, body: Any) -> dict:
        self._shard.ledger.commit_all()
        return self._shard.clock()

    def _stop(self, connection: _Connection, header: dict, body: Any) -> dict:
        self._shard.control.request_stop()
        return self._shard.clock()

    def _save(self, connection: _Connection, header: dict, body: Any) -> dict:
        # Writes a copy on this stream's thread, so that other clients' updates continue.
        config = self._shard.config
        place = self._shard.index, config.num_parameter_shards
        state = self._shard.snapshot()
        directory = self._permitted(header.get('directory'))
        if directory is None:
            part, archive = checkpoint.packed_part(*place, state)
            body = protocol.encode_body(np.frombuffer(archive, np.uint8))
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
        with self._clients_lock:
            self._clients += change
            more, self._peak = max(0, self._clients - self._peak), max(self._clients, self._peak)
        if more and self.bound is not None:
            layout = self._shard.layout
            slice_bytes = (
                0 if layout is None else 4 * layout.size // self._shard.config.num_parameter_shards
            )
            self.bound.allow(more * (_STREAM_BYTES + _TENSORS * slice_bytes))


class ParameterServer:
    """A shard with its server in this process, for the CLI and for tests; a context manager.

    Attributes:
      shard: its state.
      port: that it listens on.
      address: `host:port` for `ParameterClient`.
    """

    def __init__(
        self,
        config: ParameterServerConfig,
        index: int,
        host: str = '127.0.0.1',
        port: int = 0,
        state: checkpoint.ShardState | None = None,
        own_state: OwnState | None = None,
        tls: tuple[bytes, bytes] | None = None,
        checkpoint_root: str | None = None,
    ) -> None:
        """Starts the server from the newest of its own states, else from `state`, else empty.

        Args:
          config: of all shards.
          index: of this shard.
          host, port: address to listen on; port 0 for any free one.
          state: of a checkpoint.
          own_state: directory of states that this shard writes itself.
          tls: PEM certificate, for the host name that clients use, and its key.
          checkpoint_root: directory below which `save` may write; None sends parts to the client.

        Raises:
          ServerStartError: the port is in use, or the host is not an address of this machine.
          ValueError: the shard does not exist, or its own state is damaged or of another shard.
        """
        from infra.parameter_server.shard import Shard

        self.shard = Shard(config, index)
        self._own_state = own_state
        if own_state is not None and (kept := own_state.newest()) is not None:
            self.shard.restore(kept, keep_owner=True)
        elif state is not None:
            self.shard.restore(state)
        try:
            self._server = _FlightServer(self.shard, f'{host}:{port}', tls, checkpoint_root)
        except (pa.ArrowException, OSError) as error:
            raise _cannot_listen(host, port) from error
        self.port = self._server.port
        self.address = f'{host}:{self.port}'

    def __enter__(self) -> ParameterServer:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stop()

    def bound_messages(self, size_mib: float | None) -> None:
        """Limits what the messages of all clients may take, None to half of the available memory.

        For a process of its own: the limit counts all memory that this process allocates.
        """
        size = size_mib or max(available_memory() / 2**21, _LEAST_MESSAGES_MIB)
        self._server.bound = OwnBound(int(size * 2**20))

    def keep_state(self, last: bool = False) -> None:
        """Writes the shard's own state, if it has parameters and a directory for states.

        A failure is only logged; the state before it remains the newest. With `last` the shard
        answers no request afterwards.
        """
        if self._own_state is None or self.shard.layout is None:
            return
        try:
            self._own_state.save(self.shard.last_snapshot() if last else self.shard.snapshot())
        except Exception:  # the shard continues after any failure to write
            _LOG.exception('no state written')

    def stop(self) -> None:
        """Stops the server; waits a bounded time for connected clients."""
        # Flight's shutdown waits for all streams to end, without a bound.
        thread = threading.Thread(target=self._server.shutdown, daemon=True)
        thread.start()
        thread.join(_STOP_SECONDS)
        if self._own_state is not None:
            self._own_state.close()


def load_config(path: str) -> ParameterServerConfig:
    """Reads a configuration written as `dataclasses.asdict`.

    Raises:
      ServerStartError: the file is unreadable, or a value is unknown or invalid.
    """
    try:
        return ParameterServerConfig(**parse_object(pathlib.Path(path).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        names = ', '.join(field.name for field in dataclasses.fields(ParameterServerConfig))
        raise ServerStartError(f'bad --config {path}: {error}; its fields are {names}') from error


def main(arguments: list[str] | None = None) -> int:
    """Runs one shard until SIGTERM or SIGHUP; returns only the exit code of a failed start."""
    options = parse(arguments)
    stopped: list[int] = []
    for number in end_signals():
        if options.state_dir:
            signal.signal(number, lambda number, _: stopped.append(number))
        else:
            # Exits at once, because a regular exit would wait for the streams of live clients.
            signal.signal(number, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher handles Ctrl-C
    try:
        server = _start(options)
    except (ServerStartError, ValueError, OSError) as error:
        print(f'parameter server: {error}', file=sys.stderr, flush=True)
        return 2
    server.bound_messages(options.message_memory_mib)
    if options.ready_file:
        announce_ready(options.ready_file, server.port)
    print(f'parameter shard {options.shard} serves on {server.address}', flush=True)
    _keep(server, options.state_period_seconds, stopped)
    os._exit(0)


def _keep(server: ParameterServer, period_seconds: float, stopped: Sequence[int]) -> None:
    """Writes the state once per period, and a last time after a signal, then returns."""
    due = 0.0  # the first as soon as the shard has parameters
    while not stopped:
        # Polls, because another thread may take the signal and `pause` would not return.
        time.sleep(_WAKE_SECONDS)
        if time.monotonic() >= due and server.shard.layout is not None:
            server.keep_state()
            due = time.monotonic() + period_seconds
    server.keep_state(last=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog='python -m infra.parameter_server.server', description=__doc__, allow_abbrev=False
    )
    add_shard_flags(parser, '--restore', 'Checkpoint directory to start from.', _STATE_SECONDS)
    parser.add_argument(
        '--host', default='127.0.0.1', help='Address to listen on. Default: 127.0.0.1.'
    )
    parser.add_argument(
        '--checkpoint_root',
        type=nonempty_path,
        help='Directory below which clients may request checkpoints.',
    )
    parser.add_argument(
        '--tls_certificate',
        type=nonempty_path,
        help='PEM certificate for the host name that clients use; enables TLS.',
    )
    parser.add_argument(
        '--tls_key', type=nonempty_path, help='PEM private key of --tls_certificate.'
    )
    parser.add_argument(
        '--message_memory_mib',
        type=positive_number,
        help='Memory limit in MiB for the messages of all clients together; exceeding it ends the'
        " client's stream. Default: half of the available memory, at least 1024.",
    )
    options = parser.parse_args(arguments)
    if bool(options.tls_certificate) != bool(options.tls_key):
        parser.error('--tls_certificate and --tls_key go together. Fix: pass both or neither.')
    return options


def _start(options: argparse.Namespace) -> ParameterServer:
    # Checks the input first, because importing TensorFlow takes seconds.
    config = load_config(options.config)
    _check_port(options.host, options.port)
    tls = None
    if options.tls_certificate:
        tls = read_pair(options.tls_certificate, options.tls_key)
    if options.restore:
        try:
            checkpoint.validate(options.restore)
        except checkpoint.DamagedCheckpointError as error:
            raise ServerStartError(f'--restore: {error}. Fix: use another checkpoint.') from error
    _configure_tensorflow()
    place = options.shard, config.num_parameter_shards, config.optimizer
    state = own_state = None
    if options.restore:
        state = checkpoint.read_state(options.restore, *place)
    if options.state_dir:
        own_state = OwnState(options.state_dir, *place)  # locked until this process ends
    return ParameterServer(
        config,
        options.shard,
        options.host,
        options.port,
        state,
        own_state,
        tls,
        options.checkpoint_root,
    )


def _check_port(host: str, port: int) -> None:
    try:
        family = socket.AF_INET6 if ':' in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        raise _cannot_listen(host, port) from error


def _cannot_listen(host: str, port: int) -> ServerStartError:
    return ServerStartError(
        f'cannot listen on {host}:{port} (in use, or not an address of this machine); '
        'choose another --port, or 0 for any free one'
    )


def _configure_tensorflow() -> None:
    import tensorflow as tf

    # A shard runs one fused kernel at a time; more shards give more parallelism.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.set_visible_devices([], 'GPU')


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


if __name__ == '__main__':
    protect_output()
    # Before the slow import of TensorFlow, during which the launcher may die.
    exit_with_launcher()
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(name)s %(message)s')
    sys.exit(main())
