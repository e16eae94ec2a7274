"""Workers as elements: kept open between two parts, watched for hangs, never run twice."""

import contextlib
import subprocess
import sys
import time
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.worker.sdk_worker import SdkWorker

from pipelines.transforms.restriction import Segments
from pipelines.transforms.workers import Run, Work, Workers
from pipelines.workers.boxes import OpenWorker
from pipelines.workers.open_workers import LeftBehindError, OpenWorkers
from pipelines.workers.segment import Episode, Segment, decode, encode
from pipelines.workers.spec import Submission, WorkerSpec
from tests.support import engines
from tests.support.waiting import eventually

EPISODE = Episode(1.5, -21.0, -20.0, 800, 0.1, 8_000, 2_000)
SEGMENT = Segment('bundle', 3, 7, 1, 2.5, 4.0, 64, 16, 2, 1, 0, 0.5, (3, 10), (EPISODE,))


class Opened:
    """Opens workers, each a number, and notes how each was closed."""

    def __init__(self):
        self.count = 0
        self.closed: list[object] = []

    @contextlib.contextmanager
    def __call__(self):
        self.count += 1
        try:
            yield self.count
        except BaseException as error:
            self.closed.append(type(error))
            raise
        self.closed.append(None)


class TestOpenWorkers:
    def test_a_continuation_takes_the_worker_that_was_kept(self):
        workers, opened = OpenWorkers(), Opened()
        for _ in range(3):
            with workers.lease('a', opened) as lease:
                assert lease.worker == 1
                lease.keep = True
        with workers.lease('b', opened) as lease:
            assert lease.worker == 2
        assert opened.closed == [None]  # b; a is still open
        with workers.lease('a', opened):
            pass
        assert opened.closed == [None, None]

    def test_two_elements_at_a_time_have_a_worker_each(self):
        workers, opened = OpenWorkers(), Opened()
        with workers.lease('a', opened) as first, workers.lease('a', opened) as second:
            assert {first.worker, second.worker} == {1, 2}
            first.keep = second.keep = True
        assert opened.closed == [LeftBehindError]  # one is kept

    def test_an_error_closes_the_worker_with_it(self):
        workers, opened = OpenWorkers(), Opened()
        with pytest.raises(OSError), workers.lease('a', opened) as lease:
            lease.keep = True
            raise OSError
        assert opened.closed == [OSError]
        with workers.lease('a', opened) as lease:
            assert lease.worker == 2

    def test_one_whose_element_goes_on_elsewhere_is_closed_as_not_ended(self):
        workers, opened = OpenWorkers(idle_seconds=0.2), Opened()
        with workers.lease('a', opened) as lease:
            lease.keep = True
        assert eventually(lambda: opened.closed == [LeftBehindError], 5.0)

    def test_one_that_is_taken_again_in_time_is_not_closed(self):
        workers, opened = OpenWorkers(idle_seconds=0.3), Opened()
        for _ in range(5):
            with workers.lease('a', opened) as lease:
                lease.keep = True
            time.sleep(0.1)
        assert (opened.count, opened.closed) == (1, [])


class Ledger:
    """The part of a parameter client that keeps segments."""

    def __init__(self, first=0, records=()):
        self.first, self.records = first, list(records)

    def begin_segments(self, kind, worker, committed):
        return self.first, self.records

    def finish_segment(self, kind, worker, first, segment, record):
        if segment == self.first + len(self.records):
            self.records.append(record)
        return self.first + len(self.records)


class Box:
    """Counts its segments."""

    def __init__(self):
        self.run: list[int] = []

    def finished(self):
        return False

    def run_segment(self, number):
        self.run.append(number)

    def take(self):
        return {'agent_steps': 64}


def worker_with(ledger):
    enlisted = type('Enlisted', (), {'spec': WorkerSpec(3, 1), 'parameters': ledger})
    return OpenWorker('bundle', enlisted, Box())  # type: ignore[arg-type]


def test_a_segment_is_the_same_after_its_way_through_the_ledger():
    assert decode(encode(SEGMENT)) == SEGMENT


def test_a_segment_on_record_is_handed_on_and_not_run_again():
    ledger = Ledger(7, [encode(SEGMENT)])
    worker = worker_with(ledger)
    worker.begin(0)
    assert [worker.segment(number) for number in range(8)] == [*[None] * 7, SEGMENT]
    new = worker.segment(8)
    assert worker.box.run == [8]
    assert new is not None
    assert (new.kind, new.worker, new.segment, new.submission, new.agent_steps) == (
        'bundle', 3, 8, 1, 64,
    )  # fmt: skip
    assert decode(ledger.records[-1]) == new


def test_a_shard_that_has_restarted_older_gets_the_records_that_it_lacks():
    ledger = Ledger()
    worker = worker_with(ledger)
    worker.begin(0)
    for number in range(3):
        worker.segment(number)
    before = list(ledger.records)
    del ledger.records[1:]
    worker.segment(3)
    assert ledger.records[:3] == before
    assert [decode(record).segment for record in ledger.records] == [0, 1, 2, 3]
    assert worker.box.run == [0, 1, 2, 3]


