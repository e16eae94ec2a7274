"""Supervises a running experiment: statistics in, restarts and checkpoints out.

Runs in one thread of the launcher, about twice a second; another thread writes checkpoints. Each
box has its own supervisor: `infra/cluster.py` for servers, `pipelines/launch/shard_watch.py` for
servers that hang, `pipelines/launch/jobs.py` for workers.
"""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from infra.cluster import PARAMETER_SERVER, Cluster, ClusterError
from infra.guard import Guard, UnforeseenError
from infra.memory import resident_bytes
from infra.own_time import OwnTime
from infra.parameter_server.client import ParameterClient
from infra.parameter_server.ledger import MAX_BYTES
from infra.parameter_server.protocol import ParameterServerError
from infra.replay.errors import ReplayError
from infra.telemetry import TelemetryReader
from pipelines.events import heartbeats_in
from pipelines.experiment.config import ExperimentConfig
from pipelines.launch.evaluator import EvaluatorProcess
from pipelines.launch.interrupts import Signals
from pipelines.launch.jobs import START_SECONDS, Jobs, WorkersFailedError
from pipelines.launch.saver import Saver
from pipelines.launch.shard_watch import ASK_SECONDS, Replay, ServerWatch
from pipelines.monitoring import beam_counters
from pipelines.monitoring.advice import advice
from pipelines.monitoring.display import Display
from pipelines.monitoring.monitor import Monitor
from pipelines.monitoring.run_state import RunState

_POLL_SECONDS = 0.5
_STOPPING = (
    'stopping and writing a checkpoint; a second signal stops at once and loses what came after the'
    ' last checkpoint'
)
_ENDING = (
    'the run is ending already and will not be evaluated; a second signal stops at once and loses'
    ' what came after the last checkpoint'
)
_STATUS_SECONDS = 2.0
DRAIN_SECONDS = 120.0  # an update, the end of a segment and of a writer, on a busy machine
_RETURN_SECONDS = 90.0  # a server that hangs is killed after 30 and restarts within a minute
_PARAMETERS_SECONDS = 60.0  # training that a shard's death may cost; a save takes under a second


class LastCheckpointError(Exception):
    """A run's last checkpoint could not be written; the message says what that costs."""


FAILURES = (
    WorkersFailedError,
    ClusterError,
    ParameterServerError,
    ReplayError,
    LastCheckpointError,
    UnforeseenError,
    OSError,
)
"""Errors that may end a run."""


