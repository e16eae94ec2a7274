"""Statistics: segments become rows of three tables, each there once, on a real runner of Beam."""

import json
import pathlib
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from pyarrow import parquet

from infra.disk import write_json
from infra.parameter_server.protocol import WORKER_KINDS
from pipelines.errors import UsageError
from pipelines.experiment.job_settings import JobSettings
from pipelines.monitoring import beam_counters
from pipelines.transforms import metrics
from pipelines.transforms.sinks import FILE_SEGMENTS, WriteFiles, sink_of
from pipelines.transforms.statistics import PERIOD_SECONDS, SegmentRow, Statistics, segment_row
from pipelines.workers.segment import Episode, Segment

BEGIN = 1_000 * PERIOD_SECONDS


def actor_segment(number: int, worker: int = 0) -> Segment:
    """One game of 100 + `number` points each, 16 seconds after the one before."""
    time = BEGIN + 16.0 * number
    game = Episode(time, 100.0 + number, 1.0, 50, 0.1, 64 * number, 16 * number)
    return Segment('actor', worker, number, 0, time, 8.0, agent_steps=64, episodes=(game,))


def learner_segment(number: int) -> Segment:
    counts: dict[str, Any] = {'gradients': 16, 'outliers': 2, 'stale': 1, 'loss_sum': 0.5}
    time = BEGIN + 16.0 * number
    return Segment('learner', 1, number, 0, time, 8.0, staleness=(3, 10), **counts)


class Count(beam.DoFn):
    """Hands on segments and counts them as the workers' steps do."""

    def setup(self):
        self._metrics = {kind: metrics.WorkerMetrics(kind) for kind in WORKER_KINDS}

    def process(self, segment: Segment):
        self._metrics[segment.kind].update(segment)
        yield segment


def run(directory: pathlib.Path, segments: list[Segment]):
    """A job that hands on these segments; its result."""
    sink = sink_of(JobSettings(statistics_dir=str(directory)))
    assert sink is not None
    pipeline = beam.Pipeline(options=PipelineOptions(['--runner=FnApiRunner']))
    count = beam.ParDo(Count()).with_output_types(Segment)
    created = pipeline | beam.Create(segments, reshuffle=False)
    _ = created | count | Statistics(sink, submission=4)
    result = pipeline.run()
    result.wait_until_finish()
    return result


def rows(directory: pathlib.Path, table: str) -> list[dict]:
    """A table's rows, which are the same in both formats."""
    lines = [
        json.loads(line)
        for file in sorted(directory.glob(f'{table}-*.jsonl'))
        for line in file.read_text().splitlines()
    ]
    files = sorted(directory.glob(f'{table}-*.parquet'))
    assert [row for file in files for row in parquet.read_table(file).to_pylist()] == lines
    return lines


