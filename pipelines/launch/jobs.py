"""Runs a run's Beam jobs as processes and restarts dead workers: heartbeats in, running jobs out.

All times are the launcher's own (`infra/own_time.py`); a heartbeat's is that of its arrival. Beam's
local runner does not replace a dead worker and reports it only after all other workers of the job
have ended. So the launcher detects it: the process named in the worker's telemetry is gone, or the
worker is silent. On a job server silence alone counts, since processes may be on other machines.
Other engines replace workers themselves; of their jobs only the end is checked.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import sys
import uuid
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence

from infra.disk import is_remote
from infra.flags import value_of
from infra.process import ProcessSpec, SupervisedProcess, back_off_seconds, describe_exit
from pipelines.events import Heartbeat
from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.job_settings import JobSettings
from pipelines.experiment.launch import Addresses, Launch
from pipelines.monitoring import beam_counters
from pipelines.monitoring.monitor import Worker
from pipelines.storage import provenance
from pipelines.storage.run_directory import RunDirectory

GONE_SECONDS = 5.0
"""A worker whose process is gone for this long is dead."""
SILENCE_SECONDS = 45.0
"""A worker without a heartbeat for this long counts as dead, at the least: see `_HANG_SECONDS`."""
_HANG_SECONDS = 15.0  # beyond --hang_seconds, for a worker to say where it hangs and to end
START_SECONDS = 180.0
"""A submitted worker without a first heartbeat for this long counts as dead."""
START_SECONDS_PER_WORKER = 20.0
"""Added to `START_SECONDS` for each further worker submitted with it: they share the cores."""
FINISHED_SECONDS = 30.0
"""The longest that a run may continue after all workers of a kind have ended without error."""
MAX_FAILURES = 5
"""This many failures of a worker in a row end the run."""
HEALTHY_SECONDS = 300.0
"""A worker that worked for this long starts a new series of failures."""
_STATE_CHARACTERS = 1_000  # read of an engine's report
_BACKOFF_SECONDS = 2.0
_STATISTICS = 'statistics'  # directory
_MAX_BACKOFF_SECONDS = 60.0

Command = Callable[[Sequence[Worker], int], Sequence[str]]
"""(workers, submission) -> argument vector of their job."""


class WorkersFailedError(Exception):
    """A worker failed too often in a row; the message gives the reason and the log file."""


@dataclasses.dataclass(eq=False)
class _Job:
    """A process that runs workers, of one kind or, with --one_job, of all.

    Attributes:
      process: leads a session, which includes its workers.
      name: of its files: the kinds of its workers.
      number: of the submission.
      workers: those that it still runs.
      submitted: time of the submission.
      start_seconds: time within which each worker must send its first heartbeat.
      state_file: the engine's report on the job; may not exist.
      report: the last one shown.
      heard: each worker's last heartbeat and its arrival.
      lost: workers given up while others of the job continue.
      gone_since: when a worker's process was first found gone.
    """

    process: SupervisedProcess
    name: str
    number: int
    workers: set[Worker]
    submitted: float
    start_seconds: float
    state_file: pathlib.Path
    report: str = ''
    heard: dict[Worker, tuple[Heartbeat, float]] = dataclasses.field(default_factory=dict)
    lost: set[Worker] = dataclasses.field(default_factory=set)
    gone_since: dict[Worker, float] = dataclasses.field(default_factory=dict)

    def death_of(self, worker: Worker, now: float) -> str:
        """How a worker died; empty if its process is running, unknown or only just gone."""
        beat, _ = self.heard.get(worker, (None, 0.0))
        if beat is None or self._has(beat.pid):
            self.gone_since.pop(worker, None)
            return ''
        gone = now - self.gone_since.setdefault(worker, now) >= GONE_SECONDS
        return f'died (process {beat.pid})' if gone else ''

    def silence_of(self, worker: Worker, now: float, most_seconds: float) -> str:
        """How long a worker has been silent, as text; empty if for no more than `most_seconds`."""
        if worker not in self.heard:
            waited = now - self.submitted
            late = waited > self.start_seconds
            return f'sent no heartbeat within {waited:.0f} s of its start' if late else ''
        silent = now - self.heard[worker][1]
        return f'sent no heartbeat for {silent:.0f} s' if silent > most_seconds else ''

    def kill_lost(self) -> None:
        """Kills the workers given up, which may hang or start late: a successor replaces each."""
        for worker in self.lost & self.heard.keys():
            beat, _ = self.heard[worker]
            # A process ID from telemetry may be stale: kill only processes of this job.
            if self.process.poll() is None and self._has(beat.pid):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(beat.pid, signal.SIGKILL)

    def _has(self, pid: int) -> bool:
        """Whether the process exists and belongs to this job's session."""
        try:
            return os.getsid(pid) == self.process.pid
        except ProcessLookupError:
            return False


