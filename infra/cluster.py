"""The servers of a run: replay shards and parameter shards as local processes, or given addresses.

In: how many shards, their configuration and a run directory. Out: addresses. A server that dies is
started again on its old port, from the latest checkpoint; no server outlives this process.
"""

import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from infra.addresses import AddressError, split_address
from infra.parameter_server.config import ParameterServerConfig
from infra.process import ProcessSpec, SupervisedProcess, describe_exit
from infra.replay.config import ReplayConfig
from infra.replay.trajectory import TrajectorySpec

PARAMETER_SERVER = 'parameter_server'
REPLAY = 'replay'

_LOGGER = logging.getLogger(__name__)
_ROOT = Path(__file__).resolve().parents[1]
_COMMANDS = {
    PARAMETER_SERVER: (sys.executable, '-m', 'infra.parameter_server.server'),
    REPLAY: (sys.executable, '-m', 'infra.replay.server'),
}
_POLL_SECONDS = 0.2
_CLOSE_GRACE_SECONDS = 5.0
_FIRST_BACK_OFF_SECONDS = 0.5
_LONGEST_BACK_OFF_SECONDS = 30.0
_STABLE_SECONDS = 60.0  # a server that served this long starts the next series of restarts afresh
_FAILED_STARTS_TO_GIVE_UP = 5

_ENVIRONMENT = {
    'TF_CPP_MIN_LOG_LEVEL': '2',
    # Two cores are shared by every process of a run: a shard applies slices on one thread.
    'OMP_NUM_THREADS': '1',
    'TF_NUM_INTRAOP_THREADS': '1',
    'TF_NUM_INTEROP_THREADS': '1',
    'CUDA_VISIBLE_DEVICES': '-1',  # an accelerator belongs to the learners
    'PYTHONUNBUFFERED': '1',  # the last line before a crash must reach the log
    'PYTHONFAULTHANDLER': '1',
}

Restore = Callable[[str, int], str | os.PathLike[str] | None]
"""(component, shard) -> the checkpoint directory that server starts from, None: empty."""


class ClusterError(RuntimeError):
    """A server cannot be started or reached; the message names it, what it said and the remedy."""


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """Which servers a run has.

    Attributes:
      run_directory: logs go to `logs/`, configurations and ready files to `servers/` below it.
      parameter_server: optimizer, target period and number of parameter shards.
      replay: capacity, limits and number of replay shards.
      trajectory: shapes of what the replay holds.
      batch_size: transitions of a learner's batch (the replay's limiter counts them).
      experience: False: the first replay server holds telemetry only (bundled topology).
      replay_checkpoint_directory: where replay shard i writes its checkpoints, in `shard-i`.
      host: interface the servers listen on and address the workers are given.
      parameter_ports: one port a shard; empty: free ones.
      replay_ports: one port a shard; empty: free ones.
      parameter_addresses: `host:port` of shards that already run; none is started then.
      replay_addresses: `host:port` of shards that already run; none is started then.
      state_directory: where shard i of a component keeps its own state, in `<component>-<i>`; None:
        what comes back with one that died is what `Cluster` is told to restore.
      tls: files of the certificate and the key with which parameter shards speak TLS; None: none.
      nice: added to the nice level of the servers; they use little, so 0 keeps the workers fed.
      startup_timeout_seconds: until every server serves, and two seconds more for each server.

    Raises:
      ValueError: another number of ports than of shards, or ports beside addresses.
    """

    run_directory: Path
    parameter_server: ParameterServerConfig
    replay: ReplayConfig
    trajectory: TrajectorySpec
    batch_size: int = 32
    experience: bool = True
    replay_checkpoint_directory: Path | None = None
    host: str = '127.0.0.1'
    parameter_ports: tuple[int, ...] = ()
    replay_ports: tuple[int, ...] = ()
    parameter_addresses: tuple[str, ...] = ()
    replay_addresses: tuple[str, ...] = ()
    state_directory: Path | None = None
    tls: tuple[str, str] | None = None
    nice: int = 0
    startup_timeout_seconds: float = 120.0

    def __post_init__(self) -> None:
        for kind, shards in (('parameter', self.num_parameter_shards), ('replay', self.num_replay)):
            ports = getattr(self, f'{kind}_ports')
            addresses = getattr(self, f'{kind}_addresses')
            if ports and addresses:
                raise ValueError(
                    f'{kind}_ports {ports} and {kind}_addresses {addresses} contradict each other:'
                    ' give ports to start servers, or addresses of servers that already run.'
                )
            if ports and len(ports) != shards:
                raise ValueError(
                    f'{kind}_ports {ports} do not fit {shards} {kind} shard(s): give one port each.'
                )

    @property
    def num_parameter_shards(self) -> int:
        """Parameter shards, started or attached to."""
        return len(self.parameter_addresses) or self.parameter_server.num_parameter_shards

    @property
    def num_replay(self) -> int:
        """Replay servers, started or attached to; one, for telemetry, without experience."""
        if self.replay_addresses:
            return len(self.replay_addresses)
        return self.replay.num_replay_shards if self.experience else 1


