"""Folds the workers' telemetry and the servers' counters into the state of the run.

In: telemetry events (possibly late, repeated or malformed); clock and counters of the parameter
server; the replay's counters. Out: a `RunState` to show, `episodes.jsonl`, TensorBoard scalars,
`summary.json`, the learning curve, and the counters of a checkpoint.
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from agents.config import PRECISIONS, STALENESS_BOUNDS
from infra.cluster import PARAMETER_SERVER, REPLAY
from infra.disk import write_json
from infra.memory import resident_bytes
from pipelines.errors import reason_of
from pipelines.events import HEARTBEAT, count, counts, finite, histogram, is_event
from pipelines.monitoring import beam_counters, boxes, episodes, learning_curve, tensorboard
from pipelines.monitoring.counters import (
    Rates,
    RejectionTally,
    ReplayTally,
    StalenessTally,
    mean,
    remember,
)
from pipelines.monitoring.evaluations import EvaluationLog
from pipelines.monitoring.run_state import MonitorConfig, RunState, build_summary
from pipelines.monitoring.weights_and_biases import WandbWriter
from pipelines.storage.run_directory import RunDirectory

# Fields of a learner's event whose mean is meaningless.
_SILENT_SECONDS = 30.0  # workers report every two
_NOT_AVERAGED = frozenset(
    {
        'time',
        'worker',
        'session',
        'submission',
        'updates',
        'agent_steps',
        'gradients',
        'rejected_outlier',
    }
)

Worker = tuple[str, int]
"""A worker's component ('actor', 'learner', ...) and its index."""


