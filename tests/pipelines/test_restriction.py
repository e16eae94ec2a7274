"""Segments as Beam runs them: claimed in order, ended early, checkpointed, never split."""

import itertools

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to

from pipelines.transforms.restriction import (
    MOST_SEGMENTS,
    PREPARATION,
    PolledSegments,
    Segments,
    is_empty,
)
from pipelines.workers.bundle import TURN_AGENT_STEPS, UpdatesOwed
from pipelines.workers.spec import Submission, WorkerSpec

SPEC = WorkerSpec(worker=0, submission=0)


class CountTo(beam.DoFn):
    """Yields its segments until the one it is told to stop at."""

    def __init__(self, stop: int):
        self._stop = stop

    def process(self, spec, tracker=beam.DoFn.RestrictionParam(Segments())):
        segment = tracker.current_restriction().start
        while segment < self._stop and tracker.try_claim(segment):
            yield spec.worker, segment
            segment += 1
        tracker.try_claim(tracker.current_restriction().stop)


def test_every_worker_claims_its_segments_in_order_and_ends_early_without_an_error():
    options = PipelineOptions(['--runner=FnApiRunner'])
    with TestPipeline(options=options) as pipeline:
        specs = Submission((3, 5), number=0).specs()
        output = pipeline | beam.Create(specs) | beam.ParDo(CountTo(4))
        assert_that(output, equal_to([(worker, i) for worker in (3, 5) for i in range(4)]))


def tracker():
    provider = Segments()
    return provider.create_tracker(provider.initial_restriction(SPEC))


def test_a_worker_at_work_is_not_split_but_checkpointed_after_the_segment():
    working = tracker()
    assert working.try_claim(0)
    assert working.try_split(0.5) is None
    done, rest = working.try_split(0)
    assert (done.start, done.stop, rest.start, rest.stop) == (0, 1, 1, MOST_SEGMENTS)
    assert not working.try_claim(1)
    working.check_done()  # raises an error unless all is done or handed back


def test_a_polled_workers_splits_hand_out_an_empty_rest_five_times():
    provider = PolledSegments()
    whole = provider.initial_restriction(SPEC)
    working = provider.create_tracker(whole)
    for segment in range(5):  # the first before the worker has begun
        kept, rest = working.try_split(0.5)
        assert (kept.start, kept.stop) == (PREPARATION, MOST_SEGMENTS)
        assert is_empty(rest)
        assert provider.create_tracker(rest).try_split(0.5) is None
        assert working.try_claim(segment)
    assert working.try_split(0.5) is None
    done, rest = working.try_split(0)
    assert (done.start, done.stop) == (PREPARATION, 5)
    following = provider.create_tracker(rest)
    assert following.try_claim(5)
    assert following.try_split(0.5) is not None
    assert following.try_split(0) is not None
    assert following.try_split(0.5) is None  # nothing is left of a part that has ended


def test_a_worker_that_has_not_begun_is_not_checkpointed_which_would_bring_it_nowhere():
    assert tracker().try_split(0) is None


class NeverEnds(beam.DoFn):
    """Counts segments for ever, in parts of three."""

    @beam.DoFn.unbounded_per_element()
    def process(self, spec, tracker=beam.DoFn.RestrictionParam(Segments())):
        for segment in itertools.count(tracker.current_restriction().start):
            if not tracker.try_claim(segment):
                return
            yield segment
            if segment % 3 == 2:
                return tracker.defer_remainder()


def test_a_drain_leaves_nothing_of_the_rest_so_that_workers_without_an_end_end():
    with beam.Pipeline(runner=FnApiRunner(is_drain=True)) as pipeline:
        specs = pipeline | beam.Create(Submission((3, 5), number=0).specs())
        assert_that(specs | beam.ParDo(NeverEnds()), equal_to([]))


def test_updates_are_owed_at_the_ratio_once_the_replay_is_filled():
    owed = UpdatesOwed(unlearned=100, agent_steps_per_update=4.0)
    assert owed.after(64) == 0
    # 36 of these 64 still fill the replay; 28 / 4 = 7 updates.
    assert owed.after(TURN_AGENT_STEPS) == 7
    assert owed.after(6) == 1  # 6 / 4, 2 steps left over
    assert owed.after(2) == 1  # with which these make a whole
    owed.carry(3)  # of them could not be made
    assert [owed.after(4), owed.after(4)] == [1 + 3, 1]


def test_without_a_ratio_every_segment_owes_one_update():
    owed = UpdatesOwed(unlearned=10, agent_steps_per_update=0.0)
    assert [owed.after(8), owed.after(8), owed.after(8)] == [0, 1, 1]
