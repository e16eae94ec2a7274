"""The servers of a run: replay shards and parameter shards as local processes, or given addresses.

In: numbers of shards, their configuration and a run directory. Out: addresses. A dead server is
restarted on its old port from the latest checkpoint. No server outlives this process.
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
from infra.guard import Guard, UnforeseenError
from infra.own_time import OwnTime
from infra.parameter_server.config import ParameterServerConfig
from infra.process import ProcessSpec, SupervisedProcess, back_off_seconds, describe_exit
from infra.replay.config import ReplayConfig
from infra.replay.trajectory import TrajectorySpec

PARAMETER_SERVER = 'parameter_server'
REPLAY = 'replay'

_LOGGER = logging.getLogger(__name__)
_COMMANDS = {
    PARAMETER_SERVER: (sys.executable, '-m', 'infra.parameter_server.server'),
    REPLAY: (sys.executable, '-m', 'infra.replay.server'),
}
_POLL_SECONDS = 0.2
_CLOSE_GRACE_SECONDS = 5.0
_FIRST_BACK_OFF_SECONDS = 0.5
_LONGEST_BACK_OFF_SECONDS = 30.0
_STABLE_SECONDS = 60.0  # a server that served this long starts the next series of restarts afresh
FAILED_STARTS_TO_GIVE_UP = 5
ENDS_TO_GIVE_UP = 8  # each within `_STABLE_SECONDS`: two minutes with the back-offs between

ENVIRONMENT = {
    'TF_CPP_MIN_LOG_LEVEL': '2',
    # All processes of a run may share two cores, so a shard computes on one thread.
    'OMP_NUM_THREADS': '1',
    'TF_NUM_INTRAOP_THREADS': '1',
    'TF_NUM_INTEROP_THREADS': '1',
    'CUDA_VISIBLE_DEVICES': '-1',  # an accelerator belongs to the learners
    'PYTHONUNBUFFERED': '1',  # so that the last line before a crash reaches the log
    'PYTHONFAULTHANDLER': '1',
}

Restore = Callable[[str, int], str | os.PathLike[str] | None]
"""Maps (component, shard) to the checkpoint directory it starts from, or None to start empty."""


class ClusterError(RuntimeError):
    """A server fails to start or is unreachable; the message names it, its error and the remedy."""


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """The servers of a run.

    Attributes:
      run_directory: holds logs in `logs/`, configurations and ready files in `servers/`.
      parameter_server: optimizer, target period and number of parameter shards.
      replay: capacity, limits and number of replay shards.
      trajectory: shapes of the stored rows and windows.
      batch_size: transitions in a learner's batch, for the replay's rate limiter.
      experience: if false, the only replay server holds just telemetry (bundled topology).
      replay_checkpoint_directory: parent of the directories `shard-i` for checkpoints of replay
        shards.
      host: interface that the servers listen on and address that the workers use.
      parameter_ports: one port per shard; empty for any free ones.
      replay_ports: one port per shard; empty for any free ones.
      parameter_addresses: `host:port` of shards that are already running; no shard is started then.
      replay_addresses: `host:port` of shards that are already running; no shard is started then.
      state_directory: parent of the directories `<component>-<i>` for the shards' own states. If
        None, a restarted shard starts from what the `restore` of `Cluster` returns.
      tls: certificate and key files of the parameter shards; None for no TLS.
      nice: added to the servers' nice level; they need little CPU, so 0 keeps the workers fed.
      startup_timeout_seconds: bound until all servers are ready, plus 2 s per server.

    Raises:
      ValueError: the numbers of ports and shards differ, or both ports and addresses are given.
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
        """Number of parameter shards, local or at given addresses."""
        return len(self.parameter_addresses) or self.parameter_server.num_parameter_shards

    @property
    def num_replay(self) -> int:
        """Number of replay servers, local or given; without experience one, for telemetry."""
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

    def start(self, now: float) -> None:
        """Starts, or starts again on the same port."""
        self.process.spec = dataclasses.replace(self.process.spec, argv=self.command(self.port))
        self.start_at = self.serving_since = None
        self.started_at = now
        self.process.start()

    def look_for_ready(self, now: float) -> bool:
        """Whether the server is ready; reads its port from the ready file."""
        if self.serving_since is None and (ready := self.process.ready()):
            self.port = int(ready['port'])
            self.serving_since = now
            self.failed_starts = 0
        return self.serving_since is not None

    def back_off(self) -> float:
        """Seconds until the next start, after one more end."""
        self.ends += 1
        return back_off_seconds(self.ends, _FIRST_BACK_OFF_SECONDS, _LONGEST_BACK_OFF_SECONDS)


