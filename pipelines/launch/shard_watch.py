"""Asks a run's servers how they are: reports and counts in; those of ours that hang are killed.

What runs is looked after by `infra/cluster.py`; only who asks a server notices that it hangs.
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
"""A server of ours that answers nobody for so long is killed and started again."""
AWAY_SECONDS = 120.0
"""A parameter shard of others' that is away for so long ends the run."""
REPLAY_AWAY_SECONDS = 900.0
"""A replay shard of others' likewise: it answers nobody while it writes its state, for minutes."""
ASK_SECONDS = 5.0
"""A shard that answers later may be restarting, or hang."""
_LONGEST_PAUSE_SECONDS = 144.0  # gRPC's between two attempts to connect: 120 s and a fifth


@dataclasses.dataclass(frozen=True)
class Replay:
    """Addresses of the replay shards (none in the bundled topology), and their status."""

    addresses: tuple[str, ...]
    status: StatusReader


class ServerWatch:
    """Knows which servers do not answer, and ends what cannot be helped.

    Attributes:
      parameters: parameter shards that do not answer.
      replays: replay shards that do not answer, the one that hands on the telemetry included.
    """

    def __init__(
        self,
        cluster: Cluster,
        client: ParameterClient,
        reader: TelemetryReader,
        replay: Replay,
        tell: Callable[[str], None],
    ):
        """`client`, `reader`, `replay`: ask the cluster's servers; `tell`: takes messages."""
        self._cluster, self._client, self._reader = cluster, client, reader
        self._replay, self._tell = replay, tell
        self._own_time = OwnTime()
        self._deaf_since: float | None = None
        self._hears_from = 0.0
        self.parameters, self.replays = Silences(), Silences()

    def hears_workers(self) -> bool:
        """Whether workers that live are heard now; to be asked at each look.

        They wait in silence for a server that does not answer; when it does, their channels to it
        pause for up to as long as it was away.
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
        """The parameter shards' reports; None: one does not answer.

        Raises:
          ParameterServerUnavailable: it is not this run's to start again, and stays away.
        """
        try:
            shards = self._client.report(ASK_SECONDS, owner)['shards']
        except ParameterServerUnavailable as error:
            if not self.parameters:
                self._tell(str(error))
            others = bool(self._cluster.config.parameter_addresses)
            self._see(self.parameters, error, error.address, AWAY_SECONDS if others else None)
            return None
        self.parameters.clear()
        return shards

    def ask_replay(self, saving: Sequence[str]) -> Sequence[Mapping[str, Any]]:
        """Each replay shard's status; empty for one that does not answer.

        `saving`: addresses of those that may be writing a checkpoint, and answer nobody for it.

        Raises:
          ReplayUnavailable: it is not this run's to start again, and stays away.
        """
        telemetry = self._cluster.telemetry_address
        statuses = self._replay.status.read() if self._replay.addresses else []
        answers = {a: bool(status) for a, status in zip(self._replay.addresses, statuses)}
        answers[telemetry] = answers.get(telemetry, True) and self._reader.hears
        for address, answer in answers.items():
            if answer or address in saving:
                self.replays.see(address, True, self._own_time.look())
                continue
            error = ReplayUnavailable(f'replay shard {address} does not answer: is it running?')
            others = bool(self._cluster.config.replay_addresses)
            self._see(self.replays, error, address, REPLAY_AWAY_SECONDS if others else None)
        return statuses

    def _see(
        self, silences: Silences, error: Exception, address: str, bound_seconds: float | None
    ) -> None:
        """Deals with a server that does not answer; `bound_seconds`: for one of others'."""
        now = self._own_time.look()
        silent = silences.see(address, False, now)
        if bound_seconds is not None:
            if silent > bound_seconds:
                raise error
        elif silent > HUNG_SECONDS:
            if silences is self.replays and _answers_anew(address):
                silences.restart(address, now)  # old channels to it pause: it was away for long
            elif self._cluster.kill_hung(address, HUNG_SECONDS):
                self._tell(f'{address} has not answered for {silent:.0f} s: killed, to start again')
                silences.restart(address, now)


def _answers_anew(address: str) -> bool:
    """Whether a replay shard answers over a new channel, in a pool that Reverb's do not share."""
    try:
        ask_replay_shard(address, ASK_SECONDS)
    except NoAnswer:
        return False
    return True
