"""The watch over a run whose servers serve: statistics in, restarts and checkpoints out.

Runs in the launcher, in one thread, about twice a second. No data of the training passes through
here; what goes wrong with one box is left to the box's own supervisor (`infra/cluster.py` for
servers, `pipelines/jobs.py` for workers).
"""

import contextlib
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from infra.cluster import PARAMETER_SERVER, REPLAY, Cluster, ClusterError
from infra.parameter_server.client import ParameterClient
from infra.parameter_server.protocol import ParameterServerError, ParameterServerUnavailable
from infra.replay.errors import ReplayError
from infra.replay.status import StatusReader
from infra.telemetry import TelemetryReader
from pipelines.checkpoints import Checkpoints
from pipelines.config import ExperimentConfig
from pipelines.display import Display
from pipelines.jobs import Jobs, WorkersFailedError
from pipelines.monitor import Monitor, RunState

_POLL_SECONDS = 0.5
_STOPPING = (
    'stopping, then writing a checkpoint; once more to stop at once, which loses what came after'
    ' the last one'
)
_STATUS_SECONDS = 2.0
_DRAIN_SECONDS = 120.0  # an update, a segment's end and a writer's close, on a busy machine
_PARAMETERS_SECONDS = 60.0  # what a shard's death may cost; a save takes under a second
_BACKLOG_SECONDS = 10.0  # workers send what they kept while the telemetry's server was busy
_RESTART_SECONDS = 60.0  # a server's import of TensorFlow and restore, on a busy machine
_ASK_SECONDS = 5.0  # a shard that answers later may be restarting, or hang
_HUNG_SECONDS = 30.0  # a shard of ours that answers nobody for so long is killed and started again
_AWAY_SECONDS = 120.0  # a shard of others' that is away for so long ends the run


class LastCheckpointError(Exception):
    """What was learned since the checkpoint before could not be saved."""


@dataclasses.dataclass(frozen=True)
class Replay:
    """Addresses of the replay shards (none in the bundled topology), and their status."""

    addresses: tuple[str, ...]
    status: StatusReader


class Due:
    """Says, once every `period_seconds`, that something is due; the first time after one period."""

    def __init__(self, period_seconds: float, at_once: bool = False):
        """`at_once`: the first time now."""
        self._period = period_seconds
        self.postpone()
        if at_once:
            self._next = time.monotonic()

    def postpone(self) -> None:
        """Begins a new period now."""
        self._next = time.monotonic() + self._period

    def take(self) -> bool:
        """Whether it is due; if so, a new period begins."""
        if time.monotonic() < self._next:
            return False
        self.postpone()
        return True