@dataclasses.dataclass
class _History:
    """A worker's failures in a row and the time of its next submission."""

    failures: int = 0
    due: float | None = None


class Jobs:
    """Submits a run's workers and keeps all of them running until the budget is reached."""

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
          first_submission: number of the first job; a resumed run continues its numbers.
          command: builds a job's command; None: `python -m pipelines.job`.
        """
        self._config = config
        self._launch = launch
        self._addresses = addresses
        self._directory = directory
        # A launcher that died may have submitted jobs after its last checkpoint.
        self.submissions = max(first_submission, _first_unused(directory.logs))
        self._name = uuid.uuid4().hex[:6]
        self._command = command or self._beam_command
        self._jobs: list[_Job] = []
        self._history: dict[Worker, _History] = {}
        self._finished: dict[Worker, _Job] = {}
        self._finished_since: dict[str, float] = {}
        self._own = 0.0  # the launcher's own time at the last look
        self._news: list[str] = []
        self.restarts: dict[str, int] = {}
        self.failures = 0  # of workers, restarted or not
        self._unwritten: set[Worker] = set()  # whose last records may be in no table

    def start(self, now: float) -> None:
        """Submits every worker of the topology."""
        counts = self._config.run.workers
        self._submit_all([(kind, n) for kind, count in counts.items() for n in range(count)], now)

    def hear(self, heartbeats: Iterable[Heartbeat], now: float) -> None:
        """Records heartbeats that have just arrived, in order."""
        jobs = {job.number: job for job in self._jobs}
        for beat in heartbeats:
            job, worker = jobs.get(beat.submission), (beat.component, beat.worker)
            if job is not None and worker in job.workers | job.lost:
                job.heard[worker] = (beat, now)

    def supervise(self, now: float, own: float | None = None) -> None:
        """Restarts dead workers.

        Args:
          now: measures silence, by a clock that pauses while no heartbeat can arrive.
          own: measures missing processes and back-offs, by a clock that pauses only while this
            process does; None: `now`.

        Raises:
          WorkersFailedError: a worker failed `MAX_FAILURES` times in a row.
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
        """Submits the workers whose back-off is over."""
        due = []
        for worker, history in self._history.items():
            if history.due is not None and history.due <= self._own:
                history.due = None
                due.append(worker)
                self.restarts[worker[0]] = self.restarts.get(worker[0], 0) + 1
        self._submit_all(due, now)

    def _submit_all(self, workers: Iterable[Worker], now: float) -> None:
        """Submits workers: a job for each kind, or for each worker; with --one_job one for all."""
        workers = list(workers)
        groups: dict[Hashable, list[Worker]] = {}
        for worker in workers:
            own = worker if self._launch.engine.elements_in_turn else worker[0]
            groups.setdefault('' if self._launch.one_job else own, []).append(worker)
        start_seconds = START_SECONDS + START_SECONDS_PER_WORKER * (len(workers) - 1)
        for group in groups.values():
            self._submit(group, now, start_seconds)

    def news(self) -> list[str]:
        """Returns failures of workers and engines' reports since the last call."""
        news, self._news = self._news, []
        for job in self._jobs:
            try:
                with job.state_file.open(errors='replace') as file:
                    state = file.read(_STATE_CHARACTERS)
            except OSError:
                continue
            if state != job.report:
                job.report = state
                news.append(f'{job.process.spec.name}: {state}')
        return news

    @property
    def running(self) -> list[str]:
        """The name of each job whose process is running."""
        return [job.name for job in self._jobs if job.process.poll() is None]

    def end_stranded(self, now: float, own: float | None = None) -> None:
        """Ends jobs that only wait for dead, silent or unstarted workers.

        Replaces `supervise` at a run's end: such a job never ends by itself, and a worker without
        a first heartbeat has done nothing that could be lost. Arguments as in `supervise`.
        """
        self._own = now if own is None else own
        for job in list(self._jobs):
            if not self._launch.engine.launcher_restarts_workers or job.process.poll() is not None:
                continue
            ended = {worker for worker, (beat, _) in job.heard.items() if beat.ended}
            left = job.workers - ended
            vain = [w for w in left if w not in job.heard or self._fault_of(job, w, now)]
            if len(vain) == len(left) and (left or job.lost - ended):
                self._unwritten |= job.workers & job.heard.keys()
                job.process.terminate(self._launch.engine.end_seconds)
                self._jobs.remove(job)

    @property
    def unwritten(self) -> frozenset[Worker]:
        """Workers whose last records may be in no table: their last job did not end by itself."""
        settings = self._settings
        tables = settings.statistics_dir is not None or settings.statistics_sink is not None
        return frozenset(self._unwritten if tables else ())

    def submit_unwritten(self, now: float) -> None:
        """Submits these workers again at the run's end: they hand on what is on record, and end."""
        self._submit_all(sorted(self.unwritten), now)

    def stop(self) -> None:
        """Ends the jobs and their workers."""
        for job in self._jobs:
            self._note_end(job, job.process.poll())
            job.process.signal(signal.SIGTERM)  # all at once, so that grace periods overlap
        for job in self._jobs:
            job.process.terminate(self._launch.engine.end_seconds)
        self._jobs.clear()

    def _ended(self, job: _Job, code: int) -> None:
        """Records a job's end; without an error its workers saw the run's end."""
        self._jobs.remove(job)
        self._note_end(job, code)
        if code:
            self._failed(job.workers, job, describe_exit(code))
        else:
            self._finished.update(dict.fromkeys(job.workers, job))

    def _note_end(self, job: _Job, code: int | None) -> None:
        """Notes whether the records of a job's workers are written.

        They are if the job has ended by itself, and if an engine that drains a job has them all.
        """
        drains = self._launch.engine.outlives_submitter and self._launch.engine.continues_elements
        written = {
            worker
            for worker in job.workers
            if code == 0 or (drains and worker in job.heard and job.heard[worker][0].ended)
        }
        self._unwritten -= written
        self._unwritten |= (job.workers - written) & job.heard.keys()

    def _watch(self, job: _Job, now: float) -> None:
        """Gives up and kills the dead or silent workers of a running job."""
        for worker in sorted(job.workers):
            how = self._fault_of(job, worker, now)
            if how:
                self._give_up([worker], job, how)
                # A worker elsewhere cannot be killed alone.
                if not self._launch.engine.runs_locally and job.workers:
                    self._give_up(sorted(job.workers), job, 'ended with it')
                    break
        job.kill_lost()
        if not job.workers:
            job.process.terminate(self._launch.engine.end_seconds)
            self._jobs.remove(job)

    def _fault_of(self, job: _Job, worker: Worker, now: float) -> str:
        """How a worker of a running job failed; empty if it is neither dead nor silent."""
        dead = job.death_of(worker, self._own) if self._launch.engine.runs_locally else ''
        most = max(SILENCE_SECONDS, self._launch.jobs.hang_seconds + _HANG_SECONDS)
        return dead or job.silence_of(worker, now, most)

    def _give_up(self, workers: Sequence[Worker], job: _Job, how: str) -> None:
        self._failed(workers, job, how)
        self._unwritten.update(workers)
        job.workers.difference_update(workers)
        job.lost.update(workers)

    def _recall_finished(self, now: float) -> None:
        """Counts a failure when all workers of a kind ended without error before the run."""
        for kind, count in self._config.run.workers.items():
            workers = [(kind, number) for number in range(count)]
            if not all(worker in self._finished for worker in workers):
                self._finished_since.pop(kind, None)
                continue
            if now - self._finished_since.setdefault(kind, now) <= FINISHED_SECONDS:
                continue
            for worker in workers:
                job = self._finished.pop(worker)
                self._failed([worker], job, 'ended before the run did')

    def _failed(self, workers: Collection[Worker], job: _Job, how: str) -> None:
        """Counts a failure of each of these workers and plans its next submission."""
        failures = {worker: self._count_failure(worker, job) for worker in sorted(workers)}
        self.failures += len(failures)
        given_up = [worker for worker, count in failures.items() if count >= MAX_FAILURES]
        if given_up:
            raise WorkersFailedError(
                f'{_names(given_up)}: failed {MAX_FAILURES} times in a row (last: {how});'
                f' {job.process.describe_failure()}'
            )
        error = job.process.last_error()
        self._news.append(
            f'{_names(failures)}: {how}{error and f" ({error})"}, failure'
            f' {max(failures.values())} in a row ({MAX_FAILURES} end the run); log:'
            f' {job.process.spec.log_file}'
        )

    def _count_failure(self, worker: Worker, job: _Job) -> int:
        """Plans a worker's next submission; returns its failures in a row."""
        history = self._history.setdefault(worker, _History())
        _, heard = job.heard.get(worker, (None, job.submitted))
        if heard - job.submitted > HEALTHY_SECONDS:
            history.failures = 0
        history.failures += 1
        delay = back_off_seconds(history.failures, _BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS)
        history.due = self._own + delay
        return history.failures

    def _submit(self, workers: Sequence[Worker], now: float, start_seconds: float) -> None:
        number, self.submissions = self.submissions, self.submissions + 1
        name = _name(workers)
        process = SupervisedProcess(
            ProcessSpec(
                name=f'{name} job {number}',
                argv=self._command(workers, number),
                log_file=self._directory.logs / f'{name}-{number}.log',
                environment={
                    'TF_CPP_MIN_LOG_LEVEL': '2',
                    'TF_ENABLE_ONEDNN_OPTS': os.environ.get('TF_ENABLE_ONEDNN_OPTS', '1'),
                },
                unset=('PYTHONDONTWRITEBYTECODE',),
            )
        )
        state_file = self._file(name, number, 'state')
        state_file.unlink(missing_ok=True)  # may remain from before a resumption
        process.start()
        self._jobs.append(_Job(process, name, number, set(workers), now, start_seconds, state_file))

    def _beam_command(self, workers: Sequence[Worker], submission: int) -> list[str]:
        name, kinds = _name(workers), dict.fromkeys(kind for kind, _ in workers)
        job_name = f'--job_name={self._job_name(workers, submission)}'
        return [
            sys.executable,
            '-m',
            'pipelines.job',
            *(f'--{kind}s={",".join(map(str, _numbers(workers, kind)))}' for kind in kinds),
            f'--submission={submission}',
            f'--config={self._directory.config_file.resolve()}',
            f'--parameter_addresses={",".join(self._addresses.parameters)}',
            f'--replay_addresses={",".join(self._addresses.replay)}',
            f'--telemetry_address={self._addresses.telemetry}',
            f'--state_file={self._file(name, submission, "state")}',
            f'--metrics_file={self._file(name, submission, beam_counters.SUFFIX)}',
            *self._settings.flags(),
            *([f'--tls_roots={self._launch.tls_roots}'] * bool(self._launch.tls_roots)),
            f'--runner={self._launch.runner}',
            *self._launch.beam_flags,
            *self._launch.flags_of(workers[0][0]),
            *([job_name] * self._launch.engine.outlives_submitter),
        ]

    @property
    def _settings(self) -> JobSettings:
        """The settings of jobs, with the place of their statistics."""
        settings, launch = self._launch.jobs, self._launch
        if settings.statistics_dir is not None:
            return settings
        place = None
        if is_remote(launch.run_dir or ''):
            place = f'{launch.run_dir}/{_STATISTICS}'
        elif launch.engine.runs_locally:
            place = str((self._directory.path / _STATISTICS).resolve())
        elif (shared := value_of('--temp_location', launch.beam_flags)) is not None:
            run = f'{self._directory.path.name}-{provenance.run_id(self._directory.launches_file)}'
            place = f'{shared}/gorila-{run}/{_STATISTICS}'
        return dataclasses.replace(settings, statistics_dir=place)

    def _file(self, name: str, submission: int, suffix: str) -> pathlib.Path:
        return (self._directory.logs / f'{name}-{submission}.{suffix}').resolve()

    def _job_name(self, workers: Sequence[Worker], submission: int) -> str:
        """A name that engines accept, unique among the jobs of all runs."""
        flags = [*self._launch.beam_flags, *self._launch.flags_of(workers[0][0])]
        run = value_of('--job_name', flags) or f'gorila-{self._directory.path.name}'
        name = f'{run}-{self._name}-{_name(workers)}-{submission}'
        return re.sub('[^a-z0-9]+', '-', name.lower())


def _name(workers: Iterable[Worker]) -> str:
    """The kinds of these workers: 'actor', 'learner', 'bundle' or 'actor-learner'."""
    return '-'.join(dict.fromkeys(kind for kind, _ in workers))


def _numbers(workers: Iterable[Worker], kind: str) -> list[int]:
    return [number for each, number in workers if each == kind]


def _names(workers: Collection[Worker]) -> str:
    """Kinds and numbers as text, such as 'actor 0, 2 and learner 1'."""
    kinds = dict.fromkeys(kind for kind, _ in workers)
    return ' and '.join(f'{kind} {", ".join(map(str, _numbers(workers, kind)))}' for kind in kinds)


def _first_unused(logs: pathlib.Path) -> int:
    """The number above those of all jobs that have a log."""
    numbers = (re.fullmatch(r'[a-z-]+-(\d+)', log.stem) for log in logs.glob('*.log'))
    return 1 + max((int(match[1]) for match in numbers if match), default=-1)
