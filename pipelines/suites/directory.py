"""The directory of one suite: its plan, its lock, its runs and their logs.

suite.json    the plan, sealed        NAME/        directory of a run, written by run.py
report.html   of the finished runs    logs/NAME.log  what the run prints, all attempts
"""

import contextlib
import pathlib
import shutil
from collections.abc import Sequence
from types import TracebackType
from typing import BinaryIO

from infra.disk import LOCK_FILE, InUseError, is_remote, lock, remove_leftovers, write_json
from infra.sealed import parse_object, seal, unseal
from pipelines.errors import UsageError, reason_of, unwritable
from pipelines.storage.run_directory import dated, remove_empty, require_fit, topmost_missing
from pipelines.suites import plan, standing
from pipelines.suites.plan import Run
from pipelines.suites.standing import Stage

_PLAN_FILE = 'suite.json'
_STEM = 'suite'
_VERSION = 1
_ANOTHER = 'choose another --suite_dir'


class SuiteDirectory:
    """A suite's directory, locked by this process from `open` until `close`.

    A context manager. A new suite that ends in a `UsageError` before its first run removes it.
    """

    def __init__(self, path: pathlib.Path, held: BinaryIO, created: pathlib.Path | None):
        """Use `open`. `created`: topmost directory created for the suite, None if it existed."""
        self.path = path
        self._held = held
        self._created = created

    @classmethod
    def open(cls, path: pathlib.Path) -> 'SuiteDirectory':
        """Creates or opens and locks the directory.

        Raises:
          UsageError: it is not writable, locked by another process, or holds other files.
        """
        created = topmost_missing(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            entries = {entry.name for entry in path.iterdir()} - {LOCK_FILE}
            if entries and _PLAN_FILE not in entries:
                raise UsageError(f'{path}: not an empty directory and no suite. Fix: {_ANOTHER}.')
            held = lock(path)
            remove_leftovers(path, _PLAN_FILE)  # of a suite killed while it wrote its plan
            return cls(path, held, created)
        except InUseError as error:
            raise UsageError(f'{error}. Fix: wait until that suite ends, or {_ANOTHER}.') from None
        except OSError as error:
            remove_empty(path, created)
            raise unwritable(path, error, _ANOTHER) from error

    def run(self, run: Run) -> pathlib.Path:
        """Directory of a run."""
        return self.path / run.name

    def log(self, run: Run) -> pathlib.Path:
        """File with what a run prints. It exists once the suite has started the run."""
        return self._logs / f'{run.name}.log'

    @property
    def _logs(self) -> pathlib.Path:
        return self.path / 'logs'

    @property
    def report(self) -> pathlib.Path:
        return self.path / 'report.html'

    @property
    def report_log(self) -> pathlib.Path:
        return self._logs / 'report.log'

    def write(self, runs: Sequence[Run], command: str) -> None:
        """Writes the plan, with the command that made it, unless it is there already.

        Raises:
          UsageError: the disk is full, or the plan that is there is damaged.
        """
        if stored(self.path) == [*runs]:
            return
        values = {'version': _VERSION, 'command': command, 'runs': [*map(plan.to_json, runs)]}
        try:
            write_json(self.path / _PLAN_FILE, seal(values))
        except OSError as error:
            raise unwritable(self.path, error, _ANOTHER) from error

    def require_own(self, runs: Sequence[Run]) -> None:
        """Checks that no directory of a run was made by somebody else.

        Raises:
          UsageError: one was.
        """
        for run in runs:
            if self.run(run).exists() and not self.log(run).exists():
                raise UsageError(
                    f'{self.run(run)}: not made by this suite. Fix: move it elsewhere, or'
                    f' {_ANOTHER}.'
                )

    def clear(self, run: Run) -> None:
        """Removes what an attempt without a checkpoint left of a run.

        Raises:
          OSError: another process uses it, or it cannot be removed.
        """
        path = self.run(run)
        if path.exists():
            with lock(path, by_children=True):
                shutil.rmtree(path)

    def close(self) -> None:
        """Unlocks the directory. Repeated calls do nothing."""
        self._held.close()

    def __enter__(self) -> 'SuiteDirectory':
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, UsageError) and self._created is not None and not self._logs.exists():
            remove_leftovers(self.path, _PLAN_FILE)
            for name in (_PLAN_FILE, LOCK_FILE):
                (self.path / name).unlink(missing_ok=True)
            remove_empty(self.path, self._created)
        self.close()


def local(text: str) -> pathlib.Path:
    """The absolute path of --suite_dir.

    Raises:
      UsageError: it is remote, or its name unsuitable.
    """
    if is_remote(text):
        raise UsageError(
            f'--suite_dir {text}: not on this machine. Fix: name a local path; copy the runs'
            ' afterwards.'
        )
    path = pathlib.Path(text).absolute()
    require_fit(path)
    return path


def new(parent: pathlib.Path) -> pathlib.Path:
    """Path of a new suite in `parent`."""
    return dated(parent / _STEM)


def stored(path: pathlib.Path) -> list[Run] | None:
    """The plan of the suite in `path`, None if it holds none.

    Raises:
      UsageError: the path is no directory, or the plan unreadable or damaged.
    """
    file = path / _PLAN_FILE
    try:
        values = unseal(parse_object(file.read_bytes()))
        if values['version'] != _VERSION:
            raise ValueError(f'version {values["version"]}')
        return [plan.from_json(run) for run in values['runs']]
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        wrong = next(each for each in (path, *path.parents) if each.exists())
        raise UsageError(f'{wrong}: not a directory. Fix: {_ANOTHER}.') from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f'{file}: unreadable ({reason_of(error)}). Fix: restore a copy, or {_ANOTHER}.'
        ) from error


def unfinished(parent: pathlib.Path, runs: Sequence[Run]) -> pathlib.Path | None:
    """The newest suite `suite-*` in `parent` that has exactly these runs, not all of them done."""
    for path in sorted(parent.glob(f'{_STEM}-*'), reverse=True):
        with contextlib.suppress(UsageError):
            held = stored(path)
            if held == [*runs] and not all(is_done(path / run.name, run) for run in held):
                return path
    return None


def is_done(path: pathlib.Path, run: Run) -> bool:
    """Whether the directory of a run holds all of it."""
    return standing.stage(path, run.max_frames) is Stage.DONE