def test_each_game_and_segment_is_a_row_and_each_period_their_sum(tmp_path):
    number = 40  # of 16 s each: 37 begin in the first ten minutes
    segments = [actor_segment(i) for i in range(number)] + [learner_segment(0)]
    run(tmp_path, segments)
    games = rows(tmp_path, 'episodes')
    assert [game['raw_return'] for game in games] == [100.0 + i for i in range(number)]
    assert {(row['kind'], row['worker'], row['submission']) for row in games} == {('actor', 0, 0)}
    told = rows(tmp_path, 'segments')
    assert len(told) == number + 1
    assert told[-1]['staleness'] == [3, 10]
    assert told[0] | {'time': 0} == {
        'kind': 'actor', 'worker': 0, 'segment': 0, 'submission': 0, 'time': 0, 'seconds': 8.0,
        'agent_steps': 64, 'gradients': 0, 'outliers': 0, 'stale': 0, 'invalid': 0,
        'loss_sum': 0.0, 'staleness': [], 'episodes': 1, 'return_sum': 100.0,
    }  # fmt: skip
    periods = rows(tmp_path, 'periods')
    first = -(-PERIOD_SECONDS // 16)
    assert [(row['kind'], row['time'], row['segments']) for row in periods] == [
        ('actor', BEGIN, first),
        ('actor', BEGIN + PERIOD_SECONDS, number - first),
        ('learner', BEGIN, 1),
    ]
    assert periods[0]['return_sum'] == sum(100.0 + i for i in range(first))
    assert (periods[2]['gradients'], periods[2]['loss_sum']) == (16, 0.5)


def test_what_is_handed_on_again_is_there_once(tmp_path):
    whole = [actor_segment(number) for number in range(FILE_SEGMENTS + 8)]
    run(tmp_path, whole[: FILE_SEGMENTS + 3])  # the worker died
    before = {file.name for file in tmp_path.iterdir()}
    run(tmp_path, whole)
    assert before <= {file.name for file in tmp_path.iterdir()}
    assert [row['segment'] for row in rows(tmp_path, 'segments')] == list(range(len(whole)))
    assert len(rows(tmp_path, 'episodes')) == len(whole)


def test_a_place_that_cannot_be_written_fails_no_worker_and_is_named(tmp_path):
    (tmp_path / 'file').touch()
    segments = [actor_segment(0), actor_segment(1, worker=2), learner_segment(0)]
    for job in range(2):
        result = run(tmp_path / 'file' / 'statistics', segments)
        write_json(tmp_path / f'actor-{job}.metrics.json', metrics.committed(result))
    # In each job a game and a segment of each actor, the learner's segment, a period of each kind.
    assert beam_counters.unwritten_rows(beam_counters.totals(tmp_path)) == (
        '4 of actor-000, 4 of actor-002, 2 of actor-job-0004, 2 of learner-001,'
        ' 2 of learner-job-0004 (Not a directory)'
    )


def test_beams_counters_are_those_of_the_segments_and_add_up_over_jobs(tmp_path):
    segments = [actor_segment(0), actor_segment(1), learner_segment(0)]
    counted = metrics.committed(run(tmp_path / 'statistics', segments))
    assert counted['actor']['agent_steps'] == 128
    assert counted['actor']['return_points'] == {'count': 2, 'sum': 201, 'min': 100, 'max': 101}
    assert counted['learner'] | {'segment_milliseconds': 0} == {
        'agent_steps': 0,
        'gradients': 16,
        'outlier_gradients': 2,
        'stale_gradients': 1,
        'invalid_gradients': 0,
        'episodes': 0,
        # Bounds 0 and 1, of 3 and 10 gradients.
        'staleness_updates': {'count': 13, 'sum': 10, 'min': 0, 'max': 1},
        'microseconds_per_gradient': {'count': 1, 'sum': 500_000, 'min': 500_000, 'max': 500_000},
        'segment_milliseconds': 0,
    }
    for number in range(2):
        write_json(tmp_path / f'job-{number}.metrics.json', counted)
    (tmp_path / 'job-2.metrics.json').write_text('{"actor": {"agent_steps": "many"}, "boss": 3}')
    both = beam_counters.totals(tmp_path)
    assert both['actor']['agent_steps'] == 256
    assert both['actor']['return_points'] == {'count': 4, 'sum': 402, 'min': 100, 'max': 101}


def to_list(table, row):
    """A sink of a user's."""
    return beam.Map(lambda found: print(table, len(row._fields), found.kind))


def test_a_sink_of_the_users_gets_each_tables_name_and_type(capfd):
    sink = sink_of(JobSettings(statistics_sink='tests.pipelines.test_statistics:to_list'))
    assert sink is not None
    with beam.Pipeline(options=PipelineOptions(['--runner=FnApiRunner'])) as pipeline:
        _ = pipeline | beam.Create([actor_segment(0)]) | Statistics(sink, submission=0)
    said = sorted(line for line in capfd.readouterr().out.splitlines() if ' actor' in line)
    assert said == ['episodes 11 actor', 'periods 12 actor', 'segments 15 actor']


def test_a_sink_that_does_not_exist_is_one_line():
    with pytest.raises(UsageError, match='--statistics_sink nowhere:sink: cannot import nowhere'):
        sink_of(JobSettings(statistics_sink='nowhere:sink'))


def test_without_a_place_for_files_there_is_no_sink():
    assert sink_of(JobSettings()) is None


def test_an_engine_that_runs_what_leads_to_the_last_transform_needs_a_sinks_output():
    class Silent(beam.PTransform):
        def expand(self, rows):
            _ = rows | beam.Map(print)

    with pytest.raises(UsageError, match='returns no PCollection'):
        pipeline = beam.Pipeline(options=PipelineOptions(['--runner=FnApiRunner']))
        segments = pipeline | beam.Create([actor_segment(0)]).with_output_types(Segment)
        _ = segments | Statistics(lambda table, row: Silent(), 0, needs_outputs=True)


def test_an_error_of_any_store_fails_no_worker(tmp_path, monkeypatch):
    def refuse(self, name, content):
        raise RuntimeError('503 Service Unavailable')  # as Google's client raises its own kinds

    monkeypatch.setattr(WriteFiles, '_put', refuse)
    writer = WriteFiles(str(tmp_path), 'segments', SegmentRow)
    writer.start_bundle()
    writer.process(segment_row(actor_segment(0)))
    writer.finish_bundle()
    assert not list(tmp_path.iterdir())