@dataclasses.dataclass
class _Server:
    """One supervised server and what its next start depends on."""

    component: str
    shard: int
    process: SupervisedProcess
    command: Callable[[int], list[str]]  # port -> argv; asks for the latest checkpoint
    port: int = 0  # 0 until it is known
    serving_since: float | None = None
    started_at: float = 0.0
    start_at: float | None = None  # when a dead one starts again
    ends: int = 0  # in a row, each soon after its start
    failed_starts: int = 0  # in a row, none of which ever served
    abandoned: bool = False

    @property
    def name(self) -> str:
        return self.process.spec.name

    def start(self) -> None:
        """Starts, or starts again on the same port."""
        self.process.spec = dataclasses.replace(self.process.spec, argv=self.command(self.port))
        self.start_at = self.serving_since = None
        self.started_at = time.monotonic()
        self.process.start()

    def look_for_ready(self) -> bool:
        """Whether it serves; learns the port from the ready file."""
        if self.serving_since is None and (ready := self.process.ready()):
            self.port = int(ready['port'])
            self.serving_since = time.monotonic()
            self.failed_starts = 0
        return self.serving_since is not None

    def back_off(self) -> float:
        """Seconds until the next start: doubles while each start soon comes to an end."""
        self.ends += 1
        doubled = _FIRST_BACK_OFF_SECONDS * 2.0 ** min(self.ends - 1, 10)
        return min(_LONGEST_BACK_OFF_SECONDS, doubled)


