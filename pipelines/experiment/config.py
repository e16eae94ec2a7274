"""The frozen configuration of an experiment, as stored in `config.json` and sent to workers."""

import dataclasses
import json
import pathlib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from agents.config import (
    ActorConfig,
    AgentConfig,
    EnvironmentConfig,
    LearnerConfig,
    NetworkConfig,
)
from infra.fields import (
    described,
    require_at_least,
    require_choice,
    require_fraction,
    require_from_to,
    require_positive,
)
from infra.flags import with_fix
from infra.parameter_server.config import ParameterServerConfig, renamed
from infra.replay.config import ReplayConfig
from infra.sealed import parse_object, seal, unseal
from pipelines.errors import UsageError, unreadable
from pipelines.experiment.protocols import RUN_PROTOCOLS

CONFIG_FILE = 'config.json'
"""Name of the file in the directory of a run."""
TOPOLOGIES = ('separate', 'bundled')
BUNDLE_REPLAYS = ('worker', 'servers')
_MOST_EPISODES = 100_000  # of an evaluation; far above what is of use


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Workers, budget, checkpoints and evaluation of a run."""

    topology: str = described(
        'separate',
        "'separate': actors and learners, in Beam jobs of their own, share a replay; 'bundled':"
        ' bundles, each an actor and a learner that take turns (paper, section 4).',
    )
    bundle_replay: str = described(
        'worker',
        "Where bundles have their replay. 'worker': each in its own process (paper, section 4);"
        " checkpoints do not hold it. 'servers': at the run's replay shards, as replay_mode says.",
    )
    num_actors: int = described(
        1, 'Actors, one worker process each. Add some when learners wait for data.'
    )
    num_learners: int = described(
        2,
        'Learners, one worker process each. Add some when actors wait for learners; with each'
        ' gradients become one update older, two with overlap_push.',
    )
    worker_threads: int = described(
        1,
        'Threads of a TensorFlow operation in each worker. A learner also computes two operations'
        " at a time where the machine has more cores than the run's learners have such threads.",
    )
    max_frames: int = described(
        4_000_000, 'Emulator frames of all actors after which the run ends.'
    )
    seed: int = described(1, 'Seed of parameters, environments and exploration.')
    checkpoint_period_seconds: float = described(
        900.0, 'Seconds between checkpoints. Lower it to lose less when the launcher dies.'
    )
    checkpoint_replay: bool = described(
        True,
        'Include the replay in checkpoints. Disable it to save disk space; a resumed run then'
        ' refills its replay.',
    )
    evaluation_protocol: str = described(
        'noop',
        "Rules of the evaluation: 'noop' (paper), 'machado' (sticky actions, all 18 actions) or"
        " 'rainbow' (30 minutes); outside Atari 'plain' (its own rules); see docs/evaluation.md.",
    )
    evaluation_episodes: int = described(30, 'Games of the final evaluation (paper: 30).')
    evaluation_epsilon: float = described(0.05, 'Epsilon of the final evaluation (paper: 0.05).')
    evaluation_max_frames: int = described(
        18_000,
        'Emulator frames after which an evaluation game is cut off (paper: 18,000, 5 minutes).',
    )
    evaluator_cpu_share: float = described(
        0.03,
        'Share of the CPU that the launcher may use, from 0 to 1, that evaluations during training'
        ' may take; 0 turns them off. Raise it for more evaluations, each of which slows training.',
    )
    evaluator_episodes: int = described(
        5,
        'Games of an evaluation during training. Raise it for less noise and fewer evaluations.',
    )
    evaluation_period_updates: int = described(
        10_000,
        'Least number of updates between two evaluations during training, and before the first.'
        ' Lower it for short runs; --evaluator_cpu_share may allow fewer.',
    )
    video: bool = described(
        True,
        'Film a game of the best policy at the end, up to five minutes of play, as video.mp4 in the'
        ' run directory. Disable it to save the time (see docs/evaluation.md).',
    )

    def __post_init__(self) -> None:
        require_choice(self, 'topology', TOPOLOGIES)
        require_choice(self, 'bundle_replay', BUNDLE_REPLAYS)
        if self.evaluation_protocol == 'human':
            raise ValueError(
                '--evaluation_protocol human: the end of training has no start points. Fix: omit'
                ' it, then run `pipelines/evaluate.py --protocol human --starts FILE` (see'
                ' docs/evaluation.md).'
            )
        require_choice(self, 'evaluation_protocol', RUN_PROTOCOLS)
        counts = ('num_actors', 'num_learners', 'max_frames', 'evaluation_max_frames')
        require_at_least(self, 1, *counts, 'evaluation_period_updates')
        require_from_to(self, 1, _MOST_EPISODES, 'evaluation_episodes', 'evaluator_episodes')
        require_fraction(self, 'evaluator_cpu_share')
        require_from_to(self, 0, 2**63 - 1, 'seed')
        require_from_to(self, 1, 1024, 'worker_threads')
        require_fraction(self, 'evaluation_epsilon')
        require_positive(self, 'checkpoint_period_seconds')

    @property
    def evaluation_rules(self) -> dict[str, Any]:
        """The fields of its evaluation protocol that the run replaces."""
        return {
            'epsilon': self.evaluation_epsilon,
            'max_frames': self.evaluation_max_frames,
            'episodes': self.evaluation_episodes,
        }

    @property
    def replay_in_workers(self) -> bool:
        """Whether each worker has a replay of its own, so that servers hold none."""
        return self.topology == 'bundled' and self.bundle_replay == 'worker'

    @property
    def workers(self) -> dict[str, int]:
        """Number of workers by kind; each kind is one Beam job."""
        if self.topology == 'bundled':
            return {'bundle': self.num_actors}
        return {'actor': self.num_actors, 'learner': self.num_learners}


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """All settings of an experiment.

    Raises:
      ValueError: settings contradict each other.
    """

    preset: str = 'laptop'
    run: RunConfig = RunConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    network: NetworkConfig = NetworkConfig()
    agent: AgentConfig = AgentConfig()
    actor: ActorConfig = ActorConfig()
    learner: LearnerConfig = LearnerConfig()
    replay: ReplayConfig = ReplayConfig()
    parameter_server: ParameterServerConfig = ParameterServerConfig()

    def __post_init__(self) -> None:
        run, replay = self.run, self.replay
        if run.topology == 'bundled' and run.num_actors != run.num_learners:
            raise ValueError(
                f'--topology bundled: a bundle is one actor and one learner (--num_actors'
                f' {run.num_actors}, --num_learners {run.num_learners}). Fix: make them equal.'
            )
        if not run.replay_in_workers and replay.replay_mode == 'local':
            shards = replay.num_replay_shards
            if shards != run.num_actors or shards != run.num_learners:
                raise ValueError(
                    '--replay_mode local: actors, learners and shards form triples (--num_actors'
                    f' {run.num_actors}, --num_learners {run.num_learners}, --num_replay_shards'
                    f' {shards}). Fix: make them equal.'
                )
        elif replay.num_replay_shards > run.num_actors and not run.replay_in_workers:
            raise ValueError(
                f'--num_replay_shards {replay.num_replay_shards}: a shard would stay empty'
                f' (--num_actors {run.num_actors}). Fix: use fewer shards or more actors.'
            )

        if run.evaluation_protocol == 'machado' and not self.environment.full_action_space:
            raise ValueError(
                '--evaluation_protocol machado: needs all 18 actions. Fix: add --full_action_space,'
                ' or use --preset machado.'
            )
        if self.max_agent_steps <= replay.min_replay_size:
            raise ValueError(
                f'--max_frames {run.max_frames}: the run ends before learning starts'
                f' ({self.max_agent_steps} agent steps, --min_replay_size'
                f' {replay.min_replay_size}). Fix: raise the first or lower the second.'
            )

    @property
    def served_replay(self) -> ReplayConfig:
        """The replay as its servers have it.

        Bundles keep minimum size and ratio by taking turns: a limiter would block their only
        thread, and a table counts confirmed transitions alone, which lag behind the steps.
        """
        if self.run.topology == 'separate' or self.run.replay_in_workers:
            return self.replay
        shards = self.replay.num_replay_shards
        return dataclasses.replace(self.replay, min_replay_size=shards, agent_steps_per_update=0.0)

    @property
    def max_agent_steps(self) -> int:
        """Agent steps of all actors after which the run ends."""
        return -(-self.run.max_frames // self.environment.action_repeat)


def groups() -> Iterator[tuple[str, type]]:
    """Yields the name and dataclass of each group of settings."""
    for field in dataclasses.fields(ExperimentConfig):
        if dataclasses.is_dataclass(field.type):
            yield field.name, field.type


def fields() -> dict[str, tuple[str, dataclasses.Field]]:
    """Group and field of each setting, by the setting's name."""
    return {
        field.name: (group, field)
        for group, config in groups()
        for field in dataclasses.fields(config)
    }


