"""Segments as Beam runs them: claimed in order, ended early, never split."""

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to

from pipelines.transforms.bundle import SEGMENT_AGENT_STEPS
from pipelines.transforms.restriction import Segments, claimed
from pipelines.workers.bundle import UpdatesOwed
from pipelines.workers.spec import Submission, WorkerSpec


class CountTo(beam.DoFn):
    """Yields its segments until the one it is told to stop at."""

    def __init__(self, stop: int):
        self._stop = stop

    def process(self, spec, tracker=beam.DoFn.RestrictionParam(Segments())):
        done: list[int] = []
        for segment in claimed(tracker, lambda: len(done) >= self._stop):
            done.append(segment)
            yield spec.worker, segment


def run(stop):
    options = PipelineOptions(['--runner=FnApiRunner'])
    with TestPipeline(options=options) as pipeline:
        yield (
            pipeline
            | beam.Create(Submission((3, 5), number=0).specs(segments=4))
            | beam.ParDo(CountTo(stop))
        )


def test_every_worker_claims_all_its_segments_in_order():
    for output in run(stop=100):
        assert_that(output, equal_to([(worker, i) for worker in (3, 5) for i in range(4)]))


def test_a_worker_that_is_finished_ends_early_without_an_error():
    for output in run(stop=2):
        assert_that(output, equal_to([(worker, i) for worker in (3, 5) for i in range(2)]))


def test_a_worker_at_work_is_neither_split_nor_checkpointed():
    provider = Segments()
    spec = WorkerSpec(worker=0, submission=0, segments=10)
    tracker = provider.create_tracker(provider.initial_restriction(spec))
    assert tracker.try_claim(0)
    assert tracker.try_split(0.5) is None
    assert tracker.try_split(0) is None
    assert tracker.try_claim(1)


def test_updates_are_owed_at_the_ratio_once_the_replay_is_filled():
    owed = UpdatesOwed(min_replay_size=100, agent_steps_per_update=4.0)
    assert owed.after(64) == 0
    # 36 of these 64 still fill the replay; 28 / 4 = 7 updates.
    assert owed.after(SEGMENT_AGENT_STEPS) == 7
    assert owed.after(6) == 1  # 6 / 4, 2 steps left over
    assert owed.after(2) == 1  # with which these make a whole
    owed.carry(3)  # of them could not be made
    assert [owed.after(4), owed.after(4)] == [1 + 3, 1]


def test_without_a_ratio_every_segment_owes_one_update():
    owed = UpdatesOwed(min_replay_size=10, agent_steps_per_update=0.0)
    assert [owed.after(8), owed.after(8), owed.after(8)] == [0, 1, 1]
