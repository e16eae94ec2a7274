"""How Beam's jobs treat their elements, which are workers: flags in, frozen settings out."""

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from infra.flags import nonempty
from infra.named_function import NoFunctionError, load_function
from pipelines.errors import UsageError


def _setting(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={'help': text})


@dataclasses.dataclass(frozen=True)
class JobSettings:
    """Settings of a launch; each field is a flag."""

    statistics_sink: str | None = _setting(
        None,
        'module:function that makes the Beam transform which writes a table of statistics, given'
        ' its name and the type of its rows (see docs/beam.md). Default: JSON lines and Parquet in'
        ' --statistics_dir.',
    )
    statistics_dir: str | None = _setting(
        None,
        'Directory for statistics, local to the workers, or a URL that Beam can write. Default:'
        ' statistics/ in --run_dir if the workers run on this machine or --run_dir is remote;'
        ' otherwise below --temp_location; none without.',
    )
    element_seconds: float = _setting(
        120.0,
        "Time after which a worker's element returns to an engine that continues it (Dataflow,"
        ' Prism, PortableRunner): results so far are committed. 0: never, as a batch job.',
    )
    hang_seconds: float = _setting(
        120.0,
        'Time without a step or an update after which a worker hangs: its process logs where it'
        ' stands, ends and is started again. Below 100 a parameter shard that is started again'
        ' counts as a hang.',
    )
    actor_ram: str | None = _setting(
        None, "Memory that an actor needs, such as 4GB: a resource hint for Beam's engines."
    )
    learner_ram: str | None = _setting(None, 'Likewise, of a learner or bundle.')
    learner_accelerator: str | None = _setting(
        None,
        'Accelerator that a learner or bundle needs, such as'
        " type:nvidia-tesla-t4;count:1;install-nvidia-driver: a resource hint for Beam's engines.",
    )

    def flags(self) -> list[str]:
        """The flags that say so."""
        values = dataclasses.asdict(self)
        return [f'--{name}={value}' for name, value in values.items() if value is not None]

    def sink(self) -> Callable[..., Any] | None:
        """The user's function that makes the transform of a table, None for files.

        Raises:
          UsageError: `--statistics_sink` names no function.
        """
        if self.statistics_sink is None:
            return None
        try:
            return load_function(self.statistics_sink)
        except NoFunctionError as error:
            raise UsageError(f'--statistics_sink {error}. Fix: correct the name.') from error

    def hints(self, kind: str) -> dict[str, str]:
        """Beam's resource hints for one kind of workers; bundles take the learners'."""
        ram = self.actor_ram if kind == 'actor' else self.learner_ram
        accelerator = None if kind == 'actor' else self.learner_accelerator
        hints = {'min_ram': ram, 'accelerator': accelerator}
        return {name: value for name, value in hints.items() if value is not None}


def add_arguments(parser: Any) -> None:
    """Adds the flags to an argparse parser or group."""
    for field in dataclasses.fields(JobSettings):
        kind = float if field.type is float else nonempty
        text = field.metadata['help'].replace('%', '%%')
        if kind is float:
            text += f' Default: {field.default:g}.'
        parser.add_argument(f'--{field.name}', type=kind, default=field.default, help=text)


def from_arguments(known: argparse.Namespace) -> JobSettings:
    """The settings in parsed flags.

    Raises:
      UsageError: a value is out of range.
    """
    names = [field.name for field in dataclasses.fields(JobSettings)]
    settings = JobSettings(**{name: getattr(known, name) for name in names})
    _require_from('element_seconds', 0.0, settings.element_seconds)
    require_hang_seconds(settings.hang_seconds)
    return settings


def require_hang_seconds(value: float) -> None:
    """
    Raises:
      UsageError: the value of --hang_seconds is out of range.
    """
    _require_from('hang_seconds', 10.0, value)


def _require_from(name: str, least: float, value: float) -> None:
    if not least <= value <= 86_400:
        raise UsageError(f'--{name} {value:g}: must be from {least:g} to 86400. Fix: correct it.')


def beam_flags(settings: JobSettings, continues_elements: bool) -> list[str]:
    """Beam's own flags that fit the settings; a user's override them.

    `continues_elements`: whether the engine continues an element that returns early.
    """
    # Beam kills a process that hands on no record: a worker that works does each ten seconds.
    minutes = math.ceil(2 * settings.hang_seconds / 60)
    streaming = ['--streaming'] if continues_elements and settings.element_seconds else []
    return [f'--element_processing_timeout_minutes={minutes}', *streaming]
