"""Ports, the host and TLS of the servers to start, checked before anything is written."""

import socket

from infra import tls
from pipelines.errors import UsageError
from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.launch import Launch


def require_tls(launch: Launch) -> None:
    """Checks that the parameter shards to start will be let speak TLS to their own clients.

    Raises:
      UsageError: there is no certificate, or it will not be accepted at --host.
    """
    if launch.parameter_addresses or launch.tls_roots is None:
        return
    if launch.tls is None:
        raise UsageError(
            '--tls_roots: the parameter shards that are started speak no TLS; give'
            ' --tls_certificate and --tls_key, or --parameter_addresses of shards that do.'
        )
    try:
        tls.require_accepted(launch.tls, launch.tls_roots, launch.host)
    except tls.TlsError as error:
        raise UsageError(f'{error}.') from error


def require_ports(config: ExperimentConfig, launch: Launch) -> None:
    """Checks that ports asked for are free and as many as the shards, and the host this machine's.

    Raises:
      UsageError: a port is busy, their number is another than the shards', or `host` is wrong.
    """
    _require_host(launch)
    shards = {
        'parameter': config.parameter_server.num_parameter_shards,
        'replay': 1 if config.run.topology == 'bundled' else config.replay.num_replay_shards,
    }
    if both := set(launch.parameter_ports) & set(launch.replay_ports):
        raise UsageError(
            f'--parameter_ports and --replay_ports both name {min(both)}: give each shard its own.'
        )
    for kind, count in shards.items():
        ports = getattr(launch, f'{kind}_ports')
        if ports and getattr(launch, f'{kind}_addresses'):
            raise UsageError(
                f'--{kind}_ports contradicts --{kind}_addresses: give ports to start servers, or'
                ' addresses of servers that already run.'
            )
        if ports and not len(ports) == len(set(ports)) == count:
            raise UsageError(f'--{kind}_ports {ports}: {count} different ones are needed.')
        for port in ports:
            _require_free(kind, port)


def _require_host(launch: Launch) -> None:
    if launch.parameter_addresses and launch.replay_addresses:
        return  # nothing will listen
    try:
        socket.create_server((launch.host, 0)).close()
    except OSError as error:
        raise UsageError(
            f'--host {launch.host}: not an IPv4 address of this machine ({error}).'
        ) from error


def _require_free(kind: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('', port))
        except OSError as error:
            raise UsageError(
                f'--{kind}_ports: port {port} is busy ({error.strerror}); choose another, or leave'
                ' the flag out.'
            ) from error
