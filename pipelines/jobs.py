"""The Beam jobs of a run, each a process; a worker that falls silent is submitted again.

In: which workers a run needs, and when each was last heard of. Out: running jobs. Beam's local
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
from collections.abc import Callable, Mapping, Sequence

from infra.flags import value_of
from infra.process import ProcessSpec, SupervisedProcess, describe_exit
from pipelines.config import ExperimentConfig
from pipelines.monitor import Heartbeat, Worker
from pipelines.options import Launch
from pipelines.run_directory import RunDirectory
from pipelines.workers import Addresses

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
      workers: numbers of those it is relied upon for.
      submitted: when, seconds since the epoch.
      start_seconds: a worker must have been heard of so long after.
      state_file: what the engine says of the job, if it says anything.
      told: what it said last.
      lost: numbers of those given up, while others of the job work on.
      gone_since: by number, when a worker's process was first seen to be gone.
    """

    process: SupervisedProcess
    kind: str
    workers: set[int]
    submitted: float
    start_seconds: float
    state_file: pathlib.Path
    told: str = ''
    lost: set[int] = dataclasses.field(default_factory=set)
    gone_since: dict[int, float] = dataclasses.field(default_factory=dict)

    def beat_of(self, number: int, heartbeats: Mapping[Worker, Heartbeat]) -> Heartbeat | None:
        """The last heartbeat of its worker; None: only a predecessor was heard of, or nobody."""
        beat = heartbeats.get((self.kind, number))
        return None if beat is None or beat.time < self.submitted else beat

    def death_of(self, number: int, beat: Heartbeat | None, now: float) -> str:
        """How a worker died; empty: its process runs, or is not known, or may just have ended."""
        if beat is None or self._has(beat.pid):
            self.gone_since.pop(number, None)
            return ''
        gone = now - self.gone_since.setdefault(number, now) >= GONE_SECONDS
        return f'died (process {beat.pid})' if gone else ''

    def kill(self, pid: int) -> None:
        """Kills a process when it is of this job; ids told by telemetry may be out of date."""
        if self.process.poll() is None and self._has(pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

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
        self.restarts: dict[str, int] = {}

    def start(self, now: float) -> None:
        """Submits every worker of the topology."""
        for kind, count in self._config.run.workers.items():
            self._submit(kind, range(count), now)

    def supervise(
        self, heartbeats: Mapping[Worker, Heartbeat], now: float, *, deaf_until: float = 0.0
    ) -> None:
        """Submits again the workers that died.

        Args:
          heartbeats: each worker's last sign of life.
          now: seconds since the epoch.
          deaf_until: the last moment at which nobody could be heard (seconds since the epoch), as
            while the replay shard that hands on the telemetry restarts or checkpoints.

        Raises:
          WorkersFailedError: one died `MAX_FAILURES` times without minutes of work between.
        """
        for job in list(self._jobs):
            code = job.process.poll()
            if code is not None:
                self._ended(job, code, heartbeats, now)
            elif self._launch.engine.watched:
                self._watch(job, heartbeats, now, deaf_until)
        self._recall_finished(now, deaf_until)
        self._submit_due(now)

    def _submit_due(self, now: float) -> None:
        """Submits those whose back-off is over, all of a kind as one job."""
        due: dict[str, list[int]] = {}
        for (kind, number), history in self._history.items():
            if history.due is not None and history.due <= now:
                history.due = None
                due.setdefault(kind, []).append(number)
        for kind, numbers in due.items():
            self.restarts[kind] = self.restarts.get(kind, 0) + len(numbers)
            self._submit(kind, numbers, now)

    def news(self) -> list[str]:
        """What engines say of jobs, as far as it is new."""
        news = []
        for job in self._jobs:
            try:
                state = job.state_file.read_text()
            except FileNotFoundError:
                continue
            if state != job.told:
                job.told = state
                news.append(f'{job.process.spec.name}: {state}')
        return news

    @property
    def running(self) -> bool:
        """Whether any job's process still runs."""
        return any(job.process.poll() is None for job in self._jobs)

    def stop(self) -> None:
        """Ends the jobs, and with them the workers."""
        for job in self._jobs:
            job.process.signal(signal.SIGTERM)  # all at once, so that the graces do not add up
        for job in self._jobs:
            job.process.terminate(self._launch.engine.end_seconds)
        self._jobs.clear()

    def _ended(
        self, job: _Job, code: int, heartbeats: Mapping[Worker, Heartbeat], now: float
    ) -> None:
        """Takes note of a job's end; a good one means that its workers saw the run's end."""
        self._jobs.remove(job)
        for number in sorted(job.workers):
            if code == 0:
                self._finished[job.kind, number] = job
            else:
                self._failed(number, job, job.beat_of(number, heartbeats), describe_exit(code), now)

    def _watch(
        self, job: _Job, heartbeats: Mapping[Worker, Heartbeat], now: float, deaf_until: float
    ) -> None:
        """Gives up those workers of a running job that are dead or silent, and ends them."""
        for number in sorted(job.workers):
            beat = job.beat_of(number, heartbeats)
            how = job.death_of(number, beat, now) if self._launch.engine.here else ''
            how = how or _silence(job, beat, now, deaf_until)
            if how:
                self._give_up([number], job, heartbeats, how, now)
                if not self._launch.engine.here:  # it cannot be killed alone
                    self._give_up(sorted(job.workers), job, heartbeats, 'ended with it', now)
        # They may hang, or start at last, rather than be dead: two of one must not work side by
        # side.
        for number in job.lost:
            beat = job.beat_of(number, heartbeats)
            if beat is not None:
                job.kill(beat.pid)
        if not job.workers:
            job.process.terminate(self._launch.engine.end_seconds)
            self._jobs.remove(job)

    def _give_up(
        self,
        numbers: Sequence[int],
        job: _Job,
        heartbeats: Mapping[Worker, Heartbeat],
        how: str,
        now: float,
    ) -> None:
        """No longer relies on the job for these workers."""
        for number in numbers:
            self._failed(number, job, job.beat_of(number, heartbeats), how, now)
            job.workers.discard(number)
            job.lost.add(number)

    def _recall_finished(self, now: float, deaf_until: float) -> None:
        """Counts it as a failure when all workers of a kind ended well but the run goes on."""
        for kind, count in self._config.run.workers.items():
            workers = [(kind, number) for number in range(count)]
            if not all(worker in self._finished for worker in workers):
                self._finished_since.pop(kind, None)
                continue
            since = self._finished_since.setdefault(kind, now)
            if now - max(since, deaf_until) <= FINISHED_SECONDS:
                continue
            for worker in workers:
                job = self._finished.pop(worker)
                self._failed(worker[1], job, None, 'ended before the run did', now)

    def _failed(self, number: int, job: _Job, beat: Heartbeat | None, how: str, now: float) -> None:
        """Counts a worker's failure and says when to submit it again."""
        history = self._history.setdefault((job.kind, number), _History())
        if beat is not None and beat.time - job.submitted > HEALTHY_SECONDS:
            history.failures = 0
        history.failures += 1
        if history.failures >= MAX_FAILURES:
            raise WorkersFailedError(
                f'{job.kind} {number} failed {history.failures} times in a row,'
                f' the last time it {how}; {job.process.describe_failure()}'
            )
        backoff = _BACKOFF_SECONDS * 2 ** (history.failures - 1)
        history.due = now + min(backoff, _MAX_BACKOFF_SECONDS)

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
        self._jobs.append(_Job(process, kind, set(workers), now, start_seconds, state_file))

    def _beam_command(self, kind: str, workers: Sequence[int], submission: int) -> list[str]:
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
            *([f'--job_name={self._job_name(kind, submission)}'] * self._launch.engine.outlives),
        ]

    def _state_file(self, kind: str, submission: int) -> pathlib.Path:
        return (self._directory.logs / f'{kind}-{submission}.state').resolve()

    def _job_name(self, kind: str, submission: int) -> str:
        """A name that engines accept and that no other job has, of this run or another."""
        flags = [*self._launch.beam_flags, *self._launch.flags_of(kind)]
        run = value_of('--job_name', flags) or f'gorila-{self._directory.path.name}'
        return re.sub('[^a-z0-9]+', '-', f'{run}-{self._name}-{kind}-{submission}'.lower())


def _first_unused(logs: pathlib.Path) -> int:
    """A number above those of all jobs that have left a log."""
    numbers = (re.fullmatch(r'[a-z]+-(\d+)', log.stem) for log in logs.glob('*.log'))
    return 1 + max((int(match[1]) for match in numbers if match), default=-1)


def _silence(job: _Job, beat: Heartbeat | None, now: float, deaf_until: float) -> str:
    """How a worker of a running job is silent; empty: it is not, or may merely not be heard."""
    if now - deaf_until <= SILENCE_SECONDS:
        return ''
    if beat is None and now - job.submitted > job.start_seconds:
        return f'was not heard of for {now - job.submitted:.0f} s after its start'
    if beat is not None and now - beat.time > SILENCE_SECONDS:
        return f'has not been heard of for {now - beat.time:.0f} s'
    return ''
