"""The Beam jobs of a run, each a process; a worker that falls silent is submitted again.

In: which workers a run needs, and when each was last heard of. Out: running jobs. Beam's local
runner does not replace a dead worker and reports it only when all its other workers have ended, so
the launcher notices by the silence of the worker's telemetry.
"""

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Mapping

from infra.process import ProcessSpec, SupervisedProcess
from pipelines.config import ExperimentConfig
from pipelines.monitor import Heartbeat, Worker
from pipelines.options import Launch
from pipelines.run_directory import RunDirectory
from pipelines.workers import Addresses

SILENCE_SECONDS = 45.0
"""A worker that worked and has not been heard of for so long is taken for dead."""
START_SECONDS = 180.0
"""A worker that was submitted and has not been heard of for so long is taken for dead."""
_BACKOFF_SECONDS = 2.0
_MAX_BACKOFF_SECONDS = 60.0
_MAX_FAILURES = 5
_HEALTHY_SECONDS = 300.0


class WorkersFailedError(Exception):
    """A worker died again and again; the message says how, and where its log is."""


@dataclasses.dataclass
class _Job:
    process: SupervisedProcess
    kind: str
    workers: set[int]
    submitted: float


@dataclasses.dataclass
class _History:
    """How a worker fared: failures in a row and when it may be submitted again."""

    failures: int = 0
    due: float | None = None
    last_failure: float = 0.0


class Jobs:
    """Submits a run's workers and keeps all of them at work until the budget is reached."""

    def __init__(
        self,
        config: ExperimentConfig,
        launch: Launch,
        addresses: Addresses,
        directory: RunDirectory,
        first_submission: int = 0,
    ):
        self._config = config
        self._launch = launch
        self._addresses = addresses
        self._directory = directory
        self.submissions = first_submission
        self._jobs: list[_Job] = []
        self._history: dict[Worker, _History] = {}
        self.restarts: dict[str, int] = {}

    def start(self, now: float) -> None:
        """Submits every worker of the topology."""
        run = self._config.run
        if run.topology == 'bundled':
            counts = {'bundle': run.num_actors}
        else:
            counts = {'actor': run.num_actors, 'learner': run.num_learners}
        for kind, count in counts.items():
            self._submit(kind, set(range(count)), now)

    def supervise(self, heartbeats: Mapping[Worker, Heartbeat], now: float) -> None:
        """Submits again the workers that died.

        Raises:
          WorkersFailedError: one died `_MAX_FAILURES` times without minutes of work between.
        """
        for job in list(self._jobs):
            ended = job.process.poll() is not None
            for number in list(job.workers):
                beat = heartbeats.get((job.kind, number))
                if ended or self._is_silent(job, beat, now):
                    job.workers.discard(number)
                    self._failed((job.kind, number), job, beat, now)
            if ended:
                self._jobs.remove(job)
        due = [
            worker
            for worker, history in self._history.items()
            if history.due is not None and history.due <= now
        ]
        for kind, number in due:
            self._history[kind, number].due = None
            self.restarts[kind] = self.restarts.get(kind, 0) + 1
            self._submit(kind, {number}, now)

    @property
    def running(self) -> bool:
        """Whether any job's process still runs."""
        return any(job.process.poll() is None for job in self._jobs)

    def stop(self, grace_seconds: float = 5.0) -> None:
        """Ends the jobs' processes, and with them the workers."""
        for job in self._jobs:
            job.process.terminate(grace_seconds)
        self._jobs.clear()

    @staticmethod
    def _is_silent(job: _Job, beat: Heartbeat | None, now: float) -> bool:
        if beat is None or beat.time < job.submitted:
            return now - job.submitted > START_SECONDS
        return now - beat.time > SILENCE_SECONDS

    def _failed(self, worker: Worker, job: _Job, beat: Heartbeat | None, now: float) -> None:
        history = self._history.setdefault(worker, _History())
        if now - history.last_failure > _HEALTHY_SECONDS:
            history.failures = 0
        history.failures += 1
        history.last_failure = now
        if history.failures > _MAX_FAILURES:
            raise WorkersFailedError(
                f'{worker[0]} {worker[1]} failed {history.failures} times in a row;'
                f' {job.process.describe_failure()}'
            )
        if beat is not None and beat.time >= job.submitted:
            # It may hang rather than be dead: two of it must not work side by side.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(beat.pid, signal.SIGKILL)
        backoff = _BACKOFF_SECONDS * 2 ** (history.failures - 1)
        history.due = now + min(backoff, _MAX_BACKOFF_SECONDS)

    def _submit(self, kind: str, workers: set[int], now: float) -> None:
        number, self.submissions = self.submissions, self.submissions + 1
        argv = [
            sys.executable,
            '-m',
            'pipelines.job',
            f'--kind={kind}',
            f'--workers={",".join(map(str, sorted(workers)))}',
            f'--submission={number}',
            f'--config={self._directory.config_file.resolve()}',
            f'--parameter_addresses={",".join(self._addresses.parameters)}',
            f'--replay_addresses={",".join(self._addresses.replay)}',
            f'--telemetry_address={self._addresses.telemetry}',
            f'--runner={self._launch.runner}',
            *self._launch.beam_flags,
        ]
        process = SupervisedProcess(
            ProcessSpec(
                name=f'the {kind} job {number}',
                argv=argv,
                log_file=self._directory.logs / f'{kind}-{number}.log',
                environment={'TF_CPP_MIN_LOG_LEVEL': '2', 'TF_ENABLE_ONEDNN_OPTS': '1'},
                unset=('PYTHONDONTWRITEBYTECODE',),
            )
        )
        process.start()
        self._jobs.append(_Job(process, kind, set(workers), now))
