"""The state of a run in, TensorBoard's scalars and `summary.json` out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipelines.events import finite
from pipelines.monitoring.counters import REJECTIONS

_NOT_SUMMARISED = frozenset(
    {
        'game',
        'policy',
        'returns',
        'details',
        'failures',
        'engine',
        'workers',
        'seconds',
        'provenance',
    }
)  # of an evaluation: repeated here, long, or only about how it was played


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
    """The settings that the monitor needs.

    Attributes:
      game, preset, seed: as in the summary.
      max_frames: emulator frames that end the run.
      action_repeat: emulator frames per agent step.
      unit: of the budget: 'frames' of an emulator, or 'steps' elsewhere.
      batch_size: transitions in an update.
      scalars_period_seconds: seconds between two writes to TensorBoard.
      rate_window_seconds: window of frames/s, updates/s and the ETA.
      settings: value of each setting of the experiment, by its name.
      launch: the line of `launches.jsonl` of this start or resume.
      cores: of this machine that the run may use.
    """

    game: str
    preset: str
    seed: int
    max_frames: int
    action_repeat: int = 4
    unit: str = 'frames'
    batch_size: int = 32
    scalars_period_seconds: float = 10.0
    rate_window_seconds: float = 60.0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    launch: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cores: float = 1.0


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
      max_frames, frames: emulator frames, the budget and those made; elsewhere agent steps.
      unit: of these: 'frames' or 'steps'.
      frames_per_second, updates_per_second: over the recent window.
      updates: global updates.
      episodes: games ended.
      mean_return_100: mean raw return of the last 100 (fewer at the start).
      mean_length_100: their mean length, agent steps.
      epsilon: mean of the actors' latest values.
      replay_size: transitions in all shards.
      samples_per_insert: transitions sampled per transition inserted, over the whole run.
      learned_per_insert: transitions in applied updates per transition inserted; less than
        `samples_per_insert`, since learners prefetch batches and gradients are rejected.
      rejected: gradients by reason (`REJECTIONS`).
      outlier_share: gradients dropped as outliers, as a share of those computed.
      staleness: of the gradients pushed (see `StalenessTally.summary`).
      learner_staleness: median and 99th percentile of each learner.
      learners: each learner's gradients, outliers, precision and staleness (see
        `LearnerTally.summary`).
      recent_rates, rates: of each box, over the recent window and over this launch: an actor's
        agent steps/s, a learner's gradients/s, a parameter shard's pushes/s, a replay shard's
        inserts/s.
      memory_bytes: latest resident memory of each process.
      evaluations: during training: number, last, best (the final one too may be), and the
        evaluator's CPU time in seconds and as a share of what the launcher may use over
        `wall_seconds`.
      restarts: by component.
      eta_seconds: until `max_frames` at the current rate.
      wall_seconds: since the launch, earlier sessions included.
      learner: means of the learners' other figures (loss, ...) over the last period that had any.
      malformed_events, repeated_events: telemetry events skipped.
    """

    game: str
    preset: str
    max_frames: int
    unit: str = 'frames'
    frames: int = _figure(0, summarised=True)
    agent_steps: int = _figure(0, summarised=True)
    frames_per_second: float | None = _figure(None, 'rate/frames_per_second')
    updates: int = _figure(0, 'progress/updates', summarised=True)
    updates_per_second: float | None = _figure(None, 'rate/updates_per_second')
    episodes: int = _figure(0, 'progress/episodes', summarised=True)
    mean_return_100: float | None = _figure(None, 'return/mean_100', summarised=True)
    mean_length_100: float | None = _figure(None, 'episode/mean_length_100', summarised=True)
    last_return: float | None = None
    epsilon: float | None = _figure(None, 'actor/epsilon', summarised=True)
    replay_size: int | None = _figure(None, 'replay/size')
    samples_per_insert: float | None = _figure(None, 'replay/samples_per_insert', True)
    learned_per_insert: float | None = _figure(None, 'replay/learned_per_insert', True)
    rejected: Mapping[str, int] = _figure(lambda: dict.fromkeys(REJECTIONS, 0), 'rejected', True)
    outlier_share: float | None = _figure(None, 'learner/outlier_share', summarised=True)
    staleness: Mapping[str, Any] = _figure(dict, 'staleness', summarised=True)
    learner_staleness: Mapping[str, float | None] = _figure(dict, 'staleness')
    learners: Mapping[str, Any] = _figure(dict, summarised=True)
    recent_rates: Mapping[str, float] = _figure(dict, 'rate')
    rates: Mapping[str, float] = _figure(dict, summarised=True)
    memory_bytes: Mapping[str, int] = _figure(dict, 'memory_bytes', summarised=True)
    evaluations: Mapping[str, Any] = _figure(dict, summarised=True)
    restarts: Mapping[str, int] = _figure(dict, summarised=True)
    eta_seconds: float | None = None
    wall_seconds: float = 0.0
    learner: Mapping[str, float] = _figure(dict, 'learner', summarised=True)
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
        """The figures of the summary, by name; outside Atari without `frames`."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata.get('summarised') and (field.name, self.unit) != ('frames', 'steps')
        }


def build_summary(
    state: RunState,
    config: MonitorConfig,
    exit_reason: str,
    evaluation: Mapping[str, Any] | None = None,
    exported: bool = False,
    beam: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The contents of `summary.json`.

    Args:
      state: the run at its end.
      config: of the run.
      exit_reason: why it ended, such as 'max_frames' or 'SIGINT'.
      evaluation: a result (see pipelines/storage/evaluations.py); None: no evaluation.
      exported: whether `policy/` holds the last parameters.
      beam: Beam's own counters, by kind of worker and name.

    Rates are means over `wall_seconds`. Outside Atari there are no frames: `agent_steps` and
    `agent_steps_per_second` count alone.
    """
    seconds = state.wall_seconds
    counted = 'frames' if state.unit == 'frames' else 'agent_steps'
    kept = {
        name: value for name, value in (evaluation or {}).items() if name not in _NOT_SUMMARISED
    }
    return {
        'game': state.game,
        'preset': state.preset,
        'seed': config.seed,
        **state.summarised(),
        'evaluation': kept or None,
        'exported': exported,
        'beam': beam or {},
        'wall_seconds': round(seconds, 3),
        f'{counted}_per_second': round(state.frames / seconds, 3) if seconds > 0 else 0.0,
        'updates_per_second': round(state.updates / seconds, 3) if seconds > 0 else 0.0,
        'exit_reason': exit_reason,
    }
