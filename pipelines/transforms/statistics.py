"""Statistics: segments in, the rows of three tables to a sink out.

    segments -> episodes   one row a game
             -> segments   one row a worker's segment
             -> periods    one row a kind of workers and ten minutes, combined

A table's rows are named tuples. `--statistics_sink module:function` names what receives them.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.transforms import trigger
from apache_beam.transforms.window import FixedWindows
from apache_beam.utils.timestamp import Duration

from pipelines.errors import UsageError
from pipelines.transforms.sinks import Sink
from pipelines.workers.segment import Segment

PERIOD_SECONDS = 600
_LATE_SECONDS = 86_400  # a row may come after its period: a worker was dead, a bundle failed


class EpisodeRow(NamedTuple):
    """A game: the actor or bundle that played it, and the fields of `Episode`."""

    kind: str
    worker: int
    segment: int
    submission: int
    time: float
    raw_return: float
    clipped_return: float
    agent_steps: int
    epsilon: float
    run_agent_steps: int
    run_updates: int


class SegmentRow(NamedTuple):
    """A segment: the fields of `Segment`, its number of games and the sum of their returns."""

    kind: str
    worker: int
    segment: int
    submission: int
    time: float
    seconds: float
    agent_steps: int
    gradients: int
    outliers: int
    stale: int
    invalid: int
    loss_sum: float
    staleness: list[int]
    episodes: int
    return_sum: float


class PeriodRow(NamedTuple):
    """Sums over the segments of a job that ended in the `PERIOD_SECONDS` from `time` on."""

    kind: str
    submission: int
    time: float
    segments: int
    agent_steps: int
    gradients: int
    outliers: int
    stale: int
    invalid: int
    episodes: int
    loss_sum: float
    return_sum: float


for _row in (EpisodeRow, SegmentRow, PeriodRow):
    beam.coders.registry.register_coder(_row, beam.coders.RowCoder)


def episode_rows(segment: Segment) -> Iterator[EpisodeRow]:
    """The games of a segment."""
    names = ('kind', 'worker', 'segment', 'submission')
    identity = {name: getattr(segment, name) for name in names}
    for episode in segment.episodes:
        yield EpisodeRow(**identity, **episode._asdict())


def segment_row(segment: Segment) -> SegmentRow:
    """The segment, its games summed."""
    returns = float(sum(episode.raw_return for episode in segment.episodes))
    values = {**segment._asdict(), 'staleness': list(segment.staleness)}
    return SegmentRow(**{**values, 'episodes': len(segment.episodes)}, return_sum=returns)


Sums = dict[str, float]
_COUNTS = ('agent_steps', 'gradients', 'outliers', 'stale', 'invalid', 'episodes')


class Sum(beam.CombineFn):
    """Sums segments to the figures of a `PeriodRow`."""

    def create_accumulator(self) -> Sums:
        return {**dict.fromkeys(('segments', *_COUNTS), 0), 'loss_sum': 0.0, 'return_sum': 0.0}

    def add_input(self, sums: Sums, row: SegmentRow) -> Sums:
        return {name: total + getattr(row, name, 1) for name, total in sums.items()}

    def merge_accumulators(self, parts: Iterable[Sums]) -> Sums:
        merged = self.create_accumulator()
        for part in parts:
            merged = {name: total + part[name] for name, total in merged.items()}
        return merged

    def extract_output(self, sums: Sums) -> Sums:
        return sums


def _keyed(row: SegmentRow) -> tuple[str, SegmentRow]:
    """The row by its period: not by the window's, since some engines drop timestamps."""
    return f'{row.kind} {int(row.time // PERIOD_SECONDS) * PERIOD_SECONDS}', row


def _period_row(keyed: tuple[str, dict[str, Any]], submission: int) -> Iterator[PeriodRow]:
    key, sums = keyed
    kind, begin = key.split()
    yield PeriodRow(kind=kind, submission=submission, time=float(begin), **sums)


class Statistics(beam.PTransform):
    """Writes what the workers report.

    Input: segments. Output: what the sink's transforms return, usually nothing.
    """

    def __init__(self, sink: Sink, submission: int, needs_outputs: bool = False):
        """
        Args:
          sink: makes the transform that writes a table.
          submission: number of the job.
          needs_outputs: whether the engine runs only what leads to the last transform.
        """
        super().__init__()
        self._needs_outputs = needs_outputs
        self._sink = sink
        self._submission = submission

    def expand(self, segments):
        rows = segments | 'Rows' >> beam.Map(segment_row).with_output_types(SegmentRow)
        games = segments | 'Games' >> beam.FlatMap(episode_rows).with_output_types(EpisodeRow)
        tables = {'episodes': games, 'segments': rows, 'periods': self._periods(rows)}
        written = [
            table | f'Write {name}' >> self._sink(name, table.element_type)
            for name, table in tables.items()
        ]
        ends = [end for end in written if isinstance(end, beam.PCollection)]
        if self._needs_outputs and len(ends) < len(written):
            raise UsageError(
                '--statistics_sink: returns no PCollection, so this engine would not run it. Fix:'
                ' let it return one.'
            )
        if not segments.is_bounded or not ends:
            return None
        return ends | 'Written' >> beam.Flatten()  # Dask runs what leads to the last transform

    def _periods(self, rows):
        """The rows of each period combined; in a streaming job again with what comes late."""
        if not rows.is_bounded:
            rows = rows | 'By period' >> beam.WindowInto(
                FixedWindows(PERIOD_SECONDS),
                trigger=trigger.AfterWatermark(late=trigger.AfterCount(1)),
                accumulation_mode=trigger.AccumulationMode.ACCUMULATING,
                allowed_lateness=Duration(_LATE_SECONDS),
            )
        return (
            rows
            | 'By kind and period' >> beam.Map(_keyed)
            | 'Sum' >> beam.CombinePerKey(Sum())
            | 'Periods' >> beam.FlatMap(_period_row, self._submission).with_output_types(PeriodRow)
        )
