"""Run directories in, frozen records of what they hold out.

Reads runs that are active, have no summary, or were written by earlier versions. A damaged file is
skipped and named.
"""

import contextlib
import dataclasses
import datetime
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from infra.disk import is_remote, read_json_lines
from infra.sealed import parse_object, unseal
from pipelines.errors import UsageError
from pipelines.events import count, finite
from pipelines.experiment import config as config_lib
from pipelines.monitoring.episodes import Episode, read_episodes
from pipelines.reporting.sessions import Session, read_sessions
from pipelines.storage.evaluations import EVALUATION_FILE
from pipelines.storage.reading import readable_records
from pipelines.storage.run_directory import RunDirectory

CURVE_FILE = 'evaluations.jsonl'
VIDEO_FILE = 'video.mp4'
_CONFIG = 'config.json'
_CLOCK_SECONDS = 60.0  # a launch is described this long after its first event at most


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The games of one policy under one protocol.

    Attributes:
      file: name of the file in the run's directory.
      protocol: its name, as written.
      policy: 'run', 'saved_model' or 'random'.
      episodes: games that ended.
      failed: games that did not.
      epsilon: share of random actions; None: unknown.
      max_frames: emulator frames at which a game is cut off; None: unknown.
      deviations: from the protocol's rules; None: the file, of an earlier version, does not say.
      mean, std: of the raw returns; `std` None: unknown.
      updates: of the parameters, None: unknown.
      frames: emulator frames of the run at that moment; None: unknown.
      time: when it was played, seconds since 1970; None: unknown.
      provenance: see `storage/provenance.py`; empty: unknown.
    """

    file: str
    protocol: str
    policy: str
    episodes: int
    failed: int
    epsilon: float | None
    max_frames: int | None
    deviations: Mapping[str, Any] | None
    mean: float
    std: float | None
    updates: int | None
    frames: int | None
    time: float | None
    provenance: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Video:
    """The policy's recorded game; `content` is None if it exceeds the limit."""

    size: int
    content: bytes | None


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its directory describes it.

    Attributes:
      path: as the user gave it.
      name: last part of the path.
      settings: value of each setting, by its name; `preset` is one of them.
      summary: of `summary.json`; empty: none yet.
      episodes: training games.
      evaluations: results of complete evaluations.
      curve: evaluations during training, in order.
      sessions: launches with their scalars, in order.
      launches: rows of `launches.jsonl`.
      video: None: the run has none.
      problems: files that were skipped, and why.
    """

    path: str
    name: str
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]
    episodes: tuple[Episode, ...]
    evaluations: tuple[Evaluation, ...]
    curve: tuple[Evaluation, ...]
    sessions: tuple[Session, ...]
    launches: tuple[Mapping[str, Any], ...]
    video: Video | None
    problems: tuple[str, ...]

    @property
    def game(self) -> str:
        return str(self.settings.get('game', 'unknown'))

    @property
    def seed(self) -> Any:
        return self.settings.get('seed')

    @property
    def frames(self) -> int:
        """Emulator frames made, as far as the run's files say."""
        written = self.scalar('progress/updates')
        return max(
            count(self.summary.get('frames')) or 0,
            self.episodes[-1].frames if self.episodes else 0,
            int(written[-1, 0]) if len(written) else 0,
        )

    @property
    def state(self) -> str:
        """Why the run ended, or that it has not."""
        return str(self.summary.get('exit_reason') or 'no summary: active or killed')

    def scalar(self, tag: str) -> np.ndarray:
        """<float64>[points, 3] of a tag (see `Session`) over all sessions."""
        held = [s.scalars[tag] for s in self.sessions if tag in s.scalars]
        return np.concatenate([np.empty((0, 3)), *held])

    def cores(self, when: float) -> int | None:
        """Cores of the launcher's machine at a time (seconds since 1970); None: unknown."""
        known = [(_launch_time(row), count(row.get('cores'))) for row in self.launches]
        before = [
            cores for time, cores in known if time is not None and time <= when + _CLOCK_SECONDS
        ]
        return before[-1] if before else None


def _launch_time(row: Mapping[str, Any]) -> float | None:
    """Seconds since 1970 of a row of `launches.jsonl`; None: unknown."""
    try:
        return datetime.datetime.fromisoformat(str(row.get('time'))).timestamp()
    except ValueError:
        return None


def find(paths: Sequence[str]) -> list[str]:
    """The runs that the user named: run directories, or directories of such.

    Raises:
      UsageError: there is no path, or one does not exist or holds no run.
    """
    if not paths:
        raise UsageError('no run named. Fix: name run directories.')
    found: list[str] = []
    for path in paths:
        found += [path] if is_remote(path) else _below(path)
    # A run that is named twice would count as two seeds.
    return list({p if is_remote(p) else str(pathlib.Path(p).resolve()): p for p in found}.values())


def _below(path: str) -> list[str]:
    directory = pathlib.Path(path)
    try:
        if (directory / _CONFIG).is_file():
            return [path]
        inner = [entry for entry in sorted(directory.iterdir()) if (entry / _CONFIG).is_file()]
    except OSError as error:
        raise UsageError(
            f'{path}: no readable directory ({error.strerror}). Fix: name run directories.'
        ) from error
    if not inner:
        raise UsageError(
            f'{path}: holds no run ({_CONFIG} is missing). Fix: name directories of runs.'
        )
    return [str(entry) for entry in inner]


