"""Checks ports, host and TLS of the servers that a run starts."""

import socket

from infra import tls
from pipelines.errors import UsageError
from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.launch import Launch


def require_tls(launch: Launch) -> None:
    """Checks that clients will accept the certificate of the parameter shards to start.

    Raises:
      UsageError: the certificate is missing, or not valid for --host.
    """
    if launch.parameter_addresses or launch.tls_roots is None:
        return
    if launch.tls is None:
        raise UsageError(
            '--tls_roots: the parameter shards to start do not use TLS. Fix: add --tls_certificate'
            ' and --tls_key, or --parameter_addresses of shards that use it.'
        )
    try:
        tls.require_accepted(launch.tls, launch.tls_roots, launch.host)
    except tls.TlsError as error:
        raise UsageError(f'{error}.') from error


def require_ports(config: ExperimentConfig, launch: Launch) -> None:
    """Checks that the ports are free and one per shard, and that --host is this machine's.

    Raises:
      UsageError: a port is busy, the number of ports is wrong, or --host is invalid.
    """
    _require_host(launch)
    shards = {
        'parameter': config.parameter_server.num_parameter_shards,
        'replay': 1 if config.run.replay_in_workers else config.replay.num_replay_shards,
    }
    if both := set(launch.parameter_ports) & set(launch.replay_ports):
        raise UsageError(
            f'--parameter_ports and --replay_ports: both contain {min(both)}. Fix: give each shard'
            ' its own port.'
        )
    for kind, count in shards.items():
        ports = getattr(launch, f'{kind}_ports')
        if ports and getattr(launch, f'{kind}_addresses'):
            raise UsageError(
                f'--{kind}_ports: contradicts --{kind}_addresses. Fix: pass ports to start servers,'
                ' or addresses to attach to running ones.'
            )
        if ports and not len(ports) == len(set(ports)) == count:
            given = ','.join(map(str, ports))
            raise UsageError(
                f'--{kind}_ports {given}: wrong number of ports. Fix: list {count} different ones.'
            )
        for port in ports:
            _require_free(kind, port)


def _require_host(launch: Launch) -> None:
    if launch.parameter_addresses and launch.replay_addresses:
        return  # starts no server
    try:
        socket.create_server((launch.host, 0)).close()
    except OSError as error:
        raise UsageError(
            f'--host {launch.host}: not an IPv4 address of this machine ({error}). Fix: use one.'
        ) from error


def _require_free(kind: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('', port))
        except OSError as error:
            raise UsageError(
                f'--{kind}_ports: port {port} is busy ({error.strerror}). Fix: choose another, or'
                ' omit the flag.'
            ) from error
