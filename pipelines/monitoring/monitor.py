"""Folds the workers' telemetry and the servers' counters into the state of the run.

In: telemetry events (possibly late, repeated or malformed); clock and counters of the parameter
server; the replay's counters. Out: a `RunState` to show, `episodes.jsonl`, TensorBoard scalars,
`summary.json`, the learning curve, and the counters of a checkpoint.
"""

import collections
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from infra.disk import write_json
from pipelines.events import count, counts, finite, histogram, is_event
from pipelines.monitoring import episodes, learning_curve, tensorboard
from pipelines.monitoring.counters import (
    REJECTIONS,
    Rates,
    RejectionTally,
    ReplayTally,
    StalenessTally,
    mean,
    remember,
)
from pipelines.storage.run_directory import RunDirectory

# Fields of a learner's event whose mean is meaningless.
_NOT_AVERAGED = frozenset(
    {'time', 'worker', 'session', 'submission', 'updates', 'agent_steps', 'rejected_outlier'}
)
_EVALUATION_FIELDS = ('protocol', 'episodes', 'epsilon', 'mean', 'std')

Worker = tuple[str, int]
"""A worker's component ('actor', 'learner', ...) and its index."""


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
    """The settings that the monitor needs.

    Attributes:
      game, preset, seed: as in the summary.
      max_frames: emulator frames that end the run.
      action_repeat: emulator frames per agent step.
      batch_size: transitions in an update.
      scalars_period_seconds: seconds between two writes to TensorBoard.
      rate_window_seconds: window of frames/s, updates/s and the ETA.
      settings: value of each setting of the experiment, by its name.
      launch: the line of `launches.jsonl` of this start or resume.
    """

    game: str
    preset: str
    seed: int
    max_frames: int
    action_repeat: int = 4
    batch_size: int = 32
    scalars_period_seconds: float = 10.0
    rate_window_seconds: float = 60.0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    launch: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _figure(default: Any, scalar: str = '', summarised: bool = False) -> Any:
    """A field of `RunState`, with its TensorBoard tag and whether the summary includes it."""
    return dataclasses.field(
        default_factory=default if callable(default) else lambda: default,
        metadata={'scalar': scalar, 'summarised': summarised},
    )


