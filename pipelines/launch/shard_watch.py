"""Polls a run's servers: reports and counts out; kills own servers that hang.

`infra/cluster.py` restarts servers that exit; only a client notices one that hangs.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infra.cluster import Cluster
from infra.own_time import OwnTime, Silences
from infra.parameter_server.client import ParameterClient
from infra.parameter_server.protocol import ParameterServerUnavailable
from infra.probe import NoAnswer, ask_replay_shard
from infra.replay.errors import ReplayUnavailable
from infra.replay.status import StatusReader
from infra.telemetry import TelemetryReader

HUNG_SECONDS = 30.0
"""A server of the run that does not answer for this long is killed and restarted."""
AWAY_SECONDS = 120.0
"""An attached parameter shard that is unreachable for this long ends the run."""
REPLAY_AWAY_SECONDS = 900.0
"""The same for an attached replay shard, which does not answer for minutes while it saves."""
ASK_SECONDS = 5.0
"""A shard that takes longer to answer may be restarting or hang."""
_LONGEST_PAUSE_SECONDS = 144.0  # gRPC's between two attempts to connect: 120 s and a fifth


@dataclasses.dataclass(frozen=True)
class Replay:
    """The replay shards' addresses (empty in the bundled topology) and status."""

    addresses: tuple[str, ...]
    status: StatusReader


class ServerWatch:
    """Tracks servers that do not answer: kills the run's own; an attached one ends the run.

    Attributes:
      parameters: parameter shards that do not answer.
      replays: replay shards that do not answer, including the server of the telemetry queue.
    """

    def __init__(
        self,
        cluster: Cluster,
        client: ParameterClient,
        reader: TelemetryReader,
        replay: Replay,
        tell: Callable[[str], None],
    ):
        """`client`, `reader` and `replay` query the cluster's servers; `tell` prints a message."""
        self._cluster, self._client, self._reader = cluster, client, reader
        self._replay, self._tell = replay, tell
        self._own_time = OwnTime()
        self._deaf_since: float | None = None
        self._hears_from = 0.0
        self.parameters, self.replays = Silences(), Silences()

    def hears_workers(self) -> bool:
        """Whether a live worker's heartbeats would arrive now; call it at each look.

        Workers wait in silence for a server that does not answer. Once it does, their channels to
        it may stay down for as long again.
        """
        now = self._own_time.look()
        if not self._reader.hears or self.parameters or self.replays:
            self._deaf_since = now if self._deaf_since is None else self._deaf_since
            return False
        if self._deaf_since is not None:
            self._hears_from = now + min(now - self._deaf_since, _LONGEST_PAUSE_SECONDS)
            self._deaf_since = None
        return now >= self._hears_from

    def ask_parameters(self, owner: str) -> list[dict[str, Any]] | None:
        """The parameter shards' reports; None if a shard does not answer.

        Raises:
          ParameterServerUnavailable: an attached shard is unreachable for too long.
        """
        try:
            shards = self._client.report(ASK_SECONDS, owner)['shards']
        except ParameterServerUnavailable as error:
            if not self.parameters:
                self._tell(str(error))
            attached = bool(self._cluster.config.parameter_addresses)
            self._handle(self.parameters, error, error.address, AWAY_SECONDS if attached else None)
            return None
        self.parameters.clear()
        return shards

    def ask_replay(self, saving: Sequence[str]) -> Sequence[Mapping[str, Any]]:
        """Each replay shard's status; empty for one that does not answer.

        `saving`: addresses of shards that may not answer because they write a checkpoint.

        Raises:
          ReplayUnavailable: an attached shard is unreachable for too long.
        """
        telemetry = self._cluster.telemetry_address
        statuses = self._replay.status.read() if self._replay.addresses else []
        answers = {a: bool(status) for a, status in zip(self._replay.addresses, statuses)}
        answers[telemetry] = answers.get(telemetry, True) and self._reader.hears
        for address, answer in answers.items():
            if answer or address in saving:
                self.replays.see(address, True, self._own_time.look())
                continue
            error = ReplayUnavailable(f'replay shard {address}: no answer. Fix: start it again.')
            attached = bool(self._cluster.config.replay_addresses)
            self._handle(self.replays, error, address, REPLAY_AWAY_SECONDS if attached else None)
        return statuses

    def _handle(
        self, silences: Silences, error: Exception, address: str, bound_seconds: float | None
    ) -> None:
        """Kills a server that hangs; raises `error` for an attached one after `bound_seconds`."""
        now = self._own_time.look()
        silent = silences.see(address, False, now)
        if bound_seconds is not None:
            if silent > bound_seconds:
                raise error
        elif silent > HUNG_SECONDS:
            if silences is self.replays and _answers_new_channel(address):
                silences.restart(address, now)  # only old channels to it are still down
            elif self._cluster.kill_hung(address, HUNG_SECONDS):
                self._tell(f'{address}: no answer for {silent:.0f} s, killed to restart it')
                silences.restart(address, now)


def _answers_new_channel(address: str) -> bool:
    """Whether a replay shard answers over a new channel, outside Reverb's pool."""
    try:
        ask_replay_shard(address, ASK_SECONDS)
    except NoAnswer:
        return False
    return True
