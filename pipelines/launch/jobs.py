"""The Beam jobs of a run, each a process; a worker that falls silent is submitted again.

In: which workers a run needs, and their heartbeats. Out: running jobs. Every moment is one of the
listener's own clock (`infra/own_time.py`), a heartbeat's the one at which it came. Beam's local
runner does not replace a dead worker and reports it only when all its other workers have ended, so
the launcher notices: the process that the worker's telemetry names is gone, or the worker is
silent. Likewise on job servers, but for the processes, which may be on other machines. Other
engines replace workers themselves: of their jobs only the end is looked at.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import sys
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence

from infra.flags import value_of
from infra.process import ProcessSpec, SupervisedProcess, back_off_seconds, describe_exit
from pipelines.events import Heartbeat
from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.launch import Addresses, Launch
from pipelines.monitoring.monitor import Worker
from pipelines.storage.run_directory import RunDirectory

GONE_SECONDS = 5.0
"""A worker whose process is gone for so long is dead: at a run's end its job follows sooner."""
SILENCE_SECONDS = 45.0
"""A worker that worked and has not been heard of for so long is taken for dead."""
START_SECONDS = 180.0
"""A worker that was submitted and has not been heard of for so long is taken for dead."""
START_SECONDS_PER_WORKER = 20.0
"""Added to `START_SECONDS` for each further worker of the job: they share the processors."""
FINISHED_SECONDS = 30.0
"""When all workers of a kind have ended well, the run may go on for so long at most."""
MAX_FAILURES = 5
"""So many failures of a worker, without `HEALTHY_SECONDS` of work between, end the run."""
HEALTHY_SECONDS = 300.0
_STATE_CHARACTERS = 1_000  # of what an engine says of a job
_BACKOFF_SECONDS = 2.0
_MAX_BACKOFF_SECONDS = 60.0

Command = Callable[[str, Sequence[int], int], Sequence[str]]
"""Argument vector of the job for these workers of a kind, with this number of submission."""


class WorkersFailedError(Exception):
    """A worker died again and again; the message says how, and where its log is."""


@dataclasses.dataclass(eq=False)
class _Job:
    """A process that runs workers of one kind.

    Attributes:
      process: leads a session of its own, which its workers are in too.
      kind: what the workers are.
      number: of the submission.
      workers: numbers of those it is relied upon for.
      submitted: when.
      start_seconds: a worker must have been heard of so long after.
      state_file: what the engine says of the job, if it says anything.
      told: what it said last.
      heard: by number, each worker's last heartbeat and when it came.
      lost: numbers of those given up, while others of the job work on.
      gone_since: by number, when a worker's process was first seen to be gone.
    """

    process: SupervisedProcess
    kind: str
    number: int
    workers: set[int]
    submitted: float
    start_seconds: float
    state_file: pathlib.Path
    told: str = ''
    heard: dict[int, tuple[Heartbeat, float]] = dataclasses.field(default_factory=dict)
    lost: set[int] = dataclasses.field(default_factory=set)
    gone_since: dict[int, float] = dataclasses.field(default_factory=dict)

    def death_of(self, number: int, now: float) -> str:
        """How a worker died; empty: its process runs, or is not known, or may just have ended."""
        beat, _ = self.heard.get(number, (None, 0.0))
        if beat is None or self._has(beat.pid):
            self.gone_since.pop(number, None)
            return ''
        gone = now - self.gone_since.setdefault(number, now) >= GONE_SECONDS
        return f'died (process {beat.pid})' if gone else ''

    def silence_of(self, number: int, now: float) -> str:
        """How a worker is silent; empty: it is not."""
        if number not in self.heard:
            waited = now - self.submitted
            late = waited > self.start_seconds
            return f'was not heard of for {waited:.0f} s after its start' if late else ''
        silent = now - self.heard[number][1]
        return f'has not been heard of for {silent:.0f} s' if silent > SILENCE_SECONDS else ''

    def kill_lost(self) -> None:
        """Kills the workers given up: two of one must not work side by side.

        They may hang, or start at last, rather than be dead.
        """
        for number in self.lost & self.heard.keys():
            beat, _ = self.heard[number]
            # Ids told by telemetry may be out of date: a process of this job only.
            if self.process.poll() is None and self._has(beat.pid):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(beat.pid, signal.SIGKILL)

    def _has(self, pid: int) -> bool:
        """Whether there is such a process in this job's session."""
        try:
            return os.getsid(pid) == self.process.pid
        except ProcessLookupError:
            return False


@dataclasses.dataclass
class _History:
    """How a worker fared: failures in a row and when it may be submitted again."""

    failures: int = 0
    due: float | None = None


