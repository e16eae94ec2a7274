"""The evaluations during training: lines of `evaluations.jsonl` in, their figures out.

The evaluator (pipelines/evaluator.py) appends a line for each; this process reads them.
"""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from infra.disk import read_json, read_json_lines, write_atomically
from infra.sealed import parse_object
from pipelines.events import count, finite
from pipelines.storage.evaluations import EVALUATION_FILE
from pipelines.storage.run_directory import RunDirectory

_SUMMARISED = ('updates', 'frames', 'episodes', 'mean', 'std')


class EvaluationLog:
    """`evaluations.jsonl` as it grows.

    Attributes:
      number: of evaluations.
      last: line of the last one, None before the first.
      best: line of the best one, whose policy `best/` holds.
    """

    def __init__(self, directory: RunDirectory, resume_frames: int | None = None):
        """Opens the file of a new run (`resume_frames` None), or of one to resume.

        Drops the evaluations after the checkpoint's `resume_frames`, as `EpisodeLog` does. The best
        policy stays, also if it is one of those: its parameters are kept and its score is valid.
        """
        self._file, self._best_file = directory.evaluations_file, directory.best / EVALUATION_FILE
        self.number, self._position = 0, 0
        self.last: Mapping[str, Any] | None = None
        self.best: Mapping[str, Any] | None = None
        if resume_frames is None:
            return
        self.best = self._kept()
        rows = [line for line in read_json_lines(self._file) if _is_evaluation(line)]
        kept = [row for row in rows if row['frames'] <= resume_frames]
        if rows:
            write_atomically(self._file, ''.join(f'{json.dumps(row)}\n' for row in kept))
            self._position = self._file.stat().st_size
        self.number, self.last = len(kept), kept[-1] if kept else None

    @property
    def updates(self) -> int:
        """Global updates of the last one, 0 before the first."""
        return 0 if self.last is None else int(self.last['updates'])

    def read(self) -> list[Mapping[str, Any]]:
        """Reads and returns what has been appended since the last call."""
        added: list[Mapping[str, Any]] = []
        with contextlib.suppress(OSError):  # no evaluation yet
            if self._file.stat().st_size <= self._position:
                return added
            with self._file.open('rb') as file:
                file.seek(self._position)
                lines, end, _ = file.read().rpartition(b'\n')  # the last line may be incomplete
            self._position += len(lines + end)
            for line in lines.splitlines():
                with contextlib.suppress(ValueError):
                    parsed = parse_object(line)
                    if _is_evaluation(parsed):
                        added.append(parsed)
        for row in added:
            self.number, self.last = self.number + 1, row
            if row.get('best') is True:
                self.best = row
        return added

    def summary(self) -> dict[str, Any]:
        """JSON values for the summary: the number, the last and the best."""
        best = self._kept() or self.best  # an evaluator killed before its line has kept it already
        return {'number': self.number, 'last': _figures(self.last), 'best': _figures(best)}

    def _kept(self) -> Mapping[str, Any] | None:
        """The evaluation of `best/`, None if there is none or it is damaged."""
        best = read_json(self._best_file)
        return best if best is not None and _is_evaluation(best) else None


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    numbers = [finite(row.get(name)) for name in ('mean', 'std', 'time')]
    return None not in numbers + [count(row.get(name)) for name in ('frames', 'updates')]


def _figures(row: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if row is None else {name: row.get(name) for name in _SUMMARISED}
