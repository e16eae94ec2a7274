"""Workers of one kind: worker numbers in, work on the servers and segments out."""

import functools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import apache_beam as beam
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Timestamp

from pipelines.experiment.config import ExperimentConfig
from pipelines.experiment.job_settings import JobSettings
from pipelines.experiment.launch import Addresses
from pipelines.transforms.metrics import WorkerMetrics
from pipelines.transforms.restriction import PREPARATION, PolledSegments, Segments, is_empty
from pipelines.workers import hangs
from pipelines.workers.boxes import OpenWorker
from pipelines.workers.open_workers import OPEN_WORKERS
from pipelines.workers.process import prepare_process
from pipelines.workers.segment import Segment
from pipelines.workers.spec import Submission, WorkerSpec

beam.coders.registry.register_coder(Segment, beam.coders.RowCoder)

_MOST_PERIODS = 2  # that an actor waits for the end of a game


class Work:
    """What the workers of one kind do.

    Attributes:
      kind: 'actor', 'learner' or 'bundle'.
      acts: whether it plays games.
      learns: whether it computes gradients.
    """

    kind = ''
    acts = True
    learns = True

    def __init__(
        self, config: ExperimentConfig, addresses: Addresses, beside_learners: bool = False
    ):
        """`beside_learners`: whether learners may share its process, and need an accelerator."""
        self._config = config
        self._beside_learners = beside_learners
        self.addresses = addresses

    def open(self, spec: WorkerSpec) -> AbstractContextManager[OpenWorker]:
        """Opens a worker."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Prepares the process, before TensorFlow is used."""
        prepare_process(self._config, self.learns or self._beside_learners)


class Run(beam.DoFn):
    """Runs a worker until the run's budget is reached; yields its segments as they end."""

    def __init__(self, work: Work, hang_seconds: float, period_seconds: float = float('inf')):
        """`period_seconds`: after which the element checkpoints itself."""
        self._work = work
        self._hang_seconds = hang_seconds
        self._period_seconds = period_seconds
        self._metrics = WorkerMetrics(work.kind)

    def setup(self) -> None:
        self._work.prepare()

    def display_data(self) -> dict[str, Any]:
        """What an engine's page shows of the step."""
        return {
            'kind': self._work.kind,
            'element_seconds': self._period_seconds,
            'hang_seconds': self._hang_seconds,
        }

    def process(
        self,
        spec: WorkerSpec,
        tracker=beam.DoFn.RestrictionParam(Segments()),
        watermark=beam.DoFn.WatermarkEstimatorParam(ManualWatermarkEstimator.default_provider()),
    ) -> Iterator[Segment]:
        """Works segment by segment; ends early if the engine takes a checkpoint."""
        begun = time.monotonic()
        work = self._work
        key = type(work), work.addresses, spec
        with (
            hangs.watched(f'{work.kind} {spec.worker}', self._hang_seconds),
            OPEN_WORKERS.lease(key, functools.partial(work.open, spec)) as lease,
        ):
            worker, number = lease.worker, tracker.current_restriction().start
            worker.begin(number)
            self._metrics.started(time.monotonic() - begun)
            claimed = True
            while number < worker.next or not worker.finished():
                if not (claimed := tracker.try_claim(number)):
                    break  # the engine has taken a checkpoint
                segment = worker.segment(number)
                number += 1
                if segment is None:
                    continue
                self._metrics.update(segment)
                end = Timestamp.of(segment.time)
                watermark.set_watermark(max(end, watermark.current_watermark() or end))
                yield TimestampedValue(segment, end)
                if not worker.finished() and self._pauses(segment, time.monotonic() - begun):
                    tracker.defer_remainder()
                    break
            if claimed and worker.finished():
                tracker.try_claim(tracker.current_restriction().stop)
            lease.keep = not worker.finished()

    def _pauses(self, segment: Segment, seconds: float) -> bool:
        """Whether the element checkpoints itself: after its period, at the end of a game."""
        if seconds < self._period_seconds:
            return False
        between_games = bool(segment.episodes) or not self._work.acts
        return between_games or seconds > _MOST_PERIODS * self._period_seconds


class RunInParts(Run):
    """A `Run` that returns to the engine every few minutes.

    The engine then commits the results so far and continues with the rest, in this process or
    another one. The amount of work counts as unbounded, which makes the job a streaming one.
    """

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        spec: WorkerSpec,
        tracker=beam.DoFn.RestrictionParam(Segments()),
        watermark=beam.DoFn.WatermarkEstimatorParam(ManualWatermarkEstimator.default_provider()),
    ) -> Iterator[Segment]:
        """Works segment by segment for one period."""
        yield from super().process(spec, tracker, watermark)


class RunPolled(RunInParts):
    """A `RunInParts` on an engine that asks for progress until it may split (`PolledSegments`)."""

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        spec: WorkerSpec,
        tracker=beam.DoFn.RestrictionParam(PolledSegments()),
        watermark=beam.DoFn.WatermarkEstimatorParam(ManualWatermarkEstimator.default_provider()),
    ) -> Iterator[Segment]:
        """Returns first when the process is prepared; then works for one period a part."""
        positions = tracker.current_restriction()
        if positions.start == PREPARATION:
            tracker.try_claim(PREPARATION)
            tracker.defer_remainder()
        elif not is_empty(positions):
            yield from super().process(spec, tracker, watermark)


class Workers(beam.PTransform):
    """Runs parallel workers of one kind (paper, section 4.1).

    Input: a pipeline. Output: their segments.
    """

    def __init__(
        self,
        work: Work,
        submission: Submission,
        period_seconds: float = 0.0,
        settings: JobSettings = JobSettings(),
        polled: bool = False,
    ):
        """Creates the transform.

        Args:
          work: what each worker does.
          submission: the workers.
          period_seconds: between two checkpoints of a worker's element; 0: it takes none.
          settings: of the launch.
          polled: whether the engine asks for progress until it may split (`PolledSegments`).
        """
        super().__init__()
        self._polled = polled
        self._work = work
        self._submission = submission
        self._period_seconds = period_seconds
        self._settings = settings

    def expand(self, pipeline):
        work = self._work
        hang_seconds = self._settings.hang_seconds
        if self._period_seconds:
            in_parts = RunPolled if self._polled else RunInParts
            run = in_parts(work, hang_seconds, self._period_seconds)
        else:
            run = Run(work, hang_seconds)
        step = beam.ParDo(run).with_output_types(Segment)
        if hints := self._settings.hints(work.kind):
            step = step.with_resource_hints(**hints)
        return (
            pipeline
            | 'Workers' >> beam.Create(self._submission.specs())
            | 'Spread' >> beam.Reshuffle()  # prevents fusion: each worker has its own process
            | type(work).__name__ >> step
        )
