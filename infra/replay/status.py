"""Status of the replay: addresses in, each shard's size and counts out."""

from collections.abc import Sequence

from infra.replay.config import EXPERIENCE_TABLE

_TIMEOUT_SECONDS = 1  # whole seconds are all that Reverb's client takes


class StatusReader:
    """Asks the shards how many transitions they hold, took and gave."""

    def __init__(self, addresses: Sequence[str]):
        """`addresses` are host:port, in the order of the shards."""
        import reverb

        self._clients = [reverb.Client(address) for address in addresses]

    def read(self) -> list[dict[str, int]]:
        """Per shard `size`, `inserts` and `samples` in transitions; empty for one that is away."""
        return [_status(client) for client in self._clients]


def _status(client) -> dict[str, int]:
    try:
        table = client.server_info(timeout=_TIMEOUT_SECONDS)[EXPERIENCE_TABLE]
    except Exception:  # Reverb raises many kinds; a shard that restarts tells nothing
        return {}
    limiter = table.rate_limiter_info
    return {
        'size': table.current_size,
        'inserts': limiter.insert_stats.completed,
        'samples': limiter.sample_stats.completed,
    }
