"""Status of the replay: addresses in, each shard's size and counts out; checks a shard's spec."""

from collections.abc import Sequence
from typing import Any

from infra.replay.config import EXPERIENCE_TABLE
from infra.replay.errors import ReplaySpecMismatch
from infra.replay.trajectory import TrajectorySpec

_TIMEOUT_SECONDS = 1  # Reverb's client takes whole seconds only


class StatusReader:
    """Reads the numbers of transitions that the shards hold, inserted and sampled."""

    def __init__(self, addresses: Sequence[str]):
        """`addresses` are host:port, in the order of the shards."""
        import reverb

        self._clients = [reverb.Client(address) for address in addresses]

    def read(self) -> list[dict[str, int]]:
        """`size`, `inserts` and `samples` of each shard, in transitions; {} if unreachable."""
        return [_status(client) for client in self._clients]


def require_spec(info: Any, spec: TrajectorySpec, address: str) -> None:
    """Checks that a shard, whose `server_info()` is `info`, stores windows of `spec`.

    Raises:
      ReplaySpecMismatch: the shard's windows have another shape, or its frames another type.
    """
    rows = info[EXPERIENCE_TABLE].signature['rows']
    stored = tuple(rows.shape)
    ours = (spec.window, spec.row_bytes)
    if stored != ours:
        raise ReplaySpecMismatch(
            f'replay shard {address} stores windows of {stored[0]} rows of {stored[1]} bytes,'
            f' {spec} has {ours[0]} of {ours[1]}: give the spec that the shard was started with'
        )
    if rows.name != spec.rows_name:
        raise ReplaySpecMismatch(
            f'replay shard {address} stores {rows.name}, {spec} has {spec.rows_name}: give the spec'
            ' that the shard was started with'
        )


def _status(client) -> dict[str, int]:
    try:
        table = client.server_info(timeout=_TIMEOUT_SECONDS)[EXPERIENCE_TABLE]
    except Exception:  # Reverb raises many types, such as when a shard restarts
        return {}
    limiter = table.rate_limiter_info
    return {
        'size': table.current_size,
        'inserts': limiter.insert_stats.completed,
        'samples': limiter.sample_stats.completed,
    }
