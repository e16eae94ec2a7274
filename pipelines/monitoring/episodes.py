"""The games of a run: events in, `episodes.jsonl` out, and back.

The file survives a kill at any moment; a resumed run continues it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from infra.disk import write_atomically
from infra.sealed import parse_object
from pipelines.events import finite

_OPTIONAL: dict[str, Any] = {
    'time': 0.0,
    'worker': 0,
    'clipped_return': None,
    'agent_steps': None,
    'epsilon': None,
}
"""Fields that a line may lack; all others are numbers."""

REMEMBERED_EPISODES = 10_000
"""Latest episodes among which a repeated event is recognized."""
RETURN_WINDOW = 100
"""Episodes in the running mean return, `mean_return_100`."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """One line of `episodes.jsonl`.

    Attributes:
      episode: its number in the run, from 1.
      time: when it was recorded, seconds since 1970.
      frames: emulator frames of the whole run when it ended, as known to its actor (see
        `agents/actor.py`: `run_agent_steps`); the learning curve's x axis.
      updates: global updates of the actor's parameters when it ended.
      raw_return: sum of the game's own rewards.
      clipped_return: sum of the clipped rewards; None: unknown.
      agent_steps: its length; None: unknown.
      worker: the actor that played it.
      epsilon: share of random actions at its end; None: unknown.
    """

    episode: int
    time: float
    frames: int
    updates: int
    raw_return: float
    clipped_return: float | None
    agent_steps: int | None
    worker: int
    epsilon: float | None = None

    @property
    def identity(self) -> tuple:
        """Equal for repeats of one event; two episodes differ at least in time."""
        return self.worker, self.time, self.raw_return, self.agent_steps


def read_episodes(path: pathlib.Path) -> Iterator[Episode]:
    """Yields the episodes of a file; skips lines cut by a kill."""
    try:
        file = path.open(encoding='utf-8', errors='replace')
    except FileNotFoundError:
        return
    with file:
        for line in file:
            episode = _parse(line)
            if episode is not None:
                yield episode


def _parse(line: str) -> Episode | None:
    try:
        row = {**_OPTIONAL, **parse_object(line)}
    except ValueError:
        return None
    values: dict[str, Any] = {
        field.name: row.get(field.name) for field in dataclasses.fields(Episode)
    }
    known = [name for name, value in values.items() if finite(value) is not None]
    absent = [name for name, value in values.items() if name in _OPTIONAL and value is None]
    return Episode(**values) if len(known) + len(absent) == len(values) else None


class EpisodeLog:
    """`episodes.jsonl`, open for appending; each line reaches the kernel at once."""

    def __init__(self, path: pathlib.Path, resume_frames: int | None = None):
        """Opens the file of a new run (`resume_frames` None), or of one to resume.

        Drops cut lines and the episodes after the checkpoint's `resume_frames`: their parameters
        are lost, and the resumed run replaces them. `kept` are the latest of the others.
        """
        kept = [] if resume_frames is None else list(read_episodes(path))
        kept = [row for row in kept if row.frames <= (resume_frames or 0)]
        self.count = len(kept)
        self.kept = tuple(kept[-REMEMBERED_EPISODES:])
        write_atomically(path, ''.join(_line(row) for row in kept))
        self._file = path.open('a', encoding='utf-8', buffering=1)

    def append(self, episode: Episode) -> None:
        self._file.write(_line(episode))
        self.count += 1

    def close(self) -> None:
        self._file.close()


def _line(episode: Episode) -> str:
    return json.dumps(dataclasses.asdict(episode)) + '\n'