class ResultsError(Exception):
    """Results of a run could not be written; the message names each, with its reason."""


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
        wandb: WandbWriter | None = None,
    ):
        """Opens the run's records.

        Args:
          directory: where they are written.
          config: of the run.
          resumed_from: `counters()` from the checkpoint; None for a new run.
          monotonic, wall_clock: clocks, seconds.
          wandb: also receives the scalars and the summary.
        """
        self._config, self._directory, self._wandb = config, directory, wandb
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
        self._learners = boxes.Learners(before.get('learners'))
        self._box_rates = boxes.BoxRates(config.rate_window_seconds)
        self._memory: collections.OrderedDict[str, int] = collections.OrderedDict()
        # Checkpoints of earlier versions count outliers but have no staleness.
        self._other_gradients = 0 if 'staleness' in before else self._updates
        self._replay = ReplayTally(before, resumed)
        self._rates = Rates(config.rate_window_seconds)
        self._epsilon: dict[Worker, tuple[float, float]] = {}  # and when it was heard
        self._malformed = self._repeated = 0
        self._unexpected: set[type[Exception]] = set()
        self._open_records(before, resumed)

    def _open_records(self, before: Mapping[str, Any], resumed: bool) -> None:
        self._evaluator_cpu_before = finite(before.get('evaluator_cpu_seconds')) or 0.0
        self._evaluator_cpu = self._evaluator_cpu_before
        self._learner_sums: dict[str, tuple[float, int]] = {}
        self._learner: dict[str, float] = {}
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
        self._lengths: collections.deque[int] = collections.deque(
            (row.agent_steps for row in self._episodes.kept if row.agent_steps is not None),
            maxlen=episodes.RETURN_WINDOW,
        )
        self.evaluations = EvaluationLog(self._directory, self.frames if resumed else None)
        self._events = tensorboard.EventWriter(self._directory.events, self.frames)
        name, config = self._directory.path.name, self._config
        self._events.describe(name, config.settings, config.launch, self._wall_clock())
        self._written_staleness = self._staleness.bins
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
        """Records `version` and `rejected: {stale, invalid}` of each shard's report."""
        self._rejections.record_servers(shards)
        for index, report in enumerate(shards):
            pushes = (count(report.get('version')) or 0) + sum(
                counts(report.get('rejected')).values()
            )
            self._box_rates.record(self._monotonic(), f'{PARAMETER_SERVER}_{index}', pushes)

    def replay(self, shards: Sequence[Mapping[str, Any]]) -> None:
        """Records each shard's `size`, `samples` and `inserts`, in transitions.

        The status of a shard that did not answer is empty; its last one stays.
        """
        self._replay.record(shards)
        for index, status in enumerate(shards):
            inserts = count(status.get('inserts'))
            if inserts is not None:
                self._box_rates.record(self._monotonic(), f'{REPLAY}_{index}', inserts)

    def memory(self, resident_bytes: Mapping[str, int | None]) -> None:
        """Records the resident memory of processes, by name; None: not running."""
        for name, size in resident_bytes.items():
            if size is not None:
                remember(self._memory, name, size, boxes.MOST_BOXES)

    def restarted(self, component: str) -> None:
        """Counts one restart of `component`."""
        self._restarts[component] = self._restarts.get(component, 0) + 1

    def evaluator(self, cpu_seconds: float) -> None:
        """Reads new evaluations; `cpu_seconds`: of the evaluator since the launch."""
        self._evaluator_cpu = self._evaluator_cpu_before + cpu_seconds
        for row in self.evaluations.read():
            scalars = {'return/evaluator': row['mean'], 'return/evaluator_std': row['std']}
            self._write(row['frames'], scalars, row['time'])

    def fold(self, events: Iterable[Any]) -> list[Mapping[str, Any]]:
        """Folds telemetry events, in any order; returns the valid ones and counts the others."""
        handlers = {
            'episode': self._fold_episode,
            'actor': self._fold_actor,
            'learner': self._fold_learner,
            HEARTBEAT: self._fold_heartbeat,
        }
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
        if episode.agent_steps is not None:
            self._lengths.append(episode.agent_steps)
        # TensorBoard drops values whose step does not increase.
        step = max(episode.frames, self._episode_step + 1)
        figures = {'return/episode': raw_return, 'episode/length': episode.agent_steps}
        self._write(step, figures, episode.time)
        self._episode_step = step
        return True

    def _fold_actor(self, event: Mapping[str, Any], worker: Worker) -> bool:
        epsilon = finite(event.get('epsilon'))
        if epsilon is not None:
            self._epsilon[worker] = epsilon, self._monotonic()
        agent_steps = count(event.get('agent_steps'))
        if agent_steps is not None:
            self._box_rates.record(self._monotonic(), f'actor_{worker[1]}', agent_steps)
        return epsilon is not None or 'epsilon' not in event

    def _mean_epsilon(self) -> float | None:
        """Mean over actors; one that is silent while others are heard may be dead."""
        newest = max((heard for _, heard in self._epsilon.values()), default=0.0)
        return mean(
            value for value, heard in self._epsilon.values() if heard > newest - _SILENT_SECONDS
        )

    def _fold_learner(self, event: Mapping[str, Any], worker: Worker) -> bool:
        outliers = count(event.get('rejected_outlier'))
        key = (*worker, str(event.get('session')))
        if outliers is not None:
            self._rejections.record_outliers(key, outliers)
        staleness = histogram(event.get('staleness'))
        if staleness is not None:
            self._staleness.record(key, staleness)
        name, gradients = f'learner_{worker[1]}', count(event.get('gradients'))
        precision = event.get('precision') if event.get('precision') in PRECISIONS else None
        self._learners.record(name, key, (gradients or 0, outliers or 0), staleness, precision)
        if gradients is not None:
            self._box_rates.record(self._monotonic(), name, gradients)
        for name, value in event.items():
            number = finite(value)
            if number is not None and name not in _NOT_AVERAGED:
                total, numbers = self._learner_sums.get(name, (0.0, 0))
                self._learner_sums[name] = (total + number, numbers + 1)
        return 'rejected_outlier' not in event or outliers is not None

    def _fold_heartbeat(self, event: Mapping[str, Any], worker: Worker) -> bool:
        size = count(event.get('memory_bytes'))
        self.memory({f'{worker[0]}_{worker[1]}': size})
        return True

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
            unit=self._config.unit,
            frames=self.frames,
            agent_steps=self._agent_steps,
            frames_per_second=frame_rate,
            updates=self._updates,
            updates_per_second=update_rate,
            episodes=self._episodes.count,
            mean_return_100=mean(self._returns),
            mean_length_100=mean(self._lengths),
            last_return=self._returns[-1] if self._returns else None,
            epsilon=self._mean_epsilon(),
            replay_size=self._replay.size,
            samples_per_insert=self._replay.per_insert(self._replay.total('samples')),
            learned_per_insert=self._replay.per_insert(self._updates * self._config.batch_size),
            rejected=self._rejections.counts(),
            outlier_share=self._outlier_share(),
            staleness=self._staleness.summary(),
            learner_staleness=self._learners.staleness(),
            learners=self._learners.summary(),
            recent_rates=self._box_rates.recent(self._monotonic()),
            rates=self._box_rates.means(),
            memory_bytes=dict(sorted(self._memory.items())),
            evaluations=self._evaluations(),
            restarts=dict(self._restarts),
            eta_seconds=left / frame_rate if frame_rate else (None if left else 0.0),
            wall_seconds=self.wall_seconds,
            learner=dict(self._learner),
            malformed_events=self._malformed,
            repeated_events=self._repeated,
        )

    def _evaluations(self) -> dict[str, Any]:
        capacity = self._config.cores * self.wall_seconds
        return {
            **self.evaluations.summary(),
            'cpu_seconds': round(self._evaluator_cpu, 2),
            'cpu_share': round(self._evaluator_cpu / capacity, 5) if capacity > 0 else 0.0,
        }

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
            'learners': self._learners.counters(),
            'evaluator_cpu_seconds': round(self._evaluator_cpu, 2),
            'restarts': dict(self._restarts),
            'samples': self._replay.total('samples'),
            'inserts': self._replay.total('inserts'),
        }

    def summary(
        self,
        exit_reason: str,
        evaluation: Mapping[str, Any] | None = None,
        exported: bool = False,
    ) -> dict[str, Any]:
        """The current contents of `summary.json`."""
        beam = self.beam_counters()
        return build_summary(self.state(), self._config, exit_reason, evaluation, exported, beam)

    def beam_counters(self) -> dict[str, dict[str, Any]]:
        """What Beam has counted in the jobs that have ended, by kind of worker and name."""
        return beam_counters.totals(self._directory.logs)

    def write_summary(
        self,
        exit_reason: str,
        evaluation: Mapping[str, Any] | None = None,
        exported: bool = False,
    ) -> dict[str, Any]:
        """Writes `summary.json`, the last scalars and the learning curve; returns the summary.

        Raises:
          ResultsError: at least one of them could not be written; the others are.
        """
        summary = self.summary(exit_reason, evaluation, exported)
        results: dict[str, Callable[[], object]] = {
            'summary.json': lambda: write_json(self._directory.summary_file, summary),
            'events/': lambda: self._write_scalars(evaluation),
            'learning_curve.png': lambda: self.draw_learning_curve(evaluation),
        }
        if self._wandb is not None:
            results['Weights & Biases'] = functools.partial(self._wandb.summarise, summary)
        failures: dict[str, list[str]] = {}
        for name, write in results.items():
            try:
                write()
            except Exception as error:  # of any kind: the other results must be written
                logging.exception('%s', name)
                failures.setdefault(reason_of(error), []).append(name)
        if failures:
            told = (f'{", ".join(names)} ({reason})' for reason, names in failures.items())
            raise ResultsError(f'not written: {"; ".join(told)}')
        return summary

    def draw_learning_curve(self, evaluation: Mapping[str, Any] | None = None) -> None:
        """Draws the games so far; may run in another thread than the other methods."""
        end = {'frames': self.frames, 'updates': self._updates, 'minutes': self.wall_seconds / 60.0}
        config = self._config
        title = f'{config.game}, preset {config.preset}, seed {config.seed}'
        learning_curve.draw_learning_curve(self._directory, title, evaluation, end, config.unit)

    def _write_scalars(self, evaluation: Mapping[str, Any] | None = None) -> None:
        figures = {name: total / numbers for name, (total, numbers) in self._learner_sums.items()}
        self._learner_sums.clear()
        self._learner = figures or self._learner
        self.memory({'launcher': resident_bytes()})
        state = self.state()
        scalars = dataclasses.replace(state, learner=figures).scalars()
        if evaluation is not None:
            scalars['return/evaluation'] = evaluation['mean']
        self._write(state.frames, scalars, self._wall_clock())
        self._write_staleness(state.frames)
        self._events.flush()
        self._scalars_due = self._monotonic() + self._config.scalars_period_seconds

    def _write(self, step: int, scalars: Mapping[str, float | None], when: float) -> None:
        self._events.write(step, scalars, when)
        if self._wandb is not None:
            self._wandb.write(step, scalars)

    def _write_staleness(self, step: int) -> None:
        """Writes the histogram of the gradients since the last one, if there are any."""
        bins = self._staleness.bins
        numbers = [new - old for new, old in zip(bins, self._written_staleness)]
        self._written_staleness = bins
        if any(numbers):
            # The last bin has no bound; TensorBoard needs one.
            bounds = (*STALENESS_BOUNDS, 2 * STALENESS_BOUNDS[-1])
            self._events.write_histogram(
                step, 'staleness/histogram', bounds, numbers, self._wall_clock()
            )

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
