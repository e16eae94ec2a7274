"""Health of a parameter shard: its address in, its report out, without opening a stream."""

from __future__ import annotations

from typing import Any

import pyarrow.flight as flight

from infra.sealed import parse_object

# Keeps connections of a process from sharing one channel with its long back-off.
_CHANNEL_OPTIONS = [('grpc.use_local_subchannel_pool', 1)]


def connect(
    address: str, tls_roots: bytes | None = None, tls_unverified: bool = False
) -> flight.FlightClient:
    """Returns a client of the shard at `host:port`, which connects on its first call.

    Args:
      address: `host:port`.
      tls_roots: PEM roots of the shard's certificate; None for no TLS.
      tls_unverified: use TLS without verifying the certificate, if `tls_roots` is None.
    """
    options: dict[str, Any] = {'generic_options': _CHANNEL_OPTIONS}
    if tls_roots is not None:
        options['tls_root_certs'] = tls_roots
    elif tls_unverified:
        options['disable_server_verification'] = True
    else:
        return flight.FlightClient(f'grpc://{address}', **options)
    return flight.FlightClient(f'grpc+tls://{address}', **options)


def ask(client: flight.FlightClient, timeout_seconds: float) -> dict[str, Any]:
    """Fetches a shard's report (see `Shard.report`).

    Raises:
      FlightError, ArrowException, OSError, ValueError: the shard sends no valid report in time.
    """
    options = flight.FlightCallOptions(timeout=timeout_seconds)
    (answer,) = client.do_action(flight.Action('health', b''), options)
    return parse_object(answer.body.to_pybytes())