class Cluster:
    """Context manager: inside it the servers serve, and are watched from a thread.

    with Cluster(config) as cluster:
        client = ParameterClient(cluster.parameter_addresses, layout)
    """

    def __init__(self, config: ClusterConfig, restore: Restore | None = None):
        """Starts nothing yet.

        Args:
          config: the servers.
          restore: asked at every start of a server, the first included; None: always empty.
        """
        self.config = config
        self._restore = restore or (lambda *_: None)
        self._restarts: Counter[str] = Counter({PARAMETER_SERVER: 0, REPLAY: 0})
        self._lock = threading.RLock()  # guards the servers' state
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None
        self._failure: str | None = None
        self._servers: list[_Server] = []

    def __enter__(self) -> 'Cluster':
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def parameter_addresses(self) -> tuple[str, ...]:
        """`host:port` of the parameter shards, in the order of their slices."""
        return self.config.parameter_addresses or self._addresses(PARAMETER_SERVER)

    @property
    def replay_addresses(self) -> tuple[str, ...]:
        """`host:port` of the replay shards; empty when replay is in the bundles."""
        if not self.config.experience:
            return ()
        return self.config.replay_addresses or self._addresses(REPLAY)

    @property
    def telemetry_address(self) -> str:
        """`host:port` of the server that holds the telemetry queue: the first replay server."""
        return (self.config.replay_addresses or self._addresses(REPLAY))[0]

    @property
    def restarts(self) -> Mapping[str, int]:
        """Restarts of servers so far, by component."""
        return dict(self._restarts)

    @property
    def abandoned(self) -> frozenset[str]:
        """Components of which a server failed at every attempt to restart it."""
        return frozenset(server.component for server in self._servers if server.abandoned)

    @property
    def pids(self) -> Mapping[str, int]:
        """Process id of every local server, by its name, such as `replay_0`."""
        return {server.name: server.process.pid or 0 for server in self._servers}

    def kill(self, address: str) -> bool:
        """Kills the local server at `address`, which hangs; it is started again as a dead one is.

        Returns:
          Whether it is one of this cluster's own.
        """
        with self._lock:
            for server in self._servers:
                if f'{self.config.host}:{server.port}' == address:
                    _LOGGER.warning('%s does not answer, it is killed.', server.name)
                    server.process.signal(signal.SIGKILL)
                    return True
        return False

    def check(self) -> None:
        """Does nothing while the servers can be kept alive.

        Raises:
          ClusterError: a server failed at every attempt to restart it.
        """
        if self._failure:
            raise ClusterError(self._failure)

    def poll(self) -> None:
        """Restarts what has died; the watching thread calls it, a test may."""
        with self._lock:
            if self._closed.is_set():
                return
            for server in self._servers:
                self._tend(server)

    def close(self) -> None:
        """Ends every server, side by side; idempotent."""
        self._closed.set()
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join()
        with self._lock:
            for server in self._servers:
                server.process.signal(signal.SIGTERM)
            deadline = time.monotonic() + _CLOSE_GRACE_SECONDS
            for server in self._servers:
                server.process.terminate(max(0.0, deadline - time.monotonic()))

    def _addresses(self, component: str) -> tuple[str, ...]:
        return tuple(
            f'{self.config.host}:{server.port}'
            for server in self._servers
            if server.component == component
        )

    def _start(self) -> None:
        config = self.config
        timeout = config.startup_timeout_seconds
        _await_addresses(config.parameter_addresses + config.replay_addresses, timeout)
        self._servers = _plan(config, self._restore)
        for server in self._servers:
            server.start()
        self._await_servers(timeout + 2.0 * len(self._servers))
        self._watcher = threading.Thread(target=self._watch, name='cluster', daemon=True)
        self._watcher.start()

    def _await_servers(self, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while waiting := [server for server in self._servers if not server.look_for_ready()]:
            for server in waiting:
                if server.process.poll() is not None:
                    raise ClusterError(server.process.describe_failure())
            if time.monotonic() > deadline:
                raise ClusterError(
                    f'not serving after {timeout_seconds:.0f} s (a machine too busy, or a'
                    f' server that hangs): {waiting[0].process.describe_failure()}'
                )
            time.sleep(_POLL_SECONDS / 4)

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            self.poll()

    def _tend(self, server: _Server) -> None:
        now = time.monotonic()
        if server.abandoned:
            return
        if server.start_at is not None:
            if now >= server.start_at:
                self._restart(server)
        elif server.process.poll() is not None:
            self._plan_restart(server)
        elif server.look_for_ready():
            if now - (server.serving_since or now) > _STABLE_SECONDS:
                server.ends = 0
        elif now - server.started_at > self.config.startup_timeout_seconds:
            _LOGGER.warning('%s does not serve, it is killed.', server.name)
            server.process.terminate(grace_seconds=0.0)

    def _restart(self, server: _Server) -> None:
        try:
            server.start()
        except Exception:  # no file handles left, an unreadable checkpoint: later it may go well
            _LOGGER.exception('%s could not be started.', server.name)
            server.start_at = time.monotonic() + server.back_off()
        else:
            self._restarts[server.component] += 1

    def _abandon(self, server: _Server, why: str) -> None:
        server.abandoned = True
        self._failure = f'{why}: {server.process.describe_failure()}'
        _LOGGER.error('%s', self._failure)

    def _plan_restart(self, server: _Server) -> None:
        if server.serving_since is None:
            server.failed_starts += 1
        if server.failed_starts >= _FAILED_STARTS_TO_GIVE_UP:
            self._abandon(server, f'started {server.failed_starts} times in vain')
            return
        delay = server.back_off()
        server.start_at = time.monotonic() + delay
        _LOGGER.warning(
            '%s %s; it starts again on port %d in %.1f s (log: %s).',
            server.name,
            describe_exit(server.process.poll()),
            server.port,
            delay,
            server.process.spec.log_file,
        )


def _plan(config: ClusterConfig, restore: Restore) -> list[_Server]:
    """The servers to start, telemetry's (the first replay server) first."""
    servers: list[_Server] = []
    if not config.replay_addresses:
        ports = config.replay_ports or (0,) * config.num_replay
        servers += _plan_component(config, REPLAY, ports, restore)
    if not config.parameter_addresses:
        ports = config.parameter_ports or (0,) * config.num_parameter_shards
        servers += _plan_component(config, PARAMETER_SERVER, ports, restore)
    return servers


def write_settings(config: ClusterConfig, component: str, directory: Path) -> Path:
    """Writes what `--config` of every shard of a component names; returns the file.

    Raises:
      OSError: it cannot be written.
    """
    settings = dataclasses.asdict(config.parameter_server)
    if component == REPLAY:
        settings = {
            'replay': dataclasses.asdict(config.replay),
            'trajectory': dataclasses.asdict(config.trajectory),
            'batch_size': config.batch_size,
            'telemetry': True,
            'experience': config.experience,
        }
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f'{component}.json'
    file.write_text(json.dumps(settings, indent=2) + '\n')
    return file


def _plan_component(
    config: ClusterConfig,
    component: str,
    ports: Sequence[int],
    restore: Restore,
) -> list[_Server]:
    run_directory = config.run_directory.resolve()
    servers_directory = run_directory / 'servers'
    settings_file = write_settings(config, component, servers_directory)
    planned = []
    for shard, port in enumerate(ports):
        name = f'{component}_{shard}'
        ready_file = servers_directory / f'{name}.ready'
        argv = [*_COMMANDS[component], '--config', str(settings_file), '--shard', str(shard)]
        argv += ['--ready_file', str(ready_file), '--host', config.host]
        if config.state_directory is not None:
            argv += ['--state_dir', str(config.state_directory.resolve() / f'{component}-{shard}')]
        elif component == REPLAY and config.replay_checkpoint_directory is not None:
            checkpoints = config.replay_checkpoint_directory.resolve() / f'shard-{shard}'
            argv += ['--checkpoint_dir', str(checkpoints)]
        if component == PARAMETER_SERVER and config.tls is not None:
            certificate, key = map(os.path.abspath, config.tls)
            argv += ['--tls_certificate', certificate, '--tls_key', key]
        spec = ProcessSpec(
            name=name,
            argv=argv,
            log_file=run_directory / 'logs' / f'{name}.log',
            ready_file=ready_file,
            environment=_ENVIRONMENT,
            unset=('PYTHONDONTWRITEBYTECODE',),  # uncompiled imports cost seconds at each start
            nice=config.nice,
            working_directory=_ROOT,  # `-m infra...` must find this very package
        )
        command = _command(argv, component, shard, restore)
        planned.append(_Server(component, shard, SupervisedProcess(spec), command, port))
    return planned


def _command(
    argv: Sequence[str], component: str, shard: int, restore: Restore
) -> Callable[[int], list[str]]:
    def command(port: int) -> list[str]:
        checkpoint = restore(component, shard)
        restored = [] if checkpoint is None else ['--restore', str(Path(checkpoint).resolve())]
        return [*argv, '--port', str(port), *restored]

    return command


def _await_addresses(addresses: Sequence[str], timeout_seconds: float) -> None:
    """Waits until each given address takes connections.

    Raises:
      ClusterError: an address is not `host:port`, or nobody answers there.
    """
    deadline = time.monotonic() + timeout_seconds
    for address in addresses:
        try:
            host_and_port = split_address(address)
        except AddressError as error:
            raise ClusterError(str(error)) from error
        while True:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(host_and_port, 5.0),
            ):
                break
            if time.monotonic() > deadline:
                raise ClusterError(
                    f'nobody answers at {address} after {timeout_seconds:.0f} s:'
                    ' start that server first, or correct the address.'
                )
            time.sleep(_POLL_SECONDS)
