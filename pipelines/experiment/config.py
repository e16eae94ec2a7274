"""The whole experiment as one frozen value: what `config.json` holds and every worker is given."""

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
    require_fraction,
    require_from_to,
    require_positive,
)
from infra.parameter_server.config import ParameterServerConfig
from infra.replay.config import ReplayConfig
from infra.sealed import parse_object, seal, unseal
from pipelines.errors import UsageError

TOPOLOGIES = ('separate', 'bundled')


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How many workers, for how long, with which outputs."""

    topology: str = described(
        'separate',
        "'separate': two Beam jobs, actors and learners, share a replay; 'bundled': one"
        ' Beam job of bundles, each an actor with its own replay and a learner (paper,'
        ' section 4).',
    )
    num_actors: int = described(
        1,
        'Actors, one worker process each. Add some when learners wait for data.',
    )
    num_learners: int = described(
        2,
        'Learners, one worker process each. Add some when actors wait for learners.',
    )
    worker_threads: int = described(
        1,
        'TensorFlow threads per worker. Another learner uses a spare core better than'
        ' another thread.',
    )
    max_frames: int = described(
        4_000_000,
        'Emulator frames of all actors after which the run ends.',
    )
    seed: int = described(1, 'Seed of parameters, environments and exploration.')
    checkpoint_period_seconds: float = described(
        900.0,
        'Seconds between checkpoints. Lower it to lose less when the launcher dies.',
    )
    checkpoint_replay: bool = described(
        True,
        'Include the replay in checkpoints. Disable it to save disk space; a resumed run'
        ' then refills its replay.',
    )
    evaluation_episodes: int = described(30, 'Games of the final evaluation (paper: 30).')
    evaluation_epsilon: float = described(0.05, 'Epsilon of the final evaluation (paper: 0.05).')
    evaluation_max_frames: int = described(
        18_000,
        'Emulator frames after which an evaluation game is cut off (paper: 18,000, 5 minutes).',
    )

    def __post_init__(self) -> None:
        if self.topology not in TOPOLOGIES:
            raise ValueError(f'--topology {self.topology!r}: choose one of {TOPOLOGIES}.')
        counts = ('num_actors', 'num_learners', 'max_frames', 'evaluation_episodes')
        require_at_least(self, 1, *counts, 'evaluation_max_frames')
        require_from_to(self, 0, 2**63 - 1, 'seed')
        require_from_to(self, 1, 1024, 'worker_threads')
        require_fraction(self, 'evaluation_epsilon')
        require_positive(self, 'checkpoint_period_seconds')

    @property
    def workers(self) -> dict[str, int]:
        """How many workers of each kind the topology has; each kind is a job."""
        if self.topology == 'bundled':
            return {'bundle': self.num_actors}
        return {'actor': self.num_actors, 'learner': self.num_learners}


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Every value that decides what a run computes.

    Raises:
      ValueError: values that contradict each other; the message names them and the remedy.
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
                f'--num_actors {run.num_actors} and --num_learners {run.num_learners} contradict'
                ' --topology bundled: a bundle is one actor and one learner, make them equal.'
            )
        if run.topology == 'separate' and replay.replay_mode == 'local':
            shards = replay.num_replay_shards
            if shards != run.num_actors or shards != run.num_learners:
                raise ValueError(
                    f'--replay_mode local needs as many actors ({run.num_actors}), learners'
                    f' ({run.num_learners}) and replay shards ({shards}): make them equal.'
                )
        elif replay.num_replay_shards > run.num_actors and run.topology == 'separate':
            raise ValueError(
                f'--num_replay_shards {replay.num_replay_shards} exceeds --num_actors'
                f' {run.num_actors}: a shard would stay empty; use fewer shards or more actors.'
            )

        if self.max_agent_steps <= replay.min_replay_size:
            raise ValueError(
                f'--max_frames {run.max_frames} ({self.max_agent_steps} agent steps) end before'
                f' learning begins, behind --min_replay_size {replay.min_replay_size}; raise the'
                ' first or lower the second.'
            )

    @property
    def max_agent_steps(self) -> int:
        """Agent steps, over all actors, that end the run."""
        return -(-self.run.max_frames // self.environment.action_repeat)


def groups() -> Iterator[tuple[str, type]]:
    """Name and dataclass of each group of an experiment's configuration."""
    for field in dataclasses.fields(ExperimentConfig):
        if dataclasses.is_dataclass(field.type):
            yield field.name, field.type