def read(path: str, video_bytes: int) -> Run:
    """Reads a run, local or at gs://.

    Args:
      path: directory of the run.
      video_bytes: a larger video is not read.

    Raises:
      UsageError: there is no run, or its configuration is damaged.
    """
    with readable_records(path) as local:
        directory = RunDirectory.existing(local)
        problems: list[str] = []
        return Run(
            path=path,
            name=pathlib.PurePath(path).name or path,
            settings=_settings(directory.config_file, path),
            summary=_object(directory.summary_file, problems) or {},
            episodes=_episodes(directory.episodes_file, problems),
            evaluations=tuple(_evaluations(local, problems)),
            curve=tuple(_curve(local / CURVE_FILE, problems)),
            sessions=tuple(read_sessions(directory.events, problems.append)),
            launches=tuple(_lines(directory.launches_file, problems)),
            video=_video(local / VIDEO_FILE, video_bytes, problems),
            problems=tuple(problems),
        )


def _settings(file: pathlib.Path, path: str) -> dict[str, Any]:
    """The settings of any version; those that this version reads have the defaults of the others.

    Raises:
      UsageError: the file is not readable or damaged.
    """
    try:
        content = file.read_bytes()
        groups = unseal(parse_object(content))
    except (OSError, ValueError) as error:
        raise UsageError(
            f'{path}: {_CONFIG} is damaged ({error}). Fix: restore a copy, or leave this run out.'
        ) from error
    with contextlib.suppress(UsageError):  # of another version: as it is
        groups = dataclasses.asdict(config_lib.from_json(content))
    settings = {name: value for name, value in groups.items() if not isinstance(value, dict)}
    for group in groups.values():
        settings |= group if isinstance(group, dict) else {}
    return settings


def _object(file: pathlib.Path, problems: list[str]) -> dict[str, Any] | None:
    """The JSON object in a file; None if it is missing, or damaged and named so."""
    try:
        return parse_object(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f'{file.name}: skipped, not readable ({_reason(error)})')
        return None


def _reason(error: Exception) -> str:
    return error.strerror or 'error' if isinstance(error, OSError) else str(error)


def _episodes(file: pathlib.Path, problems: list[str]) -> tuple[Episode, ...]:
    try:
        rows = sorted(read_episodes(file), key=lambda row: row.frames)
        # A last line without its end is being written.
        lines = file.read_bytes().count(b'\n') if file.exists() else 0
    except OSError as error:
        problems.append(f'{file.name}: skipped, not readable ({_reason(error)})')
        return ()
    if lines > len(rows):
        problems.append(f'{file.name}: {lines - len(rows)} damaged lines skipped')
    return tuple(rows)


def _lines(file: pathlib.Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        return read_json_lines(file)
    except OSError as error:
        problems.append(f'{file.name}: skipped, not readable ({_reason(error)})')
        return []


def _evaluations(directory: pathlib.Path, problems: list[str]) -> list[Evaluation]:
    files = [directory / EVALUATION_FILE, *sorted(directory.glob('evaluation-*.json'))]
    found = []
    for file in files:
        if file.name.endswith('.partial.json') or (held := _object(file, problems)) is None:
            continue
        evaluation = _evaluation(file.name, held)
        if evaluation is None:
            problems.append(f'{file.name}: skipped, not the result of an evaluation')
        else:
            found.append(evaluation)
    return found


def _curve(file: pathlib.Path, problems: list[str]) -> list[Evaluation]:
    found = [_evaluation(file.name, row) for row in _lines(file, problems)]
    return sorted(
        (row for row in found if row is not None and row.frames is not None),
        key=lambda row: row.frames or 0,
    )


def _evaluation(file: str, held: Mapping[str, Any]) -> Evaluation | None:
    """Of any version; None if it has no protocol, number of games or mean."""
    protocol, episodes, mean = held.get('protocol'), count(held.get('episodes')), held.get('mean')
    if not isinstance(protocol, str) or not episodes or finite(mean) is None:
        return None
    policy, made_by = held.get('policy'), held.get('provenance')
    deviations = held.get('deviations')
    return Evaluation(
        file=file,
        protocol=protocol,
        policy=str(policy.get('kind', 'run')) if isinstance(policy, dict) else 'run',
        episodes=episodes,
        failed=count(held.get('failed')) or 0,
        epsilon=finite(held.get('epsilon')),
        max_frames=count(held.get('max_frames')),
        deviations=deviations if isinstance(deviations, dict) else None,
        mean=float(mean),  # type: ignore[arg-type]
        std=finite(held.get('std')),
        updates=count(held.get('updates')),
        frames=count(held.get('frames')),
        time=finite(held.get('time')),
        provenance=made_by if isinstance(made_by, dict) else {},
    )


def _video(file: pathlib.Path, limit: int, problems: list[str]) -> Video | None:
    try:
        size = file.stat().st_size
        return Video(size, file.read_bytes() if size <= limit else None)
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f'{file.name}: skipped, not readable ({_reason(error)})')
        return None
