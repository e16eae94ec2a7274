"""JSON values of a run's files in, checked records out; values of a wrong type count as unknown."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pipelines.events import count, counts, finite
from pipelines.experiment.protocols import Protocol
from pipelines.storage.provenance import launched_at
from pipelines.storage.resuming import frames_of
from pipelines.storage.run_directory import BEST

_NUMBERS = {int: count, float: finite}


def text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


_OPTIONAL: Mapping[Any, Callable[[Any], Any]] = {
    int | None: count,
    float | None: finite,
    str | None: text,
}
"""Reads a value of a field's type; None where it is missing or of another type."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The games of one policy under one protocol.

    Attributes:
      file: name of the file in the run's directory.
      game: that was played; None: the file, of an earlier version, does not say.
      protocol: its name, as written.
      policy: 'run', 'saved_model' or 'random'.
      path: where the policy is from, as it was named; None: unknown.
      checkpoint: name of the run's checkpoint; None: unknown.
      episodes: games that ended.
      failed: games that did not.
      start_points: number of recorded ones; None: unknown, or the protocol has none.
      start_source: who played them, 'unknown' with their file if it does not say; None as before.
      epsilon: share of random actions; None: unknown.
      max_frames: emulator frames at which a game is cut off; None: unknown.
      deviations: from the protocol's rules; None: the file, of an earlier version, does not say.
      mean, std: of the raw returns; `std` None: unknown.
      updates: of the parameters, None: unknown.
      frames: emulator frames of the run at that moment; None: unknown.
      launch: the command that played it; None: unknown.
    """

    file: str
    game: str | None
    protocol: str
    policy: str
    path: str | None
    checkpoint: str | None
    episodes: int
    failed: int
    start_points: int | None
    start_source: str | None
    epsilon: float | None
    max_frames: int | None
    deviations: Mapping[str, str | int | float | bool] | None
    mean: float
    std: float | None
    updates: int | None
    frames: int | None
    launch: 'Launch | None'

    @property
    def best(self) -> bool:
        """Whether the checkpoint was selected by the run's own evaluations."""
        return self.checkpoint == BEST


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a command ran on; a value is None where nothing is known.

    Attributes:
      host, processor, system, python, engine: names.
      cores: that the process may use.
      memory_bytes: of the machine.
      commit: of the checkout; `dirty`: with changes that are not committed.
      packages: (name, version) of each.
    """

    host: str | None
    processor: str | None
    system: str | None
    python: str | None
    engine: str | None
    cores: float | None
    memory_bytes: int | None
    commit: str | None
    dirty: bool
    packages: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Launch:
    """A command, as `storage/provenance.py` describes it.

    Attributes:
      time: seconds since 1970, None: unknown.
      command: None: unknown.
      changed: settings that a resume changed, as text.
      wall_seconds: that the run had trained before.
      machine: where it ran.
    """

    time: float | None
    command: str | None
    changed: str
    wall_seconds: float
    machine: Machine


@dataclasses.dataclass(frozen=True)
class Summary:
    """Figures of `summary.json`; None: unknown.

    Attributes:
      frames, updates: of the whole run; outside Atari frames are agent steps.
      frames_per_second, updates_per_second: means over the training time.
      mean_return_100: of the last 100 training games.
      exit_reason: why the run ended.
      staleness: number of gradients by bin.
    """

    frames: int | None = None
    updates: int | None = None
    frames_per_second: float | None = None
    updates_per_second: float | None = None
    mean_return_100: float | None = None
    exit_reason: str | None = None
    staleness: Mapping[str, int] = dataclasses.field(default_factory=dict)


def summary(held: Mapping[str, Any]) -> Summary:
    """The figures of a summary of any version."""
    staleness = counts(mapping(held.get('staleness')).get('histogram'))
    frames = {
        'frames': frames_of(held),
        'frames_per_second': held.get('frames_per_second', held.get('agent_steps_per_second')),
    }
    return Summary(**_values(Summary, {**held, **frames}), staleness=staleness)


def launch(row: Mapping[str, Any]) -> Launch:
    """A row of `launches.jsonl`, or the provenance of a result."""
    git = mapping(row.get('git'))
    packages = mapping(row.get('packages'))
    machine = Machine(
        **_values(Machine, {**row, 'commit': git.get('commit')}),
        dirty=git.get('dirty') is True,
        packages=tuple((name, v) for name, v in packages.items() if isinstance(v, str)),
    )
    return Launch(
        time=launched_at(row),
        command=text(row.get('command')),
        changed=', '.join(f'{n} {v}' for n, v in mapping(row.get('changed')).items()),
        wall_seconds=finite(row.get('wall_seconds')) or 0.0,
        machine=machine,
    )


def evaluation(file: str, held: Mapping[str, Any]) -> Evaluation:
    """A result of any version.

    Raises:
      ValueError: it has no protocol, number of games or mean, or its deviations are no rules.
    """
    protocol, episodes = text(held.get('protocol')), count(held.get('episodes'))
    mean = finite(held.get('mean'))
    if protocol is None or not episodes or mean is None:
        raise ValueError('not the result of an evaluation')
    policy, made_by = mapping(held.get('policy')), mapping(held.get('provenance'))
    starts = mapping(held.get('starts'))
    unknown = f'unknown ({starts["file"]})' if text(starts.get('file')) else None
    elsewhere = {
        'path': policy.get('path'),
        'checkpoint': policy.get('checkpoint'),
        'start_points': starts.get('count'),
        'start_source': text(starts.get('source')) or unknown,
    }
    return Evaluation(
        **_values(Evaluation, {**held, **elsewhere}),
        file=file,
        protocol=protocol,
        policy=text(policy.get('kind')) or 'run',
        episodes=episodes,
        failed=count(held.get('failed')) or 0,
        deviations=_deviations(held.get('deviations')),
        mean=mean,
        launch=launch(made_by) if made_by else None,
    )


def _values(kind: Any, held: Mapping[str, Any]) -> dict[str, Any]:
    """The values for the fields of a record that may be unknown: a number or a text, or None."""
    return {
        field.name: _OPTIONAL[field.type](held.get(field.name))
        for field in dataclasses.fields(kind)
        if field.type in _OPTIONAL
    }


def _deviations(held: Any) -> dict[str, str | int | float | bool] | None:
    """
    Raises:
      ValueError: a rule has a value of another type.
    """
    if held is None:
        return None
    types = {field.name: field.type for field in dataclasses.fields(Protocol)}
    found: dict[str, Any] = {}
    for name, value in mapping(held).items():
        kind = types.get(name)
        found[name] = _NUMBERS[kind](value) if kind in _NUMBERS else value
        if found[name] is None or (kind in (bool, str) and not isinstance(value, kind)):
            raise ValueError(f'deviation {name} is invalid')
        if kind is None:  # a rule of a later version
            found[name] = str(value)
    if not isinstance(held, Mapping):
        raise ValueError('deviations are invalid')
    return found


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