def fields() -> dict[str, tuple[str, dataclasses.Field]]:
    """Every value's group and field by the value's name, which is also its flag's."""
    return {
        field.name: (group, field)
        for group, config in groups()
        for field in dataclasses.fields(config)
    }


def replace(config: ExperimentConfig, values: Mapping[str, Any]) -> ExperimentConfig:
    """`config` with the named values replaced, wherever in it they stand.

    Raises:
      UsageError: an unknown name, or values that are out of range or contradict each other.
    """
    known = fields()
    grouped: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in known:
            raise UsageError(f'{name}: no such setting.')
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
        raise UsageError(str(error)) from error


def changes(before: ExperimentConfig, after: ExperimentConfig) -> dict[str, list[Any]]:
    """[before, after] of each value that differs, by its name."""
    values = {
        name: [getattr(getattr(config, group), name) for config in (before, after)]
        for name, (group, _) in fields().items()
    }
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


def to_json(config: ExperimentConfig) -> str:
    """The text of `config.json`: sealed, so a value that was changed by a disk is noticed."""
    return json.dumps(seal(dataclasses.asdict(config)), indent=2, allow_nan=False) + '\n'


def from_json(text: str | bytes) -> ExperimentConfig:
    """The experiment that `to_json` wrote.

    Raises:
      UsageError: the text is not an experiment of this version; the message says what is wrong.
    """
    try:
        values = unseal(parse_object(text))
        preset = values.pop('preset')
        types = dict(groups())
        if missing := types.keys() - values.keys():
            raise ValueError(f'it lacks {", ".join(sorted(missing))}')
        for (group_name, name), value in _ADDED.items():
            values[group_name].setdefault(name, value)
        for name, group in types.items():
            _check_types(name, group, values[name])
        return ExperimentConfig(
            preset=preset, **{name: types[name](**group) for name, group in values.items()}
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f'config.json is damaged or of another version: {error}; restore it from a copy, remove'
            ' its seal and checksum if you changed it, or start a new run in another --run_dir.'
        ) from error


_ADDED = {('learner', 'outlier_rule'): 'every'}
"""Fields (group, name) that a run of an earlier version lacks, and the values that held then."""


def _check_types(name: str, group: type, values: Mapping[str, Any]) -> None:
    """Raises ValueError unless `values` has every field of `group`, each of the field's type."""
    kinds = typing.get_type_hints(group)
    if missing := {field.name for field in dataclasses.fields(group)} - values.keys():
        raise ValueError(f'{name} lacks {", ".join(sorted(missing))}')
    for field, value in values.items():
        # An unknown field the dataclass itself refuses.
        _check_type(f'{name}: {field}', value, kinds.get(field, object))


def _check_type(name: str, value: Any, kind: type) -> None:
    """Raises ValueError unless `value` is of the type of a field, and in 64 bits."""
    # JSON may write 4.0 as 4; and to Python True is an integer too.
    allowed = (float, int) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f'{name} is {value!r}, no {kind.__name__}')
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f'{name} is {value!r:.40}, no whole number of 64 bits')


def load(path: pathlib.Path) -> ExperimentConfig:
    """The experiment in the file `path`.

    Raises:
      UsageError: no such file, or not an experiment.
    """
    try:
        return from_json(path.read_bytes())
    except UsageError as error:
        raise UsageError(f'{path.parent}: {error}') from error
    except OSError as error:
        raise UsageError(f'{path}: cannot be read ({error}).') from error
