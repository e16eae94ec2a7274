"""The process around one shard: Flight messages in, replies out.

`python -m infra.parameter_server.server --config FILE --shard I [--port N] [--ready_file F]
[--host H] [--restore DIR | --state_dir DIR] [--tls_certificate F --tls_key F]`; SIGTERM ends it
with exit code 0, bad input with 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
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

from infra.flags import add_state_flags
from infra.parameter_server import checkpoint, protocol
from infra.parameter_server.config import ParameterServerConfig
from infra.parameter_server.layout import Layout
from infra.parameter_server.own_state import OwnState
from infra.parameter_server.shared_memory import (
    GRADIENT,
    PARAMETERS,
    TARGET,
    Segment,
    host_identity,
)
from infra.tls import read_pair

if TYPE_CHECKING:  # importing it imports TensorFlow, which takes seconds
    from infra.parameter_server.shard import Shard

_LOG = logging.getLogger(__name__)
_STOP_SECONDS = 5.0
_WAKE_SECONDS = 0.5
_STATE_SECONDS = 60.0  # what a shard's death may cost


class ServerStartError(Exception):
    """The server could not be started; the message says which value to change."""


class _Connection:
    """One client's stream: where its tensors are, and what it was told last.

    Attributes:
      session: the client's name.
      layout: what the client believes the network to be.
      tensors: float32 [n] by name, see `Segment`.
      shared: whether the client sees `tensors` too.
    """

    def __init__(self, shard: Shard, header: dict[str, Any]) -> None:
        """Opens the client's segment when that is possible.

        Raises:
          LayoutMismatchError: client and shard disagree on layout, index or number of shards.
        """
        import tensorflow as tf

        self.session = str(header['session'])
        self.layout = Layout(**header['layout'])
        self.wire_dtype = header['wire_dtype']
        wire_type = protocol.WIRE_TYPES[self.wire_dtype]
        _check_place(shard, header)
        shard.check_layout(self.layout)
        part = shard.slice_of(self.layout)
        segment = _open_segment(shard, header, part.stop - part.start)
        self.shared = segment is not None
        self.tensors = (segment or Segment.private(part.stop - part.start)).tensors
        # TensorFlow reads the gradient where the client wrote it: no copy, no conversion.
        capsule = self.tensors[GRADIENT].__dlpack__()
        self.gradient_tensor = tf.experimental.dlpack.from_dlpack(capsule)
        self.wire_buffer = np.empty(part.stop - part.start, wire_type)

    def gradient(self, body: pa.RecordBatch | None) -> Any:
        """Brings a message's gradient to the segment; returns what `Shard.push` takes."""
        try:
            self._receive(body, self.wire_dtype)
        except ValueError as error:
            return str(error)
        return self.tensors[GRADIENT], self.gradient_tensor

    def first_values(self, body: pa.RecordBatch | None) -> np.ndarray:
        """Returns the values of `initialise`, which always travel as float32."""
        self._receive(body, 'float32')
        return self.tensors[GRADIENT]

    def reply_body(self, tensor: str) -> pa.RecordBatch | None:
        """Returns the tensor of that name for the network, None when the client sees it."""
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