def replace(config: ExperimentConfig, values: Mapping[str, Any]) -> ExperimentConfig:
    """Returns a copy of `config` with the named settings replaced.

    Raises:
      UsageError: a name is unknown, or values are invalid or contradictory.
    """
    known = fields()
    grouped: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in known:
            raise UsageError(f'{name}: unknown setting. Fix: see `run.py --help`.')
        grouped.setdefault(known[name][0], {})[name] = value
    try:
        for group, group_values in grouped.items():
            kinds = typing.get_type_hints(dict(groups())[group])
            for name, value in group_values.items():
                _check_type(f'--{name}', value, kinds[name])
        changed = {
            group: dataclasses.replace(getattr(config, group), **group_values)
            for group, group_values in grouped.items()
        }
        return dataclasses.replace(config, **changed)
    except ValueError as error:
        raise UsageError(with_fix(error, 'correct the value, or omit it')) from error


def settings(config: ExperimentConfig) -> dict[str, Any]:
    """The value of each setting, by its name."""
    return {name: getattr(getattr(config, group), name) for name, (group, _) in fields().items()}


def changes(before: ExperimentConfig, after: ExperimentConfig) -> dict[str, list[Any]]:
    """[before, after] of each setting that differs, by its name."""
    old, new = settings(before), settings(after)
    return {name: [old[name], new[name]] for name in old if old[name] != new[name]}