class Due:
    """Is due once every `period_seconds`: first after one period, or `at_once`."""

    def __init__(self, period_seconds: float, at_once: bool = False):
        self._period = period_seconds
        self._next = time.monotonic() + (0.0 if at_once else period_seconds)

    def take(self) -> bool:
        """Whether it is due; if so, starts a new period."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._period
        return True


@dataclasses.dataclass
class Training:
    """Supervises the boxes of a run, all open.

    Attributes:
      config: the experiment.
      display: shows progress.
      owner: the run's name at the parameter server.
      signals: the user's.
      cluster, client, reader, jobs, monitor, saver, replay, evaluator: the boxes.
      at_budget: called once the budget is reached, before the workers end.
      hearing: a clock that pauses while no heartbeat can arrive.
    """

    config: ExperimentConfig
    display: Display
    owner: str
    signals: Signals
    cluster: Cluster
    client: ParameterClient
    reader: TelemetryReader
    jobs: Jobs
    monitor: Monitor
    saver: Saver
    replay: Replay
    evaluator: EvaluatorProcess
    at_budget: Callable[[], object]

    def __post_init__(self) -> None:
        self._restarts: dict[str, int] = {}
        self._reruns: Counter[str] = Counter()
        self._reruns_before: Counter[str] | None = None
        self._bundles: dict[int, Mapping[str, Any]] = {}
        self._status_due = Due(_STATUS_SECONDS)
        self._parameters_due = Due(_PARAMETERS_SECONDS)
        self._checkpoint_due = Due(self.config.run.checkpoint_period_seconds)
        self._own_time = OwnTime()
        self.hearing = OwnTime()
        self._servers = ServerWatch(
            self.cluster, self.client, self.reader, self.replay, self.display.message
        )
        self._guard = Guard(self.display.message, FAILURES)
        self._clock_before: tuple[int, int] | None = None
        self._held_before: int | None = None
        self._learned = self._ending = False
        self._shown: set[str] = set()
        self._rollbacks = 0
        self._dropped_records = 0

    def run(self) -> str:
        """Trains until the budget is reached or a signal arrives; returns which.

        Tries to write a checkpoint before it raises an error.

        Raises:
          WorkersFailedError: a worker fails again and again.
          ClusterError: a server fails again and again.
          ParameterServerError, ReplayError, OSError: statistics cannot be fetched or written.
          UnforeseenError: an act of the loop fails again and again.
          LastCheckpointError: the run has ended, but its last checkpoint could not be written.
        """
        if self.signals.name:
            return self.signals.name
        self.signals.effect = _STOPPING
        self.display.phase('starting workers')
        self.jobs.start(self.hearing.look())
        try:
            reason = self._watch()
        except FAILURES as error:
            self._rescue(error)
            raise
        self._end(complete=not self.signals.name)
        return reason

    def _message_once(self, subject: str, text: str) -> None:
        """Prints a message unless there was one about this subject."""
        if subject not in self._shown:
            self._shown.add(subject)
            self.display.message(f'{subject}: {text}')

    def _rescue(self, error: BaseException) -> None:
        """Saves what the working servers hold; a second failure becomes a note of the first."""
        try:
            if self._servers.parameters or PARAMETER_SERVER in self.cluster.abandoned:
                raise self._unsaved()
            self._end()
        except FAILURES as second:
            error.add_note(str(second))

    def _watch(self) -> str:
        while not (reason := self._reason()):
            acts = (self.look, self.cluster.check, self._supervise, self.save_if_due)
            for act in (*acts, self.evaluate):
                self._guard.attempt(act)
            time.sleep(_POLL_SECONDS)
        return reason

    def evaluate(self) -> None:
        """Keeps the evaluator running and collects its scores."""
        done = self.monitor.evaluations
        self.evaluator.look(self.monitor.state().updates, done.updates, done.number)
        self.monitor.evaluator(self.evaluator.cpu_seconds)

    def _supervise(self) -> None:
        self.jobs.supervise(self.hearing.seconds, self._own_time.look())

    def _attempt(self, act: Callable[[], object]) -> None:
        """Calls `act`; at the end of the run nothing it raises may prevent the last checkpoint."""
        self._guard.attempt(act, at_any_rate=self._ending)

    def _end(self, complete: bool = False) -> None:
        """Ends the workers and writes the last checkpoint; a `complete` run is not resumed."""
        self._ending = True
        self.signals.effect = _ENDING
        self.evaluator.stop()
        if complete:
            self.at_budget()
        self.display.phase('stopping workers')
        if not self.monitor.state().agent_steps:
            self.jobs.stop()  # nothing to save; the workers may still be importing TensorFlow
            return
        self._drain()
        if complete and self.jobs.unwritten:
            self._write_rest()
        for act in (self._ask, self.evaluate, self.look, self._commit, self._show_missing_rows):
            self._attempt(act)
        self._await_saver()
        self.write_last_checkpoint()

    def _reason(self) -> str:
        if self.signals.name:
            return self.signals.name
        return 'max_frames' if self.monitor.frames >= self.config.run.max_frames else ''

    def look(self) -> None:
        """Collects statistics from workers and servers and shows them."""
        if self._status_due.take():
            self._ask()
        events = self.reader.drain(timeout_seconds=0.2)
        now = self.hearing.look(counts=self._servers.hears_workers())
        taken = self.monitor.fold(events)
        self.jobs.hear(heartbeats_in(taken), now)
        self._bundles.update(_bundle_replays(taken))
        for text in (*self.cluster.news(), *self.jobs.news()):
            self.display.message(text)
        self._count_restarts()
        self.monitor.tick()
        state = self.monitor.state()
        if state.malformed_events:
            self._message_once('telemetry', 'malformed events are counted and left out')
        if not self._ending:
            self._show_phase(state)
        for subject, text in advice(state, self.config):
            self._message_once(subject, text)
        self.display.update(state)

    def _show_rollbacks(self, shards: list[dict[str, Any]]) -> None:
        """Warns of parameter shards that restored their last finite state."""
        rollbacks = sum(shard['rollbacks'] for shard in shards)
        if rollbacks > self._rollbacks:
            self.display.message(
                'parameter server: parameters or optimizer slots were not finite (the shard has'
                ' restored its last finite state). Fix: lower --learning_rate and'
                ' --learning_rate_end, or bound gradients by --gradient_clip_norm.'
            )
        self._rollbacks = rollbacks

    def _ask(self) -> None:
        """Fetches clock and counts from the servers.

        Raises:
          ParameterServerUnavailable, ReplayUnavailable: an attached server is unreachable.
        """
        shards = self._servers.ask_parameters(self.owner)
        if shards is not None:
            self._count_reruns(shards[0]['reruns'])
            clock = shards[0]['version'], shards[0]['agent_steps']
            self._clock_before = self._clock_before or clock
            self.monitor.clock(*clock)
            self._show_rollbacks(shards)
            # A shard that restarts counts anew.
            self._dropped_records = max(self._dropped_records, shards[0]['dropped_records'])
            self.monitor.parameter_server(shards)
        statuses = self._servers.ask_replay(self.saver.replay)
        if self._bundles and not statuses:
            bundles = range(self.config.run.num_actors)
            statuses = [self._bundles.get(bundle, {}) for bundle in bundles]
        self.monitor.replay(statuses)
        pids = dict(self.cluster.pids)
        if self.evaluator.pid is not None:
            pids['evaluator'] = self.evaluator.pid
        self.monitor.memory({name: resident_bytes(pid) for name, pid in pids.items()})

    def _count_reruns(self, reruns: Mapping[str, int]) -> None:
        """Counts the workers that the engine itself has restarted since this launch."""
        if self._reruns_before is None:
            self._reruns_before = Counter(reruns)
        self._reruns = Counter(reruns) - self._reruns_before

    def _show_phase(self, state: RunState) -> None:
        """Shows the phase; a resumed run's clock is above 0 before its workers start."""
        updates, agent_steps = self._clock_before or (state.updates, state.agent_steps)
        if self.saver.whole:
            self.display.phase('checkpointing')
        elif state.updates > updates:
            self.display.phase('training')
        elif state.agent_steps > agent_steps or self._fills(state):
            needed = self.config.replay.min_replay_size
            held = state.agent_steps if state.replay_size is None else state.replay_size
            if held < needed:
                self.display.phase(f'filling replay {held}/{needed}')

    def _fills(self, state: RunState) -> bool:
        """Whether the replay has grown: its rows arrive before the actors report their steps."""
        if self._held_before is None:
            self._held_before = state.replay_size
        return (state.replay_size or 0) > (self._held_before or 0)

    def _count_restarts(self) -> None:
        # An engine that replaces workers itself does not report it; the parameter server does.
        workers = Counter(self.jobs.restarts) + self._reruns
        for component, count in {**self.cluster.restarts, **workers}.items():
            new = count - self._restarts.get(component, 0)
            for _ in range(new):
                self.monitor.restarted(component)
                self.display.message(f'{component} restarted')
            self._restarts[component] = count

    def save_if_due(self) -> None:
        """Begins a checkpoint or saves the parameters alone, if due and all servers reply."""
        self.saver.ended()
        if self.saver.busy or self._servers.parameters or self._servers.replays:
            return  # a save would wait for them
        if not self.monitor.state().updates:
            return  # the shards may have no parameters yet
        if self._checkpoint_due.take():
            self._begin_checkpoint(self.replay.addresses)
        elif self.cluster.config.parameter_addresses:
            # The run cannot restart attached shards, but it needs a checkpoint to resume with them.
            if not self._learned:
                self._learned = True
                self._begin_checkpoint(self.replay.addresses)
        elif not self._learned or self._parameters_due.take():
            self._learned = True
            self.saver.save_parameters()

    def _drain(self) -> None:
        """Asks the workers to end and waits for them; kills them after `DRAIN_SECONDS`."""
        own_time = OwnTime()
        ask = Due(ASK_SECONDS, at_once=True)  # repeated, since the shard may restart
        while self.jobs.running and own_time.look() < DRAIN_SECONDS:
            if ask.take():
                self._attempt(self._ask_to_stop)
            self._attempt(self.look)
            self._attempt(self._end_stranded)
            time.sleep(_POLL_SECONDS)
        self._attempt(self.jobs.stop)

    def _write_rest(self) -> None:
        """Runs a last job of the workers of which a job failed: their records are at a shard.

        A resumed run's workers hand them on themselves.
        """
        self.display.phase('writing statistics')
        self._attempt(lambda: self.jobs.submit_unwritten(self.hearing.look()))
        own_time, most = OwnTime(), START_SECONDS + DRAIN_SECONDS
        while self.jobs.running and own_time.look() < most and not self.signals.name:
            self._attempt(self.look)
            time.sleep(_POLL_SECONDS)
        self._attempt(self.jobs.stop)
        if left := sorted(self.jobs.unwritten):
            names = ', '.join(f'{kind} {number}' for kind, number in left)
            self.display.message(f'statistics/: the last rows of {names} are missing')

    def _commit(self) -> None:
        """Lets the checkpoint forget segments whose results are written; compares the counts."""
        if self.jobs.unwritten:
            return
        with contextlib.suppress(ParameterServerError):  # written again after a resumption
            self.client.commit_segments()
        counted = self.monitor.beam_counters()
        steps = sum(each['agent_steps'] for each in counted.values() if 'agent_steps' in each)
        own = self.monitor.state().agent_steps
        if counted and self._clock_before == (0, 0) and steps != own:
            self.display.message(
                f'Beam counted {steps:,} agent steps, the parameter server {own:,}: jobs that'
                ' failed leave no counters, workers that died no record of their last segment'
            )

    def _show_missing_rows(self) -> None:
        """Warns of rows that no table has, as far as that is known."""
        if rows := beam_counters.unwritten_rows(self.monitor.beam_counters()):
            self.display.message(f'statistics/: rows are not written: {rows}')
        restarts = self.jobs.restarts or self._reruns
        if self._dropped_records and restarts:
            self.display.message(
                f'statistics/: the parameter server dropped {self._dropped_records:,} records of'
                f' segments (beyond {MAX_BYTES >> 20} MB); rows of workers that were started again'
                ' may be missing'
            )

    def _ask_to_stop(self) -> None:
        with contextlib.suppress(ParameterServerError):  # asked again later
            self.client.request_stop(ASK_SECONDS)

    def _end_stranded(self) -> None:
        self.jobs.end_stranded(self.hearing.seconds, self._own_time.look())

    def _begin_checkpoint(self, replay: tuple[str, ...]) -> bool:
        counters = {**self.monitor.counters(), 'submissions': self.jobs.submissions}
        return self.saver.save(replay, counters)

    def _await_saver(self) -> bool:
        """Waits for the save in progress, still supervising; returns whether it succeeded."""
        while self.saver.busy:
            self._attempt(self.look)
            time.sleep(_POLL_SECONDS)
        return self.saver.ended()

    def _await_servers(self) -> None:
        """Waits, still supervising, for servers that hang or restart: a save would fail."""
        own_time = OwnTime()
        while self._servers.parameters or self._servers.replays:
            if self.cluster.abandoned or own_time.look() > _RETURN_SECONDS:
                return
            self._attempt(self.look)
            time.sleep(_POLL_SECONDS)

    def write_last_checkpoint(self) -> None:
        """Writes the last checkpoint, without the replay if that fails.

        Raises:
          LastCheckpointError: it fails without the replay too.
        """
        self.display.phase('checkpointing')
        self._await_servers()
        if self._servers.parameters:
            raise self._unsaved()
        with_replay = self._begin_checkpoint(self.replay.addresses)
        saved = self._await_saver()
        if not saved and with_replay:
            self.display.message('checkpoint: trying again without the replay')
            self._begin_checkpoint(())
            saved = self._await_saver()
        if not saved:
            raise self._unsaved()

    def _unsaved(self) -> LastCheckpointError:
        """The error for a last checkpoint that cannot be written."""
        state = self.monitor.state()
        name, counters = self.saver.newest or ('', {})
        frames = counters.get('agent_steps', 0) * self.config.environment.action_repeat
        updates = counters.get('updates', 0)
        lost = _progress(max(0, state.frames - frames), state.unit, max(0, state.updates - updates))
        kept = 'no checkpoint exists'
        if name:
            kept = f'{name} remains ({_progress(frames, state.unit, updates)})'
        return LastCheckpointError(f'the last {lost} could not be saved; {kept}')


def _progress(frames: int, unit: str, updates: int) -> str:
    return f'{frames:,} {unit} and {updates:,} updates'


def _bundle_replays(events: Iterable[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Status of each bundle's own replay, by the bundle's number."""
    return {
        event['worker']: event['replay']
        for event in events
        if event['component'] == 'bundle' and 'replay' in event
    }