class _FlightServer(flight.FlightServerBase):
    """Turns the messages of each stream into calls of the shard."""

    def __init__(self, shard: Shard, address: str, tls: tuple[bytes, bytes] | None) -> None:
        if tls is None:
            super().__init__(f'grpc://{address}')
        else:
            super().__init__(f'grpc+tls://{address}', tls_certificates=[tls])
        self._shard = shard
        self._clients = 0
        self._clients_lock = threading.Lock()
        self._operations = {
            'initialise': self._initialise,
            'pull': self._pull,
            'push': self._push,
            'pull_target': self._pull_target,
            'report': self._report,
            'claim': self._claim,
            'enlist': self._enlist,
            'stop': self._stop,
            'save': self._save,
        }

    def do_action(self, context: Any, action: flight.Action) -> list[bytes]:
        """Answers 'health' with the shard's report; connects nothing."""
        return [json.dumps(self._shard.report()).encode()]

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Serves one client until its stream ends; runs on a thread of its own."""
        writer.begin(protocol.SCHEMA)
        self._count_client(+1)
        try:
            self._serve(reader, writer)
        except (StopIteration, flight.FlightError, pa.ArrowException, OSError) as end:
            # The client left, or was killed: its stream breaks, and nothing else does.
            _LOG.debug('stream ended: %r', end)
        finally:
            self._count_client(-1)

    def _serve(self, reader: Any, writer: Any) -> None:
        chunk = reader.read_chunk()
        try:
            connection = _Connection(self._shard, protocol.decode_header(chunk.app_metadata))
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
            sequence, operation_name = header['sequence'], header['operation']
            self._shard.check_layout(connection.layout)
            reply = self._operations[operation_name](connection, header, chunk.data)
        except Exception as error:
            # Whatever a message holds, it must not take the shard's other clients down.
            reply = _error_reply(error)
        reply['sequence'] = sequence
        body = reply.pop('body', None)
        if reply.get('modified'):
            tensor = TARGET if operation_name == 'pull_target' else PARAMETERS
            body = connection.reply_body(tensor)
        return reply, body

    def _initialise(self, connection: _Connection, header: dict, body: Any) -> dict:
        values = connection.first_values(body)
        return {'first': self._shard.initialise(connection.layout, values)}

    def _pull(self, connection: _Connection, header: dict, body: Any) -> dict:
        self._shard.add_agent_steps(connection.session, header['agent_steps'])
        if self._shard.layout is None:
            return {'error': protocol.UNINITIALISED, **self._shard.clock()}
        return self._shard.copy_parameters(header['known'], connection.tensors[PARAMETERS])

    def _push(self, connection: _Connection, header: dict, body: Any) -> dict:
        if self._shard.layout is None:
            return {'error': protocol.UNINITIALISED, **self._shard.clock()}
        rejected, message = self._shard.push(
            connection.session,
            header['sequence'],
            connection.gradient(body),
            header['version'],
        )
        if header['pull']:
            reply = self._shard.copy_parameters(header['known'], connection.tensors[PARAMETERS])
        else:
            reply = self._shard.clock()
        return {**reply, 'rejected': rejected, 'message': message}

    def _pull_target(self, connection: _Connection, header: dict, body: Any) -> dict:
        if self._shard.layout is None:
            return {'error': protocol.UNINITIALISED, **self._shard.clock()}
        return self._shard.copy_target(header['known'], connection.tensors[TARGET])

    def _report(self, connection: _Connection, header: dict, body: Any) -> dict:
        if header.get('owner'):
            self._shard.renew(header['owner'])
        return {'report': {**self._shard.report(), 'clients': self._clients}}

    def _claim(self, connection: _Connection, header: dict, body: Any) -> dict:
        self._shard.claim(header['owner'])
        return self._shard.clock()

    def _enlist(self, connection: _Connection, header: dict, body: Any) -> dict:
        before = self._shard.enlist(connection.session, header['kind'], header['worker'])
        return {**self._shard.clock(), 'before': before}

    def _stop(self, connection: _Connection, header: dict, body: Any) -> dict:
        self._shard.request_stop()
        return self._shard.clock()

    def _save(self, connection: _Connection, header: dict, body: Any) -> dict:
        # Written on this stream's thread, from a copy: other clients' updates go on meanwhile.
        config = self._shard.config
        place = self._shard.index, config.num_parameter_shards
        state = self._shard.snapshot()
        if header['directory'] is None:  # one that only the client can reach
            part, archive = checkpoint.packed_part(*place, state)
            body = protocol.encode_body(np.frombuffer(archive, np.uint8))
            return {'part': part, 'optimizer': config.optimizer, 'octets': True, 'body': body}
        part = checkpoint.write_part(header['directory'], *place, state)
        return {'part': part, 'optimizer': config.optimizer}

    def _count_client(self, change: int) -> None:
        with self._clients_lock:
            self._clients += change


class ParameterServer:
    """A serving shard in this process, for the CLI and for tests; a context manager.

    Attributes:
      shard: its state.
      port: where it listens.
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
    ) -> None:
        """Starts to serve, from `state` when there is one, or from the newest of its own.

        `tls`: PEM, a certificate for the name that clients call the host by, and its key.

        Raises:
          ServerStartError: the port is taken or the host is not one of this machine.
          ValueError: there is no such shard, or its own state is damaged or of another one.
        """
        from infra.parameter_server.shard import Shard

        self.shard = Shard(config, index)
        self._own_state = own_state
        if own_state is not None and (kept := own_state.newest()) is not None:
            self.shard.restore(kept, keep_owner=True)
        elif state is not None:
            self.shard.restore(state)
        try:
            self._server = _FlightServer(self.shard, f'{host}:{port}', tls)
        except (pa.ArrowException, OSError) as error:
            raise _cannot_listen(host, port) from error
        self.port = self._server.port
        self.address = f'{host}:{self.port}'

    def __enter__(self) -> ParameterServer:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stop()

    def keep_state(self, last: bool = False) -> None:
        """Writes the shard's own state, if it has parameters yet and a place for it.

        What cannot be written is told, and costs nothing but the state since the one before.
        With `last` the shard answers nobody from then on.
        """
        if self._own_state is None or self.shard.layout is None:
            return
        try:
            self._own_state.save(self.shard.last_snapshot() if last else self.shard.snapshot())
        except Exception:  # whatever it is, the shard goes on serving
            _LOG.exception('no state written')

    def stop(self) -> None:
        """Stops serving; waits a bounded time for clients that are still connected."""
        # Flight's shutdown waits for every stream to end, for ever if a client hangs.
        thread = threading.Thread(target=self._server.shutdown, daemon=True)
        thread.start()
        thread.join(_STOP_SECONDS)
        if self._own_state is not None:
            self._own_state.close()


