"""Run directories in, frozen records of what they hold out.

Reads runs that are active, have no summary, or were written by earlier versions. A damaged file is
skipped and named.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, TypeVar

import numpy as np

from agents.games import GameError, rom_id
from infra.disk import is_remote
from infra.sealed import parse_object, unseal
from pipelines.errors import UsageError, reason_of, remedy_of
from pipelines.experiment import config as config_lib
from pipelines.experiment.config import CONFIG_FILE
from pipelines.monitoring.episodes import Episode, read_episodes
from pipelines.reporting import records
from pipelines.reporting.records import Evaluation, Launch, Summary
from pipelines.reporting.sessions import Session, read_sessions
from pipelines.storage.evaluations import EVALUATION_FILE
from pipelines.storage.reading import readable_records
from pipelines.storage.run_directory import RunDirectory

_RESTORE = 'restore a copy of the file'
_Record = TypeVar('_Record')
_CLOCK_SECONDS = 60.0  # a launch is described this long after its first event at most


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
      summary: all unknown before the run's end.
      episodes: training games.
      evaluations: results of the run's own policies in its game.
      curve: evaluations during training, in order.
      sessions: launches with their scalars, in order.
      launches: rows of `launches.jsonl`.
      video: None: the run has none.
      problems: files that were skipped, or lines of them, with reason and remedy.
    """

    path: str
    name: str
    settings: Mapping[str, Any]
    summary: Summary
    episodes: tuple[Episode, ...]
    evaluations: tuple[Evaluation, ...]
    curve: tuple[Evaluation, ...]
    sessions: tuple[Session, ...]
    launches: tuple[Launch, ...]
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
            self.summary.frames or 0,
            self.episodes[-1].frames if self.episodes else 0,
            int(written[-1, 0]) if len(written) else 0,
        )

    @property
    def state(self) -> str:
        """Why the run ended, or that it has not."""
        return self.summary.exit_reason or 'no summary: active or killed'

    def scalar(self, tag: str) -> np.ndarray:
        """<float64>[points, 3] of a tag (see `Session`) over all sessions."""
        held = [s.scalars[tag] for s in self.sessions if tag in s.scalars]
        return np.concatenate([np.empty((0, 3)), *held])

    def cores(self, when: float) -> float | None:
        """Cores that the launcher may use at a time (seconds since 1970); None: unknown."""
        launched = self._launched(when)
        return launched.machine.cores if launched else None

    def host(self, when: float) -> str | None:
        """Name of the launcher's machine at a time (seconds since 1970); None: unknown."""
        launched = self._launched(when)
        return launched.machine.host if launched else None

    def _launched(self, when: float) -> Launch | None:
        until = when + _CLOCK_SECONDS
        return next(
            (r for r in self.launches[::-1] if r.time is not None and r.time <= until), None
        )


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
        if (directory / CONFIG_FILE).is_file():
            return [path]
        inner = [entry for entry in sorted(directory.iterdir()) if _is_run(entry)]
    except OSError as error:
        raise UsageError(
            f'{path}: no readable directory ({error.strerror}). Fix: name run directories.'
        ) from error
    if not inner:
        raise _no_run(path)
    return [str(entry) for entry in inner]


def _is_run(directory: pathlib.Path) -> bool:
    """Whether it has files of a run; `read` names one without a configuration."""
    names = CONFIG_FILE, 'summary.json', 'episodes.jsonl'
    return any((directory / name).is_file() for name in names)


def _no_run(path: str) -> UsageError:
    return UsageError(
        f'{path}: holds no run ({CONFIG_FILE} is missing). Fix: name directories of runs.'
    )