class Jobs:
    """Submits a run's workers and keeps all of them at work until the budget is reached."""

    def __init__(
        self,
        config: ExperimentConfig,
        launch: Launch,
        addresses: Addresses,
        directory: RunDirectory,
        first_submission: int = 0,
        command: Command | None = None,
    ):
        """Submits nothing yet.

        Args:
          config, launch, addresses, directory: of the run.
          first_submission: number of the first job; those of a resumed run were used before.
          command: how to start a job; None: as `python -m pipelines.job`.
        """
        self._config = config
        self._launch = launch
        self._addresses = addresses
        self._directory = directory
        # A launcher that died has submitted jobs after its last checkpoint.
        self.submissions = max(first_submission, _first_unused(directory.logs))
        self._name = uuid.uuid4().hex[:6]
        self._command = command or self._beam_command
        self._jobs: list[_Job] = []
        self._history: dict[Worker, _History] = {}
        self._finished: dict[Worker, _Job] = {}
        self._finished_since: dict[str, float] = {}
        self._own = 0.0  # the launcher's own clock, as of the last look
        self._news: list[str] = []
        self.restarts: dict[str, int] = {}
        self.failures = 0  # of workers, restarted since or not

    def start(self, now: float) -> None:
        """Submits every worker of the topology."""
        for kind, count in self._config.run.workers.items():
            self._submit(kind, range(count), now)

    def hear(self, heartbeats: Iterable[Heartbeat], now: float) -> None:
        """Takes heartbeats that have just come, in order."""
        jobs = {(job.kind, job.number): job for job in self._jobs}
        for beat in heartbeats:
            job = jobs.get((beat.component, beat.submission))
            if job is not None:
                job.heard[beat.worker] = (beat, now)

    def supervise(self, now: float, own: float | None = None) -> None:
        """Submits again the workers that died.

        Args:
          now: by a clock that stands still while workers could not be heard, or had to wait for a
            server in silence: by it they are silent.
          own: by one that stands still with this process alone: by it processes are gone and
            back-offs end; None: the same.

        Raises:
          WorkersFailedError: one died `MAX_FAILURES` times without minutes of work between.
        """
        self._own = now if own is None else own
        for job in list(self._jobs):
            code = job.process.poll()
            if code is not None:
                self._ended(job, code)
            elif self._launch.engine.launcher_restarts_workers:
                self._watch(job, now)
        self._recall_finished(now)
        self._submit_due(now)

    def _submit_due(self, now: float) -> None:
        """Submits those whose back-off is over, all of a kind as one job."""
        due: dict[str, list[int]] = {}
        for (kind, number), history in self._history.items():
            if history.due is not None and history.due <= self._own:
                history.due = None
                due.setdefault(kind, []).append(number)
        for kind, numbers in due.items():
            self.restarts[kind] = self.restarts.get(kind, 0) + len(numbers)
            self._submit(kind, numbers, now)

    def news(self) -> list[str]:
        """How workers failed and what engines say of jobs, as far as it is new."""
        news, self._news = self._news, []
        for job in self._jobs:
            try:
                with job.state_file.open(errors='replace') as file:
                    state = file.read(_STATE_CHARACTERS)
            except OSError:
                continue
            if state != job.told:
                job.told = state
                news.append(f'{job.process.spec.name}: {state}')
        return news

    @property
    def running(self) -> bool:
        """Whether any job's process still runs."""
        return any(job.process.poll() is None for job in self._jobs)

    def end_stranded(self, now: float, own: float | None = None) -> None:
        """Ends jobs that wait in vain for a worker, once none of theirs works on.

        For a run that is over, instead of `supervise`: such a job never ends by itself, and a
        worker that was not heard of yet has done nothing that could be lost. Clocks as there.
        """
        self._own = now if own is None else own
        for job in list(self._jobs):
            if not self._launch.engine.launcher_restarts_workers or job.process.poll() is not None:
                continue
            ended = {number for number, (beat, _) in job.heard.items() if beat.ended}
            left = job.workers - ended
            vain = [n for n in left if n not in job.heard or self._fault_of(job, n, now)]
            if len(vain) == len(left) and (left or job.lost - ended):
                job.process.terminate(self._launch.engine.end_seconds)
                self._jobs.remove(job)

    def stop(self) -> None:
        """Ends the jobs, and with them the workers."""
        for job in self._jobs:
            job.process.signal(signal.SIGTERM)  # all at once, so that the graces do not add up
        for job in self._jobs:
            job.process.terminate(self._launch.engine.end_seconds)
        self._jobs.clear()

    def _ended(self, job: _Job, code: int) -> None:
        """Takes note of a job's end; a good one means that its workers saw the run's end."""
        self._jobs.remove(job)
        if code:
            self._failed(job.workers, job, describe_exit(code))
        else:
            self._finished.update({(job.kind, number): job for number in job.workers})

    def _watch(self, job: _Job, now: float) -> None:
        """Gives up those workers of a running job that are dead or silent, and ends them."""
        for number in sorted(job.workers):
            how = self._fault_of(job, number, now)
            if how:
                self._give_up([number], job, how)
                # A worker elsewhere cannot be killed alone.
                if not self._launch.engine.runs_locally and job.workers:
                    self._give_up(sorted(job.workers), job, 'ended with it')
                    break
        job.kill_lost()
        if not job.workers:
            job.process.terminate(self._launch.engine.end_seconds)
            self._jobs.remove(job)

    def _fault_of(self, job: _Job, number: int, now: float) -> str:
        """How a worker of a running job is dead or silent; empty: it is neither."""
        dead = job.death_of(number, self._own) if self._launch.engine.runs_locally else ''
        return dead or job.silence_of(number, now)

    def _give_up(self, numbers: Sequence[int], job: _Job, how: str) -> None:
        """No longer relies on the job for these workers."""
        self._failed(numbers, job, how)
        job.workers.difference_update(numbers)
        job.lost.update(numbers)

    def _recall_finished(self, now: float) -> None:
        """Counts it as a failure when all workers of a kind ended well but the run goes on."""
        for kind, count in self._config.run.workers.items():
            workers = [(kind, number) for number in range(count)]
            if not all(worker in self._finished for worker in workers):
                self._finished_since.pop(kind, None)
                continue
            if now - self._finished_since.setdefault(kind, now) <= FINISHED_SECONDS:
                continue
            for worker in workers:
                job = self._finished.pop(worker)
                self._failed([worker[1]], job, 'ended before the run did')

    def _failed(self, numbers: Collection[int], job: _Job, how: str) -> None:
        """Counts a failure of each of these workers and says when to submit it again."""
        failures = {number: self._count_failure(number, job) for number in sorted(numbers)}
        self.failures += len(failures)
        given_up = [number for number, count in failures.items() if count >= MAX_FAILURES]
        if given_up:
            raise WorkersFailedError(
                f'{_names(job.kind, given_up)} failed {MAX_FAILURES} times in a row,'
                f' the last time it {how}; {job.process.describe_failure()}'
            )
        error = job.process.last_error()
        self._news.append(
            f'{_names(job.kind, failures)} {how}{error and f" ({error})"}, failure'
            f' {max(failures.values())} in a row, {MAX_FAILURES} end the run; log:'
            f' {job.process.spec.log_file}'
        )

    def _count_failure(self, number: int, job: _Job) -> int:
        """Plans a worker's next submission; returns how often it has failed in a row."""
        history = self._history.setdefault((job.kind, number), _History())
        _, heard = job.heard.get(number, (None, job.submitted))
        if heard - job.submitted > HEALTHY_SECONDS:
            history.failures = 0
        history.failures += 1
        delay = back_off_seconds(history.failures, _BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS)
        history.due = self._own + delay
        return history.failures

    def _submit(self, kind: str, workers: Sequence[int], now: float) -> None:
        number, self.submissions = self.submissions, self.submissions + 1
        process = SupervisedProcess(
            ProcessSpec(
                name=f'the {kind} job {number}',
                argv=self._command(kind, workers, number),
                log_file=self._directory.logs / f'{kind}-{number}.log',
                environment={'TF_CPP_MIN_LOG_LEVEL': '2', 'TF_ENABLE_ONEDNN_OPTS': '1'},
                unset=('PYTHONDONTWRITEBYTECODE',),
            )
        )
        self._state_file(kind, number).unlink(missing_ok=True)  # of a job before a resumption
        process.start()
        start_seconds = START_SECONDS + START_SECONDS_PER_WORKER * (len(workers) - 1)
        state_file = self._state_file(kind, number)
        self._jobs.append(_Job(process, kind, number, set(workers), now, start_seconds, state_file))

    def _beam_command(self, kind: str, workers: Sequence[int], submission: int) -> list[str]:
        name = f'--job_name={self._job_name(kind, submission)}'
        return [
            sys.executable,
            '-m',
            'pipelines.job',
            f'--kind={kind}',
            f'--workers={",".join(map(str, workers))}',
            f'--submission={submission}',
            f'--config={self._directory.config_file.resolve()}',
            f'--parameter_addresses={",".join(self._addresses.parameters)}',
            f'--replay_addresses={",".join(self._addresses.replay)}',
            f'--telemetry_address={self._addresses.telemetry}',
            f'--state_file={self._state_file(kind, submission)}',
            *([f'--tls_roots={self._launch.tls_roots}'] * bool(self._launch.tls_roots)),
            f'--runner={self._launch.runner}',
            *self._launch.beam_flags,
            *self._launch.flags_of(kind),
            *([name] * self._launch.engine.outlives_submitter),
        ]

    def _state_file(self, kind: str, submission: int) -> pathlib.Path:
        return (self._directory.logs / f'{kind}-{submission}.state').resolve()

    def _job_name(self, kind: str, submission: int) -> str:
        """A name that engines accept and that no other job has, of this run or another."""
        flags = [*self._launch.beam_flags, *self._launch.flags_of(kind)]
        run = value_of('--job_name', flags) or f'gorila-{self._directory.path.name}'
        return re.sub('[^a-z0-9]+', '-', f'{run}-{self._name}-{kind}-{submission}'.lower())


def _names(kind: str, numbers: Iterable[int]) -> str:
    return f'{kind} {", ".join(map(str, numbers))}'


def _first_unused(logs: pathlib.Path) -> int:
    """A number above those of all jobs that have left a log."""
    numbers = (re.fullmatch(r'[a-z]+-(\d+)', log.stem) for log in logs.glob('*.log'))
    return 1 + max((int(match[1]) for match in numbers if match), default=-1)