def load_config(path: str) -> ParameterServerConfig:
    """Reads a configuration written as `dataclasses.asdict`.

    Raises:
      ServerStartError: the file cannot be read or holds an unknown or wrong value.
    """
    try:
        with open(path) as file:
            return ParameterServerConfig(**json.load(file))
    except (OSError, ValueError, TypeError) as error:
        names = ', '.join(field.name for field in dataclasses.fields(ParameterServerConfig))
        raise ServerStartError(f'bad --config {path}: {error}; its fields are {names}') from error


def main(arguments: list[str] | None = None) -> int:
    """Serves one shard until SIGTERM ends the process; returns only a failure's exit code."""
    options = _parse(arguments)
    stopped: list[int] = []
    if options.state_dir:
        signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    else:
        # At once: a regular exit would wait for the streams of live clients.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the launcher, which decides.
    try:
        server = _start(options)
    except (ServerStartError, ValueError, OSError) as error:
        print(f'parameter server: {error}', file=sys.stderr, flush=True)
        return 2
    if options.ready_file:
        from infra.process import announce_ready

        announce_ready(options.ready_file, server.port)
    print(f'parameter shard {options.shard} serves on {server.address}', flush=True)
    _keep(server, options.state_period_seconds, stopped)
    os._exit(0)


def _keep(server: ParameterServer, period_seconds: float, stopped: Sequence[int]) -> None:
    """Has the state written once a period, and when a signal came, upon which it returns."""
    due = 0.0  # the first one as soon as there are parameters
    while not stopped:
        # Not `pause`: another thread may take the signal, and then nothing wakes this one.
        time.sleep(_WAKE_SECONDS)
        if time.monotonic() >= due and server.shard.layout is not None:
            server.keep_state()
            due = time.monotonic() + period_seconds
    server.keep_state(last=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument('--config', required=True, help='JSON file: ParameterServerConfig')
    parser.add_argument('--shard', required=True, type=int, help='index of this shard, from 0')
    parser.add_argument('--port', type=int, default=0, help='0: any free port')
    parser.add_argument('--ready_file', help='written with {"port", "pid"} once it serves')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen on')
    add_state_flags(parser, '--restore', 'checkpoint directory to start from', _STATE_SECONDS)
    parser.add_argument('--tls_certificate', help='PEM, for the name that clients call it by')
    parser.add_argument('--tls_key', help="PEM, the certificate's")
    options = parser.parse_args(arguments)
    if bool(options.tls_certificate) != bool(options.tls_key):
        parser.error('--tls_certificate and --tls_key go together; give both, or none')
    return options


def _start(options: argparse.Namespace) -> ParameterServer:
    # What can be wrong is looked at first: importing TensorFlow takes seconds.
    config = load_config(options.config)
    _check_port(options.host, options.port)
    tls = None
    if options.tls_certificate:
        tls = read_pair(options.tls_certificate, options.tls_key)
    if options.restore:
        checkpoint.validate(options.restore)
    _configure_tensorflow()
    place = options.shard, config.num_parameter_shards, config.optimizer
    state = own_state = None
    if options.restore:
        state = checkpoint.read_state(options.restore, *place)
    if options.state_dir:
        own_state = OwnState(options.state_dir, *place)  # held until this process ends
    return ParameterServer(config, options.shard, options.host, options.port, state, own_state, tls)


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

    # A shard computes one fused kernel at a time; its parallelism is the number of shards.
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
    """Returns the client's segment, None when it has none that this process can map."""
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
    from infra.process import exit_with_launcher

    # First: the launcher may die while TensorFlow is being imported.
    exit_with_launcher()
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(name)s %(message)s')
    sys.exit(main())
