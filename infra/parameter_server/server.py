"""The process around one shard.

`python -m infra.parameter_server.server --config FILE --shard I [--port N] [--ready_file F]
[--host H] [--restore DIR | --state_dir DIR] [--checkpoint_root DIR] [--tls_certificate F
--tls_key F]`. It exits with code 0 on SIGTERM and 2 on bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import pathlib
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Sequence
from typing import Any

from infra.flags import Parser, add_shard_flags, nonempty_path
from infra.output import protect_output
from infra.parameter_server import checkpoint
from infra.parameter_server.config import ParameterServerConfig, renamed
from infra.parameter_server.service import Service
from infra.parameter_server.state_directory import OwnState
from infra.process import announce_ready, end_signals, exit_with_launcher
from infra.sealed import parse_object
from infra.tls import server_context

_LOG = logging.getLogger(__name__)
_WAKE_SECONDS = 0.5
_STATE_SECONDS = 60.0  # between two states; a crash of the shard loses at most this much


class ServerStartError(Exception):
    """The server cannot start; the message names the value to change."""


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
        tls: ssl.SSLContext | None = None,
        checkpoint_root: str | None = None,
    ) -> None:
        """Starts the server from the newest of its own states, else from `state`, else empty.

        Args:
          config: of all shards.
          index: of this shard.
          host, port: address to listen on; port 0 for any free one.
          state: of a checkpoint.
          own_state: directory of states that this shard writes itself.
          tls: context of a TLS server, with a certificate for the host name that clients use.
          checkpoint_root: directory below which `save` may write; None sends parts to the client.

        Raises:
          ServerStartError: the port is in use, or the host is not an address of this machine.
          ValueError: the shard does not exist, or its own state is damaged or of another shard.
        """
        from infra.parameter_server.shard import Shard

        self.shard, self._own_state = Shard(config, index), own_state
        if own_state is not None and (kept := own_state.newest()) is not None:
            self.shard.restore(kept, keep_owner=True)
        elif state is not None:
            self.shard.restore(state)
        try:
            self._service = Service(self.shard, host, port, tls, checkpoint_root)
        except (OSError, OverflowError) as error:
            raise _cannot_listen(host, port) from error
        self.port = self._service.server_address[1]
        self.address = f'{host}:{self.port}'
        self._service.start()

    def __enter__(self) -> ParameterServer:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stop()

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
        """Stops the server and ends the streams of its clients."""
        self._service.stop()
        if self._own_state is not None:
            self._own_state.close()


def load_config(path: str) -> ParameterServerConfig:
    """Reads a configuration written as `dataclasses.asdict`.

    Raises:
      ServerStartError: the file is unreadable, or a value is unknown or invalid.
    """
    try:
        return ParameterServerConfig(**renamed(parse_object(pathlib.Path(path).read_bytes())))
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
            # Exits at once, in the middle of whatever the shard does.
            signal.signal(number, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher handles Ctrl-C
    _allow_many_files()
    try:
        server = _start(options)
    except (ServerStartError, ValueError, OSError) as error:
        print(f'parameter server: {error}', file=sys.stderr, flush=True)
        return 2
    if options.ready_file:
        announce_ready(options.ready_file, server.port)
    print(f'parameter shard {options.shard} serves on {server.address}', flush=True)
    _keep(server, options.state_period_seconds, stopped)
    os._exit(0)


def _allow_many_files() -> None:
    """Raises the limit of open files, one for each client, as far as this user may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


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
        tls = server_context(options.tls_certificate, options.tls_key)
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


if __name__ == '__main__':
    protect_output()
    # Before the slow import of TensorFlow, during which the launcher may die.
    exit_with_launcher()
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(name)s %(message)s')
    sys.exit(main())