class Finished(Work):
    """A worker of a run that is at its budget, with five segments on record."""

    kind = 'actor'

    def __init__(self) -> None:
        self.addresses = None  # type: ignore[assignment]

    @contextlib.contextmanager
    def open(self, spec):
        """Opens it."""
        records = [encode(SEGMENT._replace(segment=number)) for number in range(5)]
        worker = worker_with(Ledger(0, records))
        worker.box.finished = lambda: True
        yield worker


def test_a_checkpoint_while_records_are_handed_on_at_the_budgets_end_is_no_error():
    provider = Segments()
    spec = WorkerSpec(3, 1)
    tracker = provider.create_tracker(provider.initial_restriction(spec))
    element = Run(Finished(), 60.0).process(spec, tracker, ManualWatermarkEstimator(None))
    handed_on: list[Any] = [next(element)]
    _, rest = tracker.try_split(0)
    handed_on += element
    tracker.check_done()  # raises an error unless all is done or handed back
    assert [each.value.segment for each in handed_on] == [0]
    assert rest.start == 1


class Slow(Work):
    """A worker with three segments of two seconds."""

    kind = 'learner'
    acts = False

    def __init__(self) -> None:
        self.addresses = None  # type: ignore[assignment]

    def prepare(self) -> None:
        """Takes its time, as the import of TensorFlow does."""
        time.sleep(0.5)

    @contextlib.contextmanager
    def open(self, spec):
        """Opens it."""
        worker = worker_with(Ledger())
        box = worker.box
        box.finished = lambda: len(box.run) == 3

        def run_segment(number):
            time.sleep(2.0)
            box.run.append(number)

        box.run_segment = run_segment
        yield worker


@pytest.mark.end_to_end
@pytest.mark.timeout(900)  # Prism may have to be built
def test_prism_seldom_asks_for_progress_and_runs_each_segment_once(tmp_path, monkeypatch):
    asked, opened = [], []
    answer, lease = SdkWorker.process_bundle_progress, OpenWorkers.lease

    def count(self, request, instruction_id):
        asked.append(request.instruction_id)
        return answer(self, request, instruction_id)

    def note(self, key, how):
        opened.append(key)
        return lease(self, key, how)

    monkeypatch.setattr(SdkWorker, 'process_bundle_progress', count)
    monkeypatch.setattr(OpenWorkers, 'lease', note)
    flags = ['--runner=PrismRunner', f'--prism_location={engines.prism()}', '--streaming']
    with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
        workers = Workers(Slow(), Submission((3,), 0), 60.0, polled=True)
        numbers = pipeline | workers | beam.Map(lambda segment: segment.segment)
        _ = numbers | 'Write' >> beam.Map(lambda number: (tmp_path / f'{number}').open('x').close())
    assert sorted(file.name for file in tmp_path.iterdir()) == ['0', '1', '2']
    assert len(opened) == 1  # what was split off opens nothing
    # Six seconds, with requests after 0.1, 0.2, 0.6, 1.8, 6.2 s if no segment ends in between; a
    # worker that refuses is asked 60 times. Some six more come in its preparation.
    assert 3 <= len(asked) <= 25


HANGING = """
import sys, time
from pipelines.workers import hangs
with hangs.watched('actor 3', 2.0):
    for _ in range(6):
        hangs.progress()
        time.sleep(0.5)
    print('hangs', flush=True)
    time.sleep(60)  # the environment
"""


def test_a_worker_that_hangs_says_where_it_stands_and_ends_its_process():
    begun = time.monotonic()
    ended = subprocess.run(
        [sys.executable, '-c', HANGING], capture_output=True, text=True, timeout=50
    )
    assert ended.stdout == 'hangs\n'  # three seconds of progress come before
    assert ended.returncode == 70
    assert 'line 9, in <module>' in ended.stderr
    assert 'actor 3: no step and no update for 2 s (--hang_seconds)' in ended.stderr
    assert time.monotonic() - begun < 20.0


AGAIN = """
import time
from pipelines.workers import hangs
for part in range(2):
    with hangs.watched('actor 3', 2.0):
        time.sleep(1.2)  # opens its worker
    time.sleep(3.5)  # another thread runs the next part
print('alive')
"""


def test_a_thread_that_begins_another_part_does_not_hang_since_the_one_before():
    ended = subprocess.run(
        [sys.executable, '-c', AGAIN], capture_output=True, text=True, timeout=50
    )
    assert ended.stdout == 'alive\n', ended.stderr


def test_a_worker_is_watched_in_its_own_thread_only():
    code = HANGING.replace('time.sleep(60)', 'pass') + 'time.sleep(4)\nprint("alive")\n'
    ended = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=50)
    assert ended.stdout == 'hangs\nalive\n', ended.stderr
