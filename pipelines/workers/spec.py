"""Which workers a job has: the elements of its pipeline."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class WorkerSpec:
    """One element of a job: a worker and the most segments it may ever need.

    Attributes:
      worker: number of the actor, learner or bundle, from 0.
      submission: number of the submission it came with: a worker that replaces a dead one must
        not play the same games again. Nor must one that the engine itself replaces, with the same
        submission: the parameter server tells it how often it was begun before.
      segments: upper bound; the run's global budget usually ends the worker sooner.
    """

    worker: int
    submission: int
    segments: int

    @property
    def name(self) -> str:
        """What the parameter server knows it by."""
        return f'{self.worker} of submission {self.submission}'


@dataclasses.dataclass(frozen=True)
class Submission:
    """The workers of one job.

    Attributes:
      workers: their numbers.
      number: how many jobs of the run were submitted before this one, over all resumptions.
    """

    workers: tuple[int, ...]
    number: int

    def specs(self, segments: int) -> list[WorkerSpec]:
        """The job's elements, each with at most `segments` segments."""
        return [WorkerSpec(worker, self.number, segments) for worker in self.workers]
