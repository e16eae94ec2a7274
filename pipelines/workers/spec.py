"""The workers of a job, which are the elements of its pipeline."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class WorkerSpec:
    """One element of a job: a worker.

    Attributes:
      worker: number of the actor, learner or bundle, from 0.
      submission: number of its job; a restarted worker must not replay its predecessor's games. If
        the engine restarts it within a job, the parameter server's count distinguishes the two.
    """

    worker: int
    submission: int

    @property
    def name(self) -> str:
        """Its name at the parameter server."""
        return f'{self.worker} of submission {self.submission}'


@dataclasses.dataclass(frozen=True)
class Submission:
    """The workers of one job.

    Attributes:
      workers: their numbers.
      number: of the job, counted over all resumptions of the run.
    """

    workers: tuple[int, ...]
    number: int

    def specs(self) -> list[WorkerSpec]:
        """The job's elements."""
        return [WorkerSpec(worker, self.number) for worker in self.workers]