def to_json(config: ExperimentConfig) -> str:
    """Encodes `config.json`, sealed by a checksum so that disk corruption is detected."""
    return json.dumps(seal(dataclasses.asdict(config)), indent=2, allow_nan=False) + '\n'


def from_json(text: str | bytes) -> ExperimentConfig:
    """Decodes what `to_json` encoded.

    Raises:
      UsageError: the text is damaged or of another version.
    """
    try:
        values = unseal(parse_object(text))
        preset = values.pop('preset')
        types = dict(groups())
        if missing := types.keys() - values.keys():
            raise ValueError(f'missing: {", ".join(sorted(missing))}')
        values['parameter_server'] = renamed(values['parameter_server'])
        for name, group in types.items():
            values[name] = completed(name, values[name])
            check_types(name, group, values[name])
        return ExperimentConfig(
            preset=preset, **{name: types[name](**group) for name, group in values.items()}
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f'{CONFIG_FILE}: damaged or of another version ({error}). Fix: restore a copy, remove'
            ' its seal and checksum if you edited it, or start a new run in another --run_dir.'
        ) from error


_ADDED = {
    ('learner', 'outlier_rule'): 'every',
    ('learner', 'pushes_in_flight'): 1,
    ('learner', 'batches_in_flight'): 1,
    ('environment', 'full_action_space'): False,
    ('environment', 'env_processes'): False,
    ('environment', 'screen_size'): 84,
    ('network', 'standardize_input'): False,
    ('network', 'centralize_gradient'): False,
    ('network', 'negative_slope'): 0.0,
    ('network', 'precision'): 'float32',
    ('network', 'dense_layers'): '256,256',
    ('network', 'q_network'): 'builtin',
    ('agent', 'munchausen'): False,
    ('agent', 'munchausen_temperature'): 0.03,
    ('agent', 'munchausen_scale'): 0.9,
    ('agent', 'munchausen_lowest'): -1.0,
    ('agent', 'num_fractions'): 8,
    ('agent', 'num_acting_fractions'): 32,
    ('agent', 'num_cosines'): 64,
    ('parameter_server', 'learning_rate_end'): 0.0,
    ('parameter_server', 'learning_rate_updates'): 0,
    ('parameter_server', 'average_updates'): 0,
    ('run', 'bundle_replay'): 'worker',
    ('run', 'evaluation_protocol'): 'noop',
    ('run', 'evaluator_cpu_share'): 0.03,
    ('run', 'evaluator_episodes'): 5,
    ('run', 'evaluation_period_updates'): 10_000,
    ('run', 'video'): False,
}
"""Settings (group, name) that earlier versions lack, and the values that they used."""


def completed(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A group's values with the settings that an earlier version lacked, as it worked."""
    return {name: value for (of, name), value in _ADDED.items() if of == group} | {**values}


def check_types(name: str, group: type, values: Mapping[str, Any]) -> None:
    """Raises ValueError unless `values` has every field of `group`, with its type."""
    kinds = typing.get_type_hints(group)
    if missing := {field.name for field in dataclasses.fields(group)} - values.keys():
        raise ValueError(f'missing in {name}: {", ".join(sorted(missing))}')
    for field, value in values.items():  # the dataclass itself rejects unknown fields
        _check_type(f'{name}: {field}', value, kinds.get(field, object))


def _check_type(name: str, value: Any, kind: type) -> None:
    """Raises ValueError unless `value` has the type `kind` and, if an integer, fits 64 bits."""
    # JSON may write 4.0 as 4, and in Python a bool is an int.
    allowed = (float, int) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f'{name} {value!r}: must be of type {kind.__name__}')
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f'{name} {value!r:.40}: must be a 64-bit integer')


def load(path: pathlib.Path) -> ExperimentConfig:
    """Reads the experiment in the file `path`.

    Raises:
      UsageError: the file is not readable or not an experiment.
    """
    try:
        return from_json(path.read_bytes())
    except UsageError as error:
        raise UsageError(f'{path.parent}: {error}') from error
    except OSError as error:
        raise unreadable(path, error) from error
