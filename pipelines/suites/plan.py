"""Plans a suite: games, presets, seeds and a grid in, one `Run` for each combination out.

The order puts all games of the first seed first, so that a suite that is stopped early has each
game.
"""

import argparse
import collections
import dataclasses
import difflib
import itertools
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from infra.flags import integer
from pipelines.errors import UsageError
from pipelines.experiment import command_line, presets
from pipelines.experiment import config as config_lib
from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.launch import Launch

_MOST_RUNS = 10_000
_MOST_NAMED = 3  # runs in a message
_LONGEST_VALUE = 40  # characters of a value in a name
_UNFIT = re.compile(r'[^A-Za-z0-9.+-]+')
_OWN = {  # flags of run.py that the suite sets
    'environment': '--games',
    'game': '--games',
    'preset': '--presets',
    'seed': '--seeds',
    'run_dir': '--suite_dir',
    'work_dir': '--suite_dir',
}
_ATTACHED = ('parameter_addresses', 'replay_addresses')
_TRUTH = {'true': True, 'false': False}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a suite.

    Attributes:
      name: of its directory, unique in the suite.
      game, preset, seed: see run.py.
      grid: values of the grid, by setting.
      flags: of run.py, the same for all runs of the suite.
      max_frames: budget in emulator frames, outside Atari in steps.
    """

    name: str
    game: str
    preset: str
    seed: int
    grid: tuple[tuple[str, Any], ...] = ()
    flags: tuple[str, ...] = ()
    max_frames: int = dataclasses.field(default=0, compare=False)

    @property
    def argv(self) -> list[str]:
        """Flags of run.py, without those of the directory."""
        values = [*self.grid, ('game', self.game), ('seed', self.seed)]
        return [f'--preset={self.preset}', *self.flags, *(_flag(*pair) for pair in values)]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a command line asks for; see `Run`. Without `presets`, that of each game."""

    games: tuple[str, ...]
    presets: tuple[str, ...]
    seeds: tuple[int, ...]
    grid: Mapping[str, tuple[Any, ...]]
    flags: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run whose flags have been checked."""

    run: Run
    launch: Launch
    config: ExperimentConfig


def presets_of(text: str) -> tuple[str, ...]:
    """The presets of a comma-separated list, each once.

    Raises:
      UsageError: one is unknown.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(',')))
    for name in names:
        if name not in presets.PRESETS:
            raise UsageError(
                f'--presets {name!r}: unknown. Fix: choose from {", ".join(presets.PRESETS)}.'
            )
    return names


def seeds_of(text: str) -> tuple[int, ...]:
    """The seeds of `1..3` or `1,2,7..9`, each once.

    Raises:
      UsageError: the text is malformed, or a range empty or too long.
    """
    seeds: list[int] = []
    for part in text.split(','):
        first, dots, last = part.strip().partition('..')
        try:
            low, high = integer(first), integer(last if dots else first)
        except argparse.ArgumentTypeError:
            raise UsageError(f'--seeds {text}: not seeds. Fix: write 1..3 or 1,2,5.') from None
        if low < 0:
            raise UsageError(f'--seeds {text}: must be at least 0. Fix: correct {part.strip()}.')
        if not 0 <= high - low < _MOST_RUNS:
            raise UsageError(
                f'--seeds {text}: {part.strip()} has {max(0, high - low + 1)} seeds. Fix: name 1 to'
                f' {_MOST_RUNS}, the smaller one first.'
            )
        seeds.extend(range(low, high + 1))
    return tuple(dict.fromkeys(seeds))


