"""The graph of a job: workers in, work on the servers and tables of statistics out.

Actor | Actor statistics        (Learner, Bundle)
"""

from collections.abc import Sequence

import apache_beam as beam

from pipelines.experiment.job_settings import JobSettings
from pipelines.transforms.sinks import sink_of
from pipelines.transforms.statistics import Statistics
from pipelines.transforms.workers import Work, Workers
from pipelines.workers.spec import Submission


def build(
    pipeline: beam.Pipeline,
    works: Sequence[tuple[Work, Submission]],
    settings: JobSettings,
    period_seconds: float = 0.0,
    needs_outputs: bool = False,
    polled: bool = False,
) -> None:
    """Adds workers of each kind and their statistics to a pipeline.

    Args:
      pipeline: of the job.
      works: what the workers of each kind do, and which they are.
      settings: of the launch.
      period_seconds: between two checkpoints of a worker's element; 0: it takes none.
      needs_outputs: whether the engine runs only what leads to the last transform (Dask).
      polled: whether the engine asks for progress until it may split (Prism).

    Raises:
      UsageError: `--statistics_sink` names no function, or one that the engine would not run.
    """
    sink, ends = sink_of(settings), []
    for work, submission in works:
        name = work.kind.capitalize()
        end = pipeline | name >> Workers(work, submission, period_seconds, settings, polled)
        if sink is not None:
            statistics = Statistics(sink, submission.number, needs_outputs)
            written = end | f'{name} statistics' >> statistics
            end = end if written is None else written
        ends.append(end)
    if len(ends) > 1 and not period_seconds:
        _ = ends | 'Ends' >> beam.Flatten()  # Dask runs only what leads to the last transform
