"""The end of a run: its last checkpoint in; policies, evaluation, video and the result's line out.

The work is done in a process of `pipelines.finish`.
"""

import contextlib
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from infra.disk import read_json, remove_leftovers
from infra.own_time import OwnTime
from infra.process import ProcessSpec, SupervisedProcess
from pipelines.errors import reason_of, with_remedy
from pipelines.events import count
from pipelines.experiment.config import ExperimentConfig
from pipelines.launch.interrupts import Signals
from pipelines.monitoring.display import Display
from pipelines.storage.evaluations import EVALUATION_FILE, line, progress_file, read_result
from pipelines.storage.resuming import resuming
from pipelines.storage.run_directory import BEST, RunDirectory, command, loading_hint

_POLL_SECONDS = 0.5
_SILENCE_SECONDS = 1_800.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Results of evaluation and export.

    Attributes:
      evaluation: as in the summary; None without one.
      exported: whether `policy/` holds the final parameters.
      filmed: whether `video.mp4` shows this policy.
      missing: commands that were due and did not finish.
    """

    evaluation: Mapping[str, Any] | None = None
    exported: bool = False
    filmed: bool = False
    missing: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Finishing:
    """Ends a run that has reached its budget.

    Attributes:
      config: the experiment.
      directory: the run's, locked by this process.
      display: shows progress.
      signals: whether the user has requested the end.
      hang_seconds: after so long without a step a game of the evaluation fails.
    """

    config: ExperimentConfig
    directory: RunDirectory
    display: Display
    signals: Signals
    hang_seconds: float

    def prepare(self) -> None:
        """Starts the process of `evaluate`, whose imports take seconds, while the workers end."""
        with contextlib.suppress(OSError):  # `evaluate` tries again and shows the error
            self._child.start()

    def close(self) -> None:
        """Ends a process that was prepared in vain."""
        self._child.terminate()

    def evaluate(self) -> Outcome:
        """Exports and evaluates the last checkpoint, in a separate process."""
        file = self.directory.path / EVALUATION_FILE
        directory = self.directory
        outputs = file, directory.policy, directory.video, directory.best_policy
        before = [_identity(path) for path in outputs]
        self._remove_leftovers(*outputs)
        self.signals.effect = 'ending the evaluation; the training is complete and saved'
        child = self._child
        if not self.signals.received:
            try:
                if child.pid is None or child.poll() is not None:
                    child.start()
                child.release()
                self._await(child, file)
            except OSError as error:  # a full disk; the summary follows
                self.display.message(
                    with_remedy(f'evaluation: not started ({reason_of(error)})', error)
                )
            finally:
                child.terminate()
                self._remove_leftovers(*outputs)
        written = [_identity(path) != old for path, old in zip(outputs, before)]
        evaluated, exported, filmed, best_exported = written
        missing = ['evaluate'] * (not evaluated) + ['export'] * (not exported)
        interrupted = missing and self.signals.received  # a resume makes up for all
        if missing and not interrupted:
            self.display.message(child.describe_failure())
        if directory.best.is_dir() and not best_exported and not interrupted:
            fix = command('export', directory.path, '--checkpoint', BEST)
            self.display.message(f'policy_best/: not exported. Fix: run {fix}.')
        return Outcome(read_result(file) if evaluated else None, exported, filmed, missing)

    def _await(self, child: SupervisedProcess, evaluation: pathlib.Path) -> None:
        """Shows the progress until the child has ended, or a signal arrives."""
        most = _SILENCE_SECONDS + self.hang_seconds
        own_time, since = OwnTime(), 0.0
        done, episodes = 0, self.config.run.evaluation_episodes
        progress, before = progress_file(evaluation), _identity(evaluation)
        seen: Any = None
        while child.poll() is None and not self.signals.received:
            done = max(done, count((read_json(progress) or {}).get('episodes')) or 0)
            # While games are played, the first of these files is written every second.
            now, found = own_time.look(), (_identity(progress), _identity(evaluation))
            if found != seen:
                seen, since = found, now
            phase = f'evaluating {done}/{episodes}'
            if self.config.run.video and found[1] != before:
                phase = f'filming {now - since:.0f} s'
            if now - since > most:
                self.display.message(f'{phase}: stopped, no sign of life for {most:g} s')
                return
            self.display.phase(phase)
            time.sleep(_POLL_SECONDS)

    def _remove_leftovers(self, evaluation: pathlib.Path, *others: pathlib.Path) -> None:
        """Removes temporary files of a child that was killed while it wrote these."""
        progress = progress_file(evaluation)
        paths = (evaluation, *others, progress, self.directory.best)
        with contextlib.suppress(OSError):  # the summary follows
            progress.unlink(missing_ok=True)
            remove_leftovers(self.directory.path, *(path.name for path in paths))

    @functools.cached_property
    def _child(self) -> SupervisedProcess:
        path = self.directory.path
        arguments = [str(path), str(path / EVALUATION_FILE), f'{self.hang_seconds:g}']
        return SupervisedProcess(
            ProcessSpec(
                name='evaluation and export',
                argv=[sys.executable, '-m', 'pipelines.finish', *arguments],
                log_file=self.directory.logs / 'finish.log',
                environment={
                    'TF_CPP_MIN_LOG_LEVEL': '2',
                    'TF_NUM_INTRAOP_THREADS': '1',
                    'CUDA_VISIBLE_DEVICES': '-1',  # accelerators are for learners
                },
                unset=('PYTHONDONTWRITEBYTECODE',),
                held=True,
            )
        )

    def tell_result(self, outcome: Outcome, summarised: bool) -> None:
        """Prints the result and where it is, after hints on loading it and on what is missing."""
        if outcome.exported and (hint := loading_hint(self.directory.policy)):
            self.display.message(hint)
        if outcome.missing:
            self.display.message(
                f'{" and ".join(outcome.missing)}: not finished. Fix: {resuming(self.directory)}.'
            )
        interrupted = outcome.missing and self.signals.received  # a resume makes up for all
        filmed = outcome.filmed or not self.config.run.video or interrupted
        if outcome.evaluation is not None and not filmed:
            self.display.message(
                'video.mp4: not made (logs/finish.log has the reason). Fix: run'
                f' {command("evaluate", self.directory.path)} with --video FILE.mp4.'
            )
        game = self.config.environment.game
        result = line(outcome.evaluation) if outcome.evaluation else f'{game}: no evaluation'
        names = ['summary.json'] * summarised + ['policy/'] * outcome.exported
        names = names + ['video.mp4'] * outcome.filmed or ['logs/']
        self.display.message(
            f'{result}; {", ".join(names)} and the rest are in {self.directory.path}'
        )


def _identity(path: pathlib.Path) -> tuple[int, int] | None:
    """Differs once a file or directory has been replaced; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