def grid_of(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """The values of each `NAME=V1,V2`, by setting.

    Raises:
      UsageError: a text is malformed, its setting unknown, set otherwise or repeated, or a value
        invalid.
    """
    grid: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, _, values = text.partition('=')
        name = name.strip().removeprefix('--')
        parts = [part.strip() for part in values.split(',') if part.strip()]
        if not parts:
            raise UsageError(f'--grid {text}: no values. Fix: write NAME=V1,V2.')
        if name in grid:
            raise UsageError(f'--grid {name}: given twice. Fix: name all its values in one --grid.')
        _require_setting(name)
        grid[name] = tuple(dict.fromkeys(_value(name, part) for part in parts))
    return grid


def _require_setting(name: str) -> None:
    if name in _OWN:
        raise UsageError(f'--grid {name}: not for a grid. Fix: use {_OWN[name]}.')
    if name not in config_lib.fields():
        near = difflib.get_close_matches(name, config_lib.fields(), n=3)
        hint = f'choose {" or ".join(near)}' if near else 'see `run.py --help`'
        raise UsageError(f'--grid {name}: no setting of a run. Fix: {hint}.')


def _value(name: str, text: str) -> Any:
    """Parses a value as run.py does; a truth value is `true` or `false`."""
    group, _ = config_lib.fields()[name]
    if typing.get_type_hints(dict(config_lib.groups())[group])[name] is bool:
        if text.lower() not in _TRUTH:
            raise UsageError(f'--grid {name}={text}: no truth value. Fix: write true or false.')
        return _TRUTH[text.lower()]
    try:
        return command_line.parse([f'--{name}={text}'])[2][name]
    except UsageError as error:
        raise UsageError(f'--grid {name}={text}: {error}') from error


def joined(flags: Sequence[str]) -> tuple[str, ...]:
    """Flags of run.py as `--name=value`, so that two spellings of a command are equal.

    Raises:
      UsageError: a text is not a flag, or a flag belongs to the suite.
    """
    found: list[str] = []
    for flag in flags:
        if flag.startswith('--'):
            found.append(flag)
        elif found and '=' not in found[-1]:
            found[-1] += f'={flag}'
        else:
            raise UsageError(f'{flag}: not a flag. Fix: write --NAME=VALUE.')
    for flag in found:
        name = flag[2:].partition('=')[0]
        if name in _OWN:
            raise UsageError(f'{flag}: set for each run by the suite. Fix: use {_OWN[name]}.')
        if name in _ATTACHED:
            raise UsageError(
                f'--{name}: such servers hold the state of one run, a suite has several. Fix: omit'
                ' it; each run then starts its servers.'
            )
    return tuple(found)


def expand(sweep: Sweep) -> list[Run]:
    """The runs of a sweep, without `max_frames`; see the module on their order.

    Raises:
      UsageError: there are too many, or two would share a name.
    """
    count = len(sweep.games) * len(sweep.presets) * len(sweep.seeds)
    for values in sweep.grid.values():
        count *= len(values)
    if count > _MOST_RUNS:
        raise UsageError(f'{count} runs: too many. Fix: plan at most {_MOST_RUNS}.')
    labels = labels_of(tuple(sweep.grid))
    runs: list[Run] = []
    combinations = [*itertools.product(*sweep.grid.values())]
    for seed, combination in itertools.product(sweep.seeds, combinations):
        grid = tuple(zip(sweep.grid, combination, strict=True))
        parts = [f'{labels[name]}{_fit(value)}' for name, value in grid]
        pairs = itertools.product(sweep.presets or (None,), sweep.games)
        for preset, game in ((preset or presets.default(game), game) for preset, game in pairs):
            name = '-'.join([game.replace('/', '_'), preset, *parts, f'seed{seed}'])
            runs.append(Run(name, game, preset, seed, grid, sweep.flags))
    name, most = collections.Counter(run.name for run in runs).most_common(1)[0]
    if most > 1:
        raise UsageError(f'--grid: {most} runs would be named {name}. Fix: use other values.')
    return runs


def labels_of(names: Sequence[str]) -> dict[str, str]:
    """Short names of settings: `learning_rate` is `lr`; whole if two would be the same."""
    short = {
        name: ''.join(part[0] for part in name.split('_')) if '_' in name else name
        for name in names
    }
    labels = list(short.values())
    return {name: label if labels.count(label) == 1 else name for name, label in short.items()}


def label(run: Run) -> str:
    """Preset and grid values of a run, for a table: `laptop lr0.0003`."""
    labels = labels_of([name for name, _ in run.grid])
    return ' '.join([run.preset, *(f'{labels[name]}{_fit(value)}' for name, value in run.grid)])


def _fit(value: Any) -> str:
    """A value as a part of a file's name."""
    return _UNFIT.sub('_', str(value))[:_LONGEST_VALUE].lower()


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f'--{name}' if value else f'--no-{name}'
    return f'--{name}={value}'


def prepare(runs: Sequence[Run]) -> list[Prepared]:
    """Checks the flags of each run as run.py does; sets `max_frames`.

    Raises:
      UsageError: flags are invalid; names the runs and what is wrong, on one line.
    """
    prepared: list[Prepared] = []
    wrong: dict[str, list[str]] = {}
    for run in runs:
        try:
            prepared.append(_prepare(run))
        except UsageError as error:
            wrong.setdefault(str(error), []).append(run.name)
    if not wrong:
        return prepared
    if len(wrong) == 1 and not prepared:
        raise UsageError(next(iter(wrong)))
    named = '; '.join(f'{_few(names)}: {error}' for error, names in wrong.items())
    raise UsageError(f'{len(runs) - len(prepared)} of {len(runs)} runs are invalid: {named}')


def _prepare(run: Run) -> Prepared:
    for name, _ in run.grid:
        if any(flag.partition('=')[0] in (f'--{name}', f'--no-{name}') for flag in run.flags):
            raise UsageError(f'--{name}: also in --grid. Fix: omit one.')
    launch, preset, values = command_line.parse(run.argv)
    config = command_line.experiment(preset, values)
    return Prepared(dataclasses.replace(run, max_frames=config.run.max_frames), launch, config)


def differing(stored: Sequence[Run], asked: Sequence[Run]) -> list[str]:
    """The flags in which a command lacks or changes values of a suite; empty if it continues it."""
    found = [
        _OWN.get(field, f'--{field}')
        for field in ('game', 'preset', 'seed', 'grid')
        if {getattr(run, field) for run in stored} - {getattr(run, field) for run in asked}
    ]
    before, now = _by_name(stored), _by_name(asked)
    return found + [name for name in {**before, **now} if before.get(name) != now.get(name)]


def _by_name(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The flags that runs of a suite share, by `--name`; `--no-name` is one of them."""
    named: dict[str, list[str]] = {}
    for flag in runs[0].flags:
        named.setdefault(flag.partition('=')[0].replace('--no-', '--', 1), []).append(flag)
    return named


def extended(stored: Sequence[Run], asked: Sequence[Run]) -> list[Run]:
    """The runs of a suite that a command continues: those stored, and new ones that it adds."""
    known = {run.name: run for run in stored}
    return [known.get(run.name, run) for run in asked]


def _few(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ', '.join(names[:_MOST_NAMED]) + (f' and {more} more' if more > 0 else '')


def to_json(run: Run) -> dict[str, Any]:
    """A run as JSON values."""
    return {**dataclasses.asdict(run), 'grid': dict(run.grid), 'flags': list(run.flags)}


def from_json(values: Mapping[str, Any]) -> Run:
    """Decodes what `to_json` encoded.

    Raises:
      ValueError, KeyError, TypeError, AttributeError: the values are of another version.
    """
    run = Run(**{**values, 'grid': tuple(values['grid'].items()), 'flags': tuple(values['flags'])})
    if not run.name or '/' in run.name or run.name.startswith('.'):
        raise ValueError(f'{run.name!r} names no run')
    return run