def read(path: str, video_bytes: int) -> Run:
    """Reads a run, local or at gs://.

    Args:
      path: directory of the run.
      video_bytes: a larger video is not read.

    Raises:
      UsageError: there is no run, or its configuration is damaged.
    """
    with readable_records(path) as local:
        if not (local / CONFIG_FILE).exists():
            raise _no_run(path)
        directory = RunDirectory.existing(local)
        problems: list[str] = []
        settings = _settings(directory.config_file, path)
        game = str(settings.get('game', ''))
        return Run(
            path=path,
            name=pathlib.PurePath(path).name or path,
            settings=settings,
            summary=records.summary(_object(directory.summary_file, problems) or {}),
            episodes=_episodes(directory.episodes_file, problems),
            evaluations=tuple(_evaluations(local, game, problems)),
            curve=tuple(_curve(directory.evaluations_file, problems)),
            sessions=tuple(read_sessions(directory.events, problems.append)),
            launches=tuple(_lines(directory.launches_file, _launch, problems)),
            video=_video(directory.video, video_bytes, problems),
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
            f'{path}: {CONFIG_FILE} is damaged ({error}). Fix: restore a copy, or leave this run'
            ' out.'
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
        problems.append(_unreadable(file, error))
        return None


def _skipped(what: str, reason: str, remedy: str = _RESTORE) -> str:
    return f'{what}: skipped ({reason}). Fix: {remedy}.'


def _unreadable(file: pathlib.Path, error: Exception) -> str:
    return _skipped(file.name, reason_of(error), remedy_of(error) or _RESTORE)


def _damaged(file: pathlib.Path, lines: int, of: int) -> str:
    return _skipped(f'{file.name}: {lines} of {of} lines', 'damaged')


def _episodes(file: pathlib.Path, problems: list[str]) -> tuple[Episode, ...]:
    try:
        rows = sorted(read_episodes(file), key=lambda row: row.frames)
        # A last line without its end is being written.
        lines = file.read_bytes().count(b'\n') if file.exists() else 0
    except OSError as error:
        problems.append(_unreadable(file, error))
        return ()
    if lines > len(rows):
        problems.append(_damaged(file, lines - len(rows), lines))
    return tuple(rows)


def _lines(
    file: pathlib.Path, parse: Callable[[Mapping[str, Any]], _Record], problems: list[str]
) -> list[_Record]:
    """The records in a file's lines; empty if it is missing. Names damaged lines.

    Args:
      file: of JSON objects.
      parse: raises ValueError if an object is no such record.
      problems: takes what was skipped.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(_unreadable(file, error))
        return []
    whole, _, _ = content.rpartition(b'\n')  # a last line without its end is being written
    lines = [line for line in whole.splitlines() if line.strip()]
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(parse(parse_object(line)))
    if len(found) < len(lines):
        problems.append(_damaged(file, len(lines) - len(found), len(lines)))
    return found


def _launch(row: Mapping[str, Any]) -> Launch:
    """
    Raises:
      ValueError: it has no time, so nothing can be placed by it.
    """
    launch = records.launch(row)
    if launch.time is None:
        raise ValueError('no time')
    return launch


def _evaluations(directory: pathlib.Path, game: str, problems: list[str]) -> list[Evaluation]:
    """The results of the run's own policies in its game; names the others."""
    files = [directory / EVALUATION_FILE, *sorted(directory.glob('evaluation-*.json'))]
    found = []
    for file in files:
        if file.name.endswith('.partial.json') or (held := _object(file, problems)) is None:
            continue
        try:
            evaluation = records.evaluation(file.name, held)
        except ValueError as error:
            problems.append(_skipped(file.name, str(error)))
            continue
        if reason := _foreign(evaluation, game):
            problems.append(_skipped(file.name, reason, "move it out of the run's directory"))
        else:
            found.append(evaluation)
    return found


def _foreign(evaluation: Evaluation, game: str) -> str:
    """Why a result is no score of this run; empty if it is one."""
    if evaluation.policy != 'run':
        return f'of a policy of another kind ({evaluation.policy}, {evaluation.path or "no path"})'
    with contextlib.suppress(GameError):  # of a later version
        game = rom_id(game)
    if evaluation.game not in (None, game):
        return f'of another game ({evaluation.game})'
    return ''


def _curve(file: pathlib.Path, problems: list[str]) -> list[Evaluation]:
    """The evaluations during training, in order."""

    def placed(row: Mapping[str, Any]) -> tuple[int, Evaluation]:
        evaluation = records.evaluation(file.name, row)
        if evaluation.frames is None:
            raise ValueError('no frames')
        return evaluation.frames, evaluation

    return [row for _, row in sorted(_lines(file, placed, problems), key=lambda entry: entry[0])]


def _video(file: pathlib.Path, limit: int, problems: list[str]) -> Video | None:
    try:
        with file.open('rb') as film:
            size = os.fstat(film.fileno()).st_size
            _require_whole(film, size)
            film.seek(0)
            return Video(size, film.read() if size <= limit else None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        remedy = 'remove it, then film the run with `pipelines/evaluate.py --video`'
        problems.append(_skipped(file.name, reason_of(error), remedy_of(error) or remedy))
        return None


def _require_whole(film: BinaryIO, size: int) -> None:
    """
    Raises:
      ValueError: the boxes of the file (ISO/IEC 14496-12) are not those of a whole film.
    """
    place, kinds = 0, set()
    while place < size:
        film.seek(place)
        header = film.read(16)
        length = int.from_bytes(header[:4])
        if length == 1:
            length = int.from_bytes(header[8:])
        elif length == 0:  # up to the end
            length = size - place
        kinds.add(header[4:8])
        place += max(length, len(header[:8]))
    if place != size or not {b'ftyp', b'moov'} <= kinds:
        raise ValueError('no whole MP4 file')