class Cluster:
    """Runs the servers inside its context and watches them from a thread.

    with Cluster(config) as cluster:
        client = ParameterClient(cluster.parameter_addresses, layout)
    """

    def __init__(self, config: ClusterConfig, restore: Restore | None = None):
        """Prepares; entering the context starts the servers.

        Args:
          config: the servers.
          restore: called at every start of a server; None to start empty always.
        """
        self.config = config
        self._restore = restore or (lambda *_: None)
        self._restarts: Counter[str] = Counter({PARAMETER_SERVER: 0, REPLAY: 0})
        self._lock = threading.RLock()  # guards the servers' state
        self._closed = threading.Event()
        self._own_time = OwnTime()
        self._watcher: threading.Thread | None = None
        self._failure: str | None = None
        self._news: list[str] = []
        self.failures = 0  # unexpected ends of servers, restarted since or not
        self._servers: list[_Server] = []

    def __enter__(self) -> 'Cluster':
        """Starts the servers, unless `start` has, and waits until they serve."""
        try:
            self.start()
            self._await_servers()
        except BaseException:
            self.close()
            raise
        self._watcher = threading.Thread(target=self._watch, name='cluster', daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def parameter_addresses(self) -> tuple[str, ...]:
        """`host:port` of the parameter shards, in the order of their slices."""
        return self.config.parameter_addresses or self._addresses(PARAMETER_SERVER)

    @property
    def replay_addresses(self) -> tuple[str, ...]:
        """`host:port` of the replay shards; empty if the bundles hold the replay."""
        if not self.config.experience:
            return ()
        return self.config.replay_addresses or self._addresses(REPLAY)

    @property
    def telemetry_address(self) -> str:
        """`host:port` of the first replay server, which holds the telemetry queue."""
        return (self.config.replay_addresses or self._addresses(REPLAY))[0]

    @property
    def restarts(self) -> Mapping[str, int]:
        """Number of restarts so far, by component."""
        return dict(self._restarts)

    def news(self) -> list[str]:
        """Messages about failures of servers since the last call."""
        with self._lock:
            news, self._news = self._news, []
        return news

    @property
    def abandoned(self) -> frozenset[str]:
        """Components with a server whose restarts all failed."""
        return frozenset(server.component for server in self._servers if server.abandoned)

    @property
    def pids(self) -> Mapping[str, int]:
        """Process ID of every local server, by its name such as `replay_0`."""
        return {server.name: server.process.pid or 0 for server in self._servers}

    def kill_hung(self, address: str, seconds: float) -> bool:
        """Kills the hanging local server at `address`, which is then restarted.

        Args:
          address: `host:port`.
          seconds: time since its last reply; a server that became ready since then is not killed.

        Returns:
          Whether it was killed.
        """
        with self._lock:
            now = self._own_time.look()
            for server in self._servers:
                since = server.serving_since
                here = f'{self.config.host}:{server.port}' == address
                if here and since is not None and now - since >= seconds:
                    _LOGGER.warning('%s does not answer, it is killed.', server.name)
                    server.process.signal(signal.SIGKILL)
                    return True
        return False

    def start(self) -> None:
        """Starts the servers and does not wait; `close` ends them. Repeated calls have no effect.

        Raises:
          ClusterError: an attached server is unreachable.
          OSError: a server cannot be started.
        """
        if self._servers:
            return
        config = self.config
        attached = config.parameter_addresses + config.replay_addresses
        _await_addresses(attached, config.startup_timeout_seconds)
        self._servers = _plan(config, self._restore)
        for server in self._servers:
            server.start(self._own_time.look())

    def check(self) -> None:
        """Checks that no server is abandoned.

        Raises:
          ClusterError: all restarts of a server failed, or the watching thread did.
        """
        if self._failure:
            raise ClusterError(self._failure)

    def poll(self) -> None:
        """Restarts dead servers; called by the watching thread, or by a test."""
        with self._lock:
            if self._closed.is_set():
                return
            now = self._own_time.look()
            for server in self._servers:
                self._tend(server, now)

    def close(self) -> None:
        """Ends all servers in parallel; repeated calls have no effect."""
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

    def _await_servers(self) -> None:
        timeout_seconds = self.config.startup_timeout_seconds + 2.0 * len(self._servers)
        deadline = self._own_time.look() + timeout_seconds
        while waiting := [
            server for server in self._servers if not server.look_for_ready(self._own_time.look())
        ]:
            for server in waiting:
                if server.process.poll() is not None:
                    raise ClusterError(server.process.describe_failure())
            if self._own_time.seconds > deadline:
                raise ClusterError(
                    f'not serving after {timeout_seconds:.0f} s (a machine too busy, or a'
                    f' server that hangs): {waiting[0].process.describe_failure()}'
                )
            time.sleep(_POLL_SECONDS / 4)

    def _watch(self) -> None:
        guard = Guard(self._tell)
        try:
            while not self._closed.wait(_POLL_SECONDS):
                guard.attempt(self.poll)
        except UnforeseenError as error:
            self._failure = f'the watch over the servers: {error}'

    def _tell(self, text: str) -> None:
        self._news.append(text)

    def _tend(self, server: _Server, now: float) -> None:
        if server.abandoned:
            return
        if server.start_at is not None:
            if now >= server.start_at:
                self._restart(server, now)
        elif server.process.poll() is not None:
            self._plan_restart(server, now)
        elif server.look_for_ready(now):
            if now - (server.serving_since or now) > _STABLE_SECONDS:
                server.ends = 0
        elif now - server.started_at > self.config.startup_timeout_seconds:
            _LOGGER.warning('%s does not serve, it is killed.', server.name)
            server.process.terminate(grace_seconds=0.0)

    def _restart(self, server: _Server, now: float) -> None:
        try:
            server.start(now)
        except Exception:  # no file handles left, an unreadable checkpoint: later it may go well
            _LOGGER.exception('%s could not be started.', server.name)
            server.start_at = now + server.back_off()
            if server.ends >= ENDS_TO_GIVE_UP:
                self._abandon(server, f'could not be started {server.ends} times')
        else:
            self._restarts[server.component] += 1

    def _abandon(self, server: _Server, why: str) -> None:
        server.abandoned = True
        self._failure = f'{why}: {server.process.describe_failure()}'
        _LOGGER.error('%s', self._failure)

    def _plan_restart(self, server: _Server, now: float) -> None:
        self.failures += 1
        if server.serving_since is None:
            server.failed_starts += 1
        delay = server.back_off()
        if server.failed_starts >= FAILED_STARTS_TO_GIVE_UP:
            self._abandon(server, f'started {server.failed_starts} times in vain')
            return
        if server.ends >= ENDS_TO_GIVE_UP:
            self._abandon(server, f'ended {server.ends} times, each soon after its start')
            return
        server.start_at = now + delay
        error = server.process.last_error()
        self._news.append(
            f'{server.name} {describe_exit(server.process.poll())}{error and f" ({error})"}; it'
            f' starts again in {delay:.1f} s; log: {server.process.spec.log_file}'
        )
        _LOGGER.warning('%s', self._news[-1])


def _plan(config: ClusterConfig, restore: Restore) -> list[_Server]:
    """Lists the servers to start, the one with telemetry (the first replay server) first."""
    servers: list[_Server] = []
    if not config.replay_addresses:
        ports = config.replay_ports or (0,) * config.num_replay
        servers += _plan_component(config, REPLAY, ports, restore)
    if not config.parameter_addresses:
        ports = config.parameter_ports or (0,) * config.num_parameter_shards
        servers += _plan_component(config, PARAMETER_SERVER, ports, restore)
    return servers


def write_settings(config: ClusterConfig, component: str, directory: Path) -> Path:
    """Writes the configuration file of a component's shards and returns its path.

    Raises:
      OSError: the directory is not writable.
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
        if component == PARAMETER_SERVER:
            argv += ['--checkpoint_root', str(run_directory)]
        if component == PARAMETER_SERVER and config.tls is not None:
            certificate, key = map(os.path.abspath, config.tls)
            argv += ['--tls_certificate', certificate, '--tls_key', key]
        spec = ProcessSpec(
            name=name,
            argv=argv,
            log_file=run_directory / 'logs' / f'{name}.log',
            ready_file=ready_file,
            environment=ENVIRONMENT,
            unset=('PYTHONDONTWRITEBYTECODE',),  # uncompiled imports take seconds at each start
            nice=config.nice,
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
    """Waits until each address accepts a connection.

    Raises:
      ClusterError: an address is not `host:port`, or accepts no connection in time.
    """
    own_time = OwnTime()
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
            if own_time.look() > timeout_seconds:
                raise ClusterError(
                    f'{address}: no server accepts connections after {timeout_seconds:.0f} s.'
                    ' Fix: start that server first, or correct the address.'
                )
            time.sleep(_POLL_SECONDS)