@dataclasses.dataclass(frozen=True)
class RunState:
    """The run at one moment; None: not known yet.

    `_figure` says where a value is written; a mapping's entries are scalars below its tag.

    Attributes:
      max_frames, frames: emulator frames, the budget and those made.
      frames_per_second, updates_per_second: over the recent window.
      updates: global updates.
      episodes: games ended.
      mean_return_100: mean raw return of the last 100 (fewer at the start).
      epsilon: mean of the actors' latest values.
      replay_size: transitions in all shards.
      samples_per_insert: transitions sampled per transition inserted, over the whole run.
      learned_per_insert: transitions in applied updates per transition inserted; less than
        `samples_per_insert`, since learners prefetch batches and gradients are rejected.
      rejected: gradients by reason (`REJECTIONS`).
      outlier_share: gradients dropped as outliers, as a share of those computed.
      staleness: of the gradients pushed (see `StalenessTally.summary`).
      restarts: by component.
      eta_seconds: until `max_frames` at the current rate.
      wall_seconds: since the launch, earlier sessions included.
      learner: means of the learners' other figures (loss, ...) over the last period.
      malformed_events, repeated_events: telemetry events skipped.
    """

    game: str
    preset: str
    max_frames: int
    frames: int = _figure(0, summarised=True)
    agent_steps: int = _figure(0, summarised=True)
    frames_per_second: float | None = _figure(None, 'rate/frames_per_second')
    updates: int = _figure(0, 'progress/updates', summarised=True)
    updates_per_second: float | None = _figure(None, 'rate/updates_per_second')
    episodes: int = _figure(0, 'progress/episodes', summarised=True)
    mean_return_100: float | None = _figure(None, 'return/mean_100', summarised=True)
    last_return: float | None = None
    epsilon: float | None = _figure(None, 'actor/epsilon')
    replay_size: int | None = _figure(None, 'replay/size')
    samples_per_insert: float | None = _figure(None, 'replay/samples_per_insert', True)
    learned_per_insert: float | None = _figure(None, 'replay/learned_per_insert', True)
    rejected: Mapping[str, int] = _figure(lambda: dict.fromkeys(REJECTIONS, 0), 'rejected', True)
    outlier_share: float | None = _figure(None, 'learner/outlier_share', summarised=True)
    staleness: Mapping[str, Any] = _figure(dict, 'staleness', summarised=True)
    restarts: Mapping[str, int] = _figure(dict, summarised=True)
    eta_seconds: float | None = None
    wall_seconds: float = 0.0
    learner: Mapping[str, float] = _figure(dict, 'learner')
    malformed_events: int = _figure(0, 'telemetry/malformed_events')
    repeated_events: int = _figure(0, 'telemetry/repeated_events')

    def scalars(self) -> dict[str, float | None]:
        """TensorBoard's scalars, by tag."""
        scalars: dict[str, float | None] = {}
        for field in dataclasses.fields(self):
            tag, value = field.metadata.get('scalar'), getattr(self, field.name)
            if tag and isinstance(value, Mapping):
                scalars |= {f'{tag}/{name}': finite(entry) for name, entry in value.items()}
            elif tag:
                scalars[tag] = value
        return scalars

    def summarised(self) -> dict[str, Any]:
        """The figures of the summary, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata.get('summarised')
        }


class Monitor:
    """Collects the run's statistics; a context manager, used by one thread.

    Input: `fold`, `clock`, `parameter_server`, `replay` and `restarted`. Output: `state()`. Call
    `tick()` about every second: it writes what is due.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: MonitorConfig,
        resumed_from: Mapping[str, Any] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ):
        """Opens the run's records.

        Args:
          directory: where they are written.
          config: of the run.
          resumed_from: `counters()` from the checkpoint; None for a new run.
          monotonic, wall_clock: clocks, seconds.
        """
        self._config, self._directory = config, directory
        self._monotonic, self._wall_clock = monotonic, wall_clock
        before, resumed = resumed_from or {}, resumed_from is not None
        self._agent_steps = count(before.get('agent_steps')) or 0
        self._updates = count(before.get('updates')) or 0
        self._wall_seconds_before = finite(before.get('wall_seconds')) or 0.0
        self._restarts = counts(before.get('restarts'))
        self._started = monotonic()
        self._ended: float | None = None
        self._rejections = RejectionTally(before, resumed)
        self._staleness = StalenessTally(before)
        # Checkpoints of earlier versions count outliers but have no staleness.
        self._other_gradients = 0 if 'staleness' in before else self._updates
        self._replay = ReplayTally(before, resumed)
        self._rates = Rates(config.rate_window_seconds)
        self._epsilon: dict[Worker, float] = {}
        self._learner_sums: dict[str, tuple[float, int]] = {}
        self._learner: dict[str, float] = {}
        self._malformed = self._repeated = 0
        self._unexpected: set[type[Exception]] = set()
        self._open_records(resumed)

    def _open_records(self, resumed: bool) -> None:
        self._episodes = episodes.EpisodeLog(
            self._directory.episodes_file, self.frames if resumed else None
        )
        # A restored replay may repeat telemetry from before the checkpoint.
        self._seen_episodes: collections.OrderedDict[tuple, None] = collections.OrderedDict(
            (row.identity, None) for row in self._episodes.kept
        )
        self._returns: collections.deque[float] = collections.deque(
            (row.raw_return for row in self._episodes.kept), maxlen=episodes.RETURN_WINDOW
        )
        self._events = tensorboard.EventWriter(self._directory.events, self.frames)
        name, config = self._directory.path.name, self._config
        self._events.describe(name, config.settings, config.launch, self._wall_clock())
        self._episode_step = self.frames
        self._scalars_due = self._started + self._config.scalars_period_seconds

    @property
    def frames(self) -> int:
        """Emulator frames made by all actors."""
        return self._frames_of(self._agent_steps)

    def _frames_of(self, agent_steps: int) -> int:
        return agent_steps * self._config.action_repeat

    # Input.

    def clock(self, updates: int, agent_steps: int) -> None:
        """Records the parameter server's clock: global updates and agent steps."""
        self._updates, self._agent_steps = int(updates), int(agent_steps)
        self._rates.record(self._monotonic(), self.frames, self._updates)

    def parameter_server(self, shards: Sequence[Mapping[str, Any]]) -> None:
        """Records `rejected: {stale, invalid}` of each shard's report."""
        self._rejections.record_servers(shards)

    def replay(self, shards: Sequence[Mapping[str, Any]]) -> None:
        """Records each shard's `size`, `samples` and `inserts`, in transitions.

        The status of a shard that did not answer is empty; its last one stays.
        """
        self._replay.record(shards)

    def restarted(self, component: str) -> None:
        """Counts one restart of `component`."""
        self._restarts[component] = self._restarts.get(component, 0) + 1

    def fold(self, events: Iterable[Any]) -> list[Mapping[str, Any]]:
        """Folds telemetry events, in any order; returns the valid ones and counts the others."""
        handlers = {'episode': self._fold_episode, 'actor': self._fold_actor}
        handlers['learner'] = self._fold_learner
        valid = []
        for event in events:
            if not is_event(event):
                self._malformed += 1
                continue
            valid.append(event)
            worker = event['component'], event['worker']
            handler = handlers.get(event['kind'])
            if handler is not None and not self._is_folded(handler, event, worker):
                self._malformed += 1
        return valid

    def _is_folded(
        self,
        handler: Callable[[Mapping[str, Any], Worker], bool],
        event: Mapping[str, Any],
        worker: Worker,
    ) -> bool:
        """Whether `handler` accepted the event; an unexpected value loses only this event."""
        try:
            return handler(event, worker)
        except OSError:  # a full disk is not the event's fault
            raise
        except Exception as error:
            if type(error) not in self._unexpected:  # once per type: bounds the log
                self._unexpected.add(type(error))
                logging.exception('a telemetry event of kind %s', event['kind'])
            return False

    def _fold_episode(self, event: Mapping[str, Any], worker: Worker) -> bool:
        raw_return = finite(event.get('raw_return'))
        if raw_return is None:
            return False
        when = finite(event.get('time'))
        agent_steps, updates = count(event.get('run_agent_steps')), count(event.get('run_updates'))
        episode = episodes.Episode(
            episode=self._episodes.count + 1,
            time=self._wall_clock() if when is None else when,
            frames=self._frames_of(self._agent_steps if agent_steps is None else agent_steps),
            updates=self._updates if updates is None else updates,
            raw_return=raw_return,
            clipped_return=finite(event.get('clipped_return')),
            agent_steps=count(event.get('agent_steps')),
            worker=worker[1],
            epsilon=finite(event.get('epsilon')),
        )
        if episode.identity in self._seen_episodes:
            self._repeated += 1
            return True
        remember(self._seen_episodes, episode.identity, None, episodes.REMEMBERED_EPISODES)
        self._episodes.append(episode)
        self._returns.append(raw_return)
        # TensorBoard drops values whose step does not increase.
        step = max(episode.frames, self._episode_step + 1)
        self._events.write(step, {'return/episode': raw_return}, episode.time)
        self._episode_step = step
        return True

    def _fold_actor(self, event: Mapping[str, Any], worker: Worker) -> bool:
        epsilon = finite(event.get('epsilon'))
        if epsilon is not None:
            self._epsilon[worker] = epsilon
        return epsilon is not None or 'epsilon' not in event

    def _fold_learner(self, event: Mapping[str, Any], worker: Worker) -> bool:
        outliers = count(event.get('rejected_outlier'))
        key = (*worker, str(event.get('session')))
        if outliers is not None:
            self._rejections.record_outliers(key, outliers)
        staleness = histogram(event.get('staleness'))
        if staleness is not None:
            self._staleness.record(key, staleness)
        for name, value in event.items():
            number = finite(value)
            if number is not None and name not in _NOT_AVERAGED:
                total, numbers = self._learner_sums.get(name, (0.0, 0))
                self._learner_sums[name] = (total + number, numbers + 1)
        return 'rejected_outlier' not in event or outliers is not None

    # Output.

    def tick(self) -> None:
        """Writes the scalars if they are due."""
        if self._monotonic() >= self._scalars_due:
            self._write_scalars()

    def state(self) -> RunState:
        """The current state."""
        frame_rate, update_rate = self._rates.rates()
        left = max(0, self._config.max_frames - self.frames)
        return RunState(
            game=self._config.game,
            preset=self._config.preset,
            max_frames=self._config.max_frames,
            frames=self.frames,
            agent_steps=self._agent_steps,
            frames_per_second=frame_rate,
            updates=self._updates,
            updates_per_second=update_rate,
            episodes=self._episodes.count,
            mean_return_100=mean(self._returns),
            last_return=self._returns[-1] if self._returns else None,
            epsilon=mean(self._epsilon.values()),
            replay_size=self._replay.size,
            samples_per_insert=self._replay.per_insert(self._replay.total('samples')),
            learned_per_insert=self._replay.per_insert(self._updates * self._config.batch_size),
            rejected=self._rejections.counts(),
            outlier_share=self._outlier_share(),
            staleness=self._staleness.summary(),
            restarts=dict(self._restarts),
            eta_seconds=left / frame_rate if frame_rate else (None if left else 0.0),
            wall_seconds=self.wall_seconds,
            learner=dict(self._learner),
            malformed_events=self._malformed,
            repeated_events=self._repeated,
        )

    def _outlier_share(self) -> float | None:
        dropped = self._rejections.counts()['outlier']
        computed = dropped + self._other_gradients + sum(self._staleness.bins)
        return dropped / computed if computed else None

    @property
    def wall_seconds(self) -> float:
        """Seconds from launch to now or to `end_training`, earlier sessions included."""
        now = self._monotonic() if self._ended is None else self._ended
        return self._wall_seconds_before + now - self._started

    def end_training(self) -> None:
        """Stops the run's clock: the final evaluation is not part of `wall_seconds`."""
        self._ended = self._monotonic()

    def counters(self) -> dict[str, Any]:
        """The counters for a checkpoint, to be passed as `resumed_from`."""
        return {
            'agent_steps': self._agent_steps,
            'updates': self._updates,
            'wall_seconds': round(self.wall_seconds, 3),
            'rejected': self._rejections.counts(),
            'staleness': self._staleness.bins,
            'restarts': dict(self._restarts),
            'samples': self._replay.total('samples'),
            'inserts': self._replay.total('inserts'),
        }

    def summary(
        self, exit_reason: str, evaluation: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The current contents of `summary.json`."""
        return build_summary(self.state(), self._config, exit_reason, evaluation)

    def write_summary(
        self, exit_reason: str, evaluation: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Writes `summary.json` and the learning curve; returns the summary."""
        summary = self.summary(exit_reason, evaluation)
        write_json(self._directory.summary_file, summary)
        self._write_scalars(evaluation)
        self.draw_learning_curve(evaluation)
        return summary

    def draw_learning_curve(self, evaluation: Mapping[str, Any] | None = None) -> None:
        """Draws the games so far; may run in another thread than the other methods."""
        learning_curve.draw_learning_curve(
            self._directory.episodes_file,
            self._directory.learning_curve_file,
            f'{self._config.game}, preset {self._config.preset}, seed {self._config.seed}',
            evaluation,
            self.frames,
        )

    def _write_scalars(self, evaluation: Mapping[str, Any] | None = None) -> None:
        self._learner = {
            name: total / numbers for name, (total, numbers) in self._learner_sums.items()
        }
        self._learner_sums.clear()
        state = self.state()
        scalars = state.scalars()
        if evaluation is not None:
            scalars['return/evaluation'] = evaluation['mean']
        self._events.write(state.frames, scalars, self._wall_clock())
        self._events.flush()
        self._scalars_due = self._monotonic() + self._config.scalars_period_seconds

    def close(self) -> None:
        """Closes the records. Repeated calls do nothing."""
        # Closing flushes; a full disk was already reported by a write.
        for close in (self._episodes.close, self._events.close):
            with contextlib.suppress(OSError):
                close()

    def __enter__(self) -> 'Monitor':
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def build_summary(
    state: RunState,
    config: MonitorConfig,
    exit_reason: str,
    evaluation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The contents of `summary.json`.

    Args:
      state: the run at its end.
      config: of the run.
      exit_reason: why it ended, such as 'max_frames' or 'SIGINT'.
      evaluation: has at least `{protocol, episodes, epsilon, mean, std}`; None: no evaluation.

    `frames_per_second` and `updates_per_second` are means over `wall_seconds`.
    """
    seconds = state.wall_seconds
    kept = {name: evaluation[name] for name in _EVALUATION_FIELDS} if evaluation else None
    return {
        'game': state.game,
        'preset': state.preset,
        'seed': config.seed,
        **state.summarised(),
        'evaluation': kept,
        'wall_seconds': round(seconds, 3),
        'frames_per_second': round(state.frames / seconds, 3) if seconds > 0 else 0.0,
        'updates_per_second': round(state.updates / seconds, 3) if seconds > 0 else 0.0,
        'exit_reason': exit_reason,
    }
