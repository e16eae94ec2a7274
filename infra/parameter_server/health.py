"""Health of a parameter shard: its address in, its report out."""

from __future__ import annotations

import contextlib
import ssl
import time
from typing import Any

from infra.parameter_server import channel, protocol


def ask(address: str, timeout_seconds: float, tls: ssl.SSLContext | None = None) -> dict[str, Any]:
    """Fetches the report of the shard at `host:port` (see `Shard.report`).

    Args:
      address: of the shard.
      timeout_seconds: bound of the wait.
      tls: context of a TLS client (see infra/tls.py); None for no TLS.

    Raises:
      OSError, ValueError: the shard sends no valid report in time.
    """
    deadline = time.monotonic() + timeout_seconds
    with contextlib.closing(channel.connect(address, deadline, tls)) as shard:
        shard.send({'operation': protocol.HEALTH})
        report, _ = shard.receive(channel.LARGEST_REPLY_BYTES)
        return report