@dataclasses.dataclass
class Training:
    """A run's boxes at work.

    Attributes:
      config: the experiment.
      display: where progress is shown.
      owner: the run's name at the parameter server.
      interrupted: name of the signal by which the user asked for a stop, or empty.
      cluster, client, reader, jobs, monitor, checkpoints, replay: the boxes, open.
    """

    config: ExperimentConfig
    display: Display
    owner: str
    interrupted: Callable[[], str]
    cluster: Cluster
    client: ParameterClient
    reader: TelemetryReader
    jobs: Jobs
    monitor: Monitor
    checkpoints: Checkpoints
    replay: Replay

    def __post_init__(self) -> None:
        self._restarts: dict[str, int] = {}
        self._reruns: Counter[str] = Counter()
        self._reruns_before: Counter[str] | None = None
        self._bundles: dict[int, Mapping[str, Any]] = {}
        self._status_due = Due(_STATUS_SECONDS)
        self._parameters_due = Due(_PARAMETERS_SECONDS)
        self._checkpoint_due = Due(self.config.run.checkpoint_period_seconds)
        # Until then nobody could be heard: the telemetry's server was busy, or away.
        self._deaf_until = 0.0
        self._learned = self._ending = False
        self._away_since: float | None = None  # since when a parameter shard has not answered

    def run(self) -> str:
        """Watches until the budget is reached or the user stops it; returns why it ended.

        Raises:
          WorkersFailedError: workers cannot be kept alive; a checkpoint was tried.
          ClusterError: nor a server; likewise.
          ParameterServerError, OSError: statistics cannot be had or written; likewise.
          LastCheckpointError: the run is over, but what it learned could not be saved.
        """
        if self.interrupted():
            return self.interrupted()
        self.display.phase('starting workers')
        self.jobs.start(time.time())
        try:
            reason = self._watch()
        except (WorkersFailedError, ClusterError, ParameterServerError, OSError):
            if self._away_since is None and PARAMETER_SERVER not in self.cluster.abandoned:
                # What still works is asked for all it has: nothing learned shall be lost.
                with contextlib.suppress(LastCheckpointError, ParameterServerError, OSError):
                    self._end()
            raise
        if self.interrupted():
            self.display.message(f'{reason}: {_STOPPING}')
        self._end()
        return reason

    def _watch(self) -> str:
        while not (reason := self._reason()):
            self._look()
            self.cluster.check()
            self.jobs.supervise(self.monitor.heartbeats(), time.time(), deaf_until=self._deaf_until)
            self._save_if_due()
            time.sleep(_POLL_SECONDS)
        return reason

    def _end(self) -> None:
        self._ending = True
        self.display.phase('stopping workers')
        if not self.monitor.state().agent_steps:
            self.jobs.stop()  # nothing to keep: the workers may still be importing TensorFlow
            return
        self._drain()
        self._last_checkpoint()

    def _reason(self) -> str:
        if signal := self.interrupted():
            return signal
        return 'max_frames' if self.monitor.frames >= self.config.run.max_frames else ''

    def _look(self) -> None:
        """Takes in what the workers and servers tell, and shows it."""
        if self._status_due.take():
            self._ask()
        events = self.reader.drain(timeout_seconds=0.2)
        self._bundles.update(_bundle_replays(events))
        self.monitor.fold(events)
        self._count_restarts()
        for text in self.jobs.news():
            self.display.message(text)
        self.monitor.tick()
        state = self.monitor.state()
        if not self._ending:
            self._show_phase(state)
        self.display.update(state)

    def _ask(self) -> None:
        """Asks the servers for clock and counts."""
        try:
            shards = self.client.report(_ASK_SECONDS, self.owner)['shards']
        except ParameterServerUnavailable as error:
            self._see_away(error)
        else:
            self._away_since = None
            self._see_reruns(shards[0]['reruns'])
            self.monitor.clock(shards[0]['version'], shards[0]['agent_steps'])
            self.monitor.parameter_server(shards)
        if self.replay.addresses:
            self.monitor.replay(self.replay.status.read())
        elif self._bundles:
            bundles = range(self.config.run.num_actors)
            self.monitor.replay([self._bundles.get(bundle, {}) for bundle in bundles])

    def _see_reruns(self, reruns: Mapping[str, int]) -> None:
        """Takes note of how often the engine has run workers again, in this part of the run."""
        if self._reruns_before is None:
            self._reruns_before = Counter(reruns)
        self._reruns = Counter(reruns) - self._reruns_before

    def _see_away(self, error: ParameterServerUnavailable) -> None:
        """Deals with a parameter shard that does not answer.

        Raises:
          ParameterServerUnavailable: it is not this run's to start again, and stays away.
        """
        now = time.monotonic()
        self._deaf_until = time.time()  # workers wait for that shard too, in silence
        if self._away_since is None:
            self._away_since = now
            self.display.message(str(error))
        away = now - self._away_since
        if self.cluster.config.parameter_addresses:
            if away > _AWAY_SECONDS:
                raise error
        elif away > _HUNG_SECONDS and self.cluster.kill(error.address):
            self.display.message(f'{error.address} is killed, to start again')
            self._away_since = now

    def _show_phase(self, state: RunState) -> None:
        if state.updates:
            self.display.phase('training')
        elif state.agent_steps:
            needed = self.config.replay.min_replay_size
            self.display.phase(f'filling replay {min(state.agent_steps, needed)}/{needed}')

    def _count_restarts(self) -> None:
        # An engine that replaces workers itself says nothing: the parameter server tells.
        workers = Counter(self.jobs.restarts) + self._reruns
        for component, count in {**self.cluster.restarts, **workers}.items():
            new = count - self._restarts.get(component, 0)
            for _ in range(new):
                self.monitor.restarted(component)
                self.display.message(f'{component} restarted')
            if new and component in (PARAMETER_SERVER, REPLAY):
                # Workers wait for the one in silence; the other hands on what they say.
                self._deaf_until = time.time() + _RESTART_SECONDS
            self._restarts[component] = count

    def _save_if_due(self) -> None:
        if not self.monitor.state().updates:
            return  # the shards may have no parameters yet
        if self._checkpoint_due.take():
            self._checkpoint()
        elif self.cluster.config.parameter_addresses:
            # Such shards are not this run's to restart; but without a checkpoint it could not go on
            # with them either.
            if not self._learned:
                self._learned = True
                self._checkpoint()
        elif not self._learned or self._parameters_due.take():
            self._learned = True
            with self._reported():
                self.checkpoints.save_parameters(self.client)

    def _drain(self) -> None:
        """Asks the workers to end, and waits for them as long as it takes them at most."""
        deadline = time.monotonic() + _DRAIN_SECONDS
        ask = Due(_ASK_SECONDS, at_once=True)  # again and again: the shard may restart meanwhile
        while self.jobs.running and time.monotonic() < deadline:
            with contextlib.suppress(ParameterServerError):  # asked again, or ended below
                if ask.take():
                    self.client.request_stop(_ASK_SECONDS)
            self._look()
            time.sleep(_POLL_SECONDS)
        self.jobs.stop()
        self._ask()
        self._look()

    def _checkpoint(self) -> None:
        self.display.phase('checkpointing')
        self._save(self.replay.addresses)
        self._deaf_until = time.time() + _BACKLOG_SECONDS

    def _last_checkpoint(self) -> None:
        """Saves what was learned, without the replay if that cannot be had.

        Raises:
          LastCheckpointError: nor without.
        """
        self.display.phase('checkpointing')
        saved = False
        if self._away_since is None:
            saved = self._save(self.replay.addresses)
            if not saved and self.replay.addresses:
                self.display.message('trying a checkpoint without the replay')
                saved = self._save(())
        if not saved:
            raise LastCheckpointError(
                'what was learned since the last checkpoint could not be saved; --resume goes on'
                ' from that one'
            )

    def _save(self, replay: tuple[str, ...]) -> bool:
        """Whether a checkpoint with these replay shards was written."""
        counters = {**self.monitor.counters(), 'submissions': self.jobs.submissions}
        with self._reported():
            self.checkpoints.save(self.client, replay, counters)
            return True
        return False

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Tells of a checkpoint that cannot be written: the one before it stays in force."""
        try:
            yield
        except (OSError, ParameterServerError, ReplayError) as error:
            logging.exception('no checkpoint')
            self.display.message(f'no checkpoint written: {error}')


def _bundle_replays(events: Iterable[Any]) -> dict[int, Mapping[str, Any]]:
    """Status of each bundle's own replay, by the bundle's number."""
    return {
        event['worker']: event['replay']
        for event in events
        if isinstance(event, Mapping) and event.get('component') == 'bundle' and 'replay' in event
    }
