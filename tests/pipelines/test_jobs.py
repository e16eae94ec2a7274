"""The watch over jobs: small real processes in place of Beam, a clock that the test sets."""

import dataclasses
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from infra.own_time import OwnTime
from infra.process import is_alive
from pipelines.events import Heartbeat
from pipelines.experiment import presets
from pipelines.experiment.job_settings import JobSettings
from pipelines.experiment.launch import Addresses, Launch
from pipelines.launch import jobs as jobs_lib
from pipelines.launch.jobs import FINISHED_SECONDS, SILENCE_SECONDS, START_SECONDS, Jobs
from pipelines.storage import provenance
from pipelines.storage.run_directory import RunDirectory
from tests.support.waiting import eventually, has_ended

ACTORS = (('actor', 0), ('actor', 1))
LEARNER = ('learner', 0)
# Each worker and the number of the job that starts with it.
ALL = ((ACTORS[0], 0), (ACTORS[1], 0), (LEARNER, 1))
LONGEST_START_SECONDS = START_SECONDS + 2 * jobs_lib.START_SECONDS_PER_WORKER  # of three workers


class Run:
    """Jobs of two actors and a learner, each worker a sleeping child of its job's shell."""

    def __init__(
        self,
        path: Path,
        runner: str = 'DirectRunner',
        one_job: bool = False,
        hang_seconds: float = 30.0,  # silence counts from 45 s on
    ):
        self.directory = RunDirectory.open(path / 'run')
        self.started: list[tuple[str, tuple[int, ...]]] = []
        self.scripts: dict[str, str] = {}  # by a job's name: what later jobs do instead
        self._path = path
        self.config = presets.experiment('laptop', {'num_actors': 2, 'num_learners': 1})
        self.jobs = Jobs(
            self.config,
            Launch(
                runner,
                None,
                False,
                (),
                (),
                (),
                (),
                (),
                one_job=one_job,
                jobs=JobSettings(hang_seconds=hang_seconds),
            ),
            Addresses(('ps:1',), ('replay:1',), 'telemetry:1'),
            self.directory,
            command=self._command,
        )

    def _command(self, workers, submission):
        assert submission == len(self.started)
        name = '-'.join(dict.fromkeys(kind for kind, _ in workers))
        self.started.append((name, tuple(number for _, number in workers)))
        pids = [self._path / f'{kind}-{number}.{submission}' for kind, number in workers]
        work = ' '.join(f'sleep 100 & echo $! >{pid};' for pid in pids)
        return ['sh', '-c', self.scripts.get(name, f'{work} wait')]

    def pid(self, worker, submission):
        """Process id of a worker of a job."""
        file = self._path / f'{worker[0]}-{worker[1]}.{submission}'
        assert eventually(lambda: file.exists() and file.read_text().endswith('\n'))
        return int(file.read_text())

    def kill(self, worker, submission):
        """Kills a worker of a job, and waits until its shell has seen it."""
        pid = self.pid(worker, submission)
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: not is_alive(pid))

    def kill_job(self, worker, submission):
        """Kills the process of a worker's job, the worker's parent, and waits for its end."""
        os.kill(os.getsid(self.pid(worker, submission)), signal.SIGKILL)
        self.wait_for_end(worker[0])

    def hear(self, now, heard, ended=False):
        """Heartbeats of all of `heard` ((worker, submission) pairs) come."""
        self.jobs.hear([self.beat(worker, number, ended) for worker, number in heard], now)

    def beat(self, worker, submission, ended=False):
        """A heartbeat of a worker that came with a job."""
        kind, number = worker
        return Heartbeat(kind, number, submission, self.pid(worker, submission), ended)

    def supervise(self, now, heard=()):
        """One look at `now`, all of `heard` just heard of."""
        self.hear(now, heard)
        self.jobs.supervise(now)

    def wait_for_end(self, name):
        """Waits until no job of this name runs."""
        assert eventually(lambda: name not in self.jobs.running)


@pytest.fixture
def make_run(tmp_path):
    """Makes a run, and ends it."""
    runs: list[Run] = []

    def make(**arguments):
        runs.append(Run(tmp_path, **arguments))
        return runs[-1]

    yield make
    for run in runs:
        run.jobs.stop()
        run.directory.close()


@pytest.mark.parametrize(('users', 'jobs'), [(None, '1'), ('0', '0')])
def test_jobs_have_onednn_unless_the_user_switched_it_off(users, jobs, make_run, monkeypatch):
    monkeypatch.delenv('TF_ENABLE_ONEDNN_OPTS', raising=False)
    if users is not None:
        monkeypatch.setenv('TF_ENABLE_ONEDNN_OPTS', users)
    run = make_run()
    run.scripts['learner'] = 'echo onednn=$TF_ENABLE_ONEDNN_OPTS.; sleep 100'
    run.jobs.start(0.0)
    log = run.directory.logs / 'learner-1.log'
    assert eventually(lambda: log.exists() and f'onednn={jobs}.' in log.read_text())


def test_a_silent_worker_is_killed_and_submitted_once_after_the_back_off(make_run):
    run = make_run()
    run.jobs.start(0.0)
    assert run.started == [('actor', (0, 1)), ('learner', (0,))]
    pids = {worker: run.pid(worker, number) for worker, number in ALL}
    run.hear(10.0, ALL[:1])

    def look(now):
        run.supervise(now, ALL[1:])

    look(10.0 + SILENCE_SECONDS)
    assert not has_ended(pids[ACTORS[0]])
    now = 11.0 + SILENCE_SECONDS
    look(now)
    assert eventually(lambda: has_ended(pids[ACTORS[0]]))
    assert len(run.started) == 2  # the back-off
    for later in (2.0, 3.0, 60.0):
        look(now + later)
    assert run.started[2:] == [('actor', (0,))]
    assert run.jobs.restarts == {'actor': 1}
    assert not has_ended(pids[ACTORS[1]])


def test_a_death_seen_while_no_worker_is_heard_waits_for_nobody(make_run):
    run = make_run()
    run.jobs.start(0.0)
    run.supervise(10.0, ALL)
    run.kill(ACTORS[0], 0)
    # A server hangs: the clock of what is heard stands still at 10.
    for own in (11.0, 11.0 + jobs_lib.GONE_SECONDS, 14.0 + jobs_lib.GONE_SECONDS):
        run.jobs.supervise(10.0, own)
    assert run.started[2:] == [('actor', (0,))]


def test_a_worker_whose_process_is_gone_is_submitted_again_before_it_is_silent(make_run):
    run = make_run()
    run.jobs.start(0.0)
    run.supervise(10.0, ALL)
    run.kill(ACTORS[0], 0)
    gone = jobs_lib.GONE_SECONDS
    run.supervise(11.0, ALL)  # its last heartbeats may arrive late
    run.supervise(11.0 + gone / 2, ALL)
    assert len(run.started) == 2
    run.supervise(11.0 + gone, ALL)
    run.supervise(14.0 + gone, ALL)  # behind the back-off
    assert run.started[2:] == [('actor', (0,))]


def test_a_silent_worker_alone_in_its_job_takes_the_job_with_it(make_run):
    run = make_run()
    run.jobs.start(0.0)
    pid = run.pid(LEARNER, 1)
    now = LONGEST_START_SECONDS + 1  # the learner was never heard of
    run.supervise(now, ALL[:2])
    assert eventually(lambda: has_ended(pid))
    run.supervise(now + 3, ALL[:2])
    assert run.started[2:] == [('learner', (0,))]


def test_more_workers_have_longer_to_start_and_a_late_one_is_killed(make_run):
    run = make_run()
    run.jobs.start(0.0)
    heard = [ALL[0], ALL[2]]
    run.supervise(LONGEST_START_SECONDS, heard)
    assert len(run.started) == 2
    now = LONGEST_START_SECONDS + 1
    run.supervise(now, heard)
    run.supervise(now + 3, heard)
    assert run.started[2:] == [('actor', (1,))]
    late, replacement = run.pid(ACTORS[1], 0), run.pid(ACTORS[1], 2)
    assert not has_ended(late)  # nobody knew its process id
    run.supervise(now + 4, ALL)  # now it is heard of
    assert eventually(lambda: has_ended(late))
    run.supervise(now + 5, [*heard, (ACTORS[1], 2)])
    assert not has_ended(replacement)
    assert not has_ended(run.pid(ACTORS[0], 0))


def test_a_worker_that_may_hang_for_longer_is_not_killed_for_its_silence_before(make_run):
    run = make_run(hang_seconds=200.0)
    run.jobs.start(0.0)
    run.supervise(10.0, ALL)
    for now in (10.0 + SILENCE_SECONDS, 10.0 + 200.0 + 15.0):
        run.supervise(now, ALL[1:])
        assert run.started[2:] == []
    run.supervise(11.0 + 200.0 + 15.0, ALL[1:])
    run.supervise(14.0 + 200.0 + 15.0, ALL[1:])
    assert run.started[2:] == [('actor', (0,))]


def test_nobody_is_killed_because_the_launcher_stood_still(make_run):
    run, world = make_run(), [0.0]
    own_time = OwnTime(lambda: world[0])
    run.jobs.start(own_time.look())
    run.hear(own_time.look(), ALL)
    for standstill in (60.0, 3600.0):
        world[0] += SILENCE_SECONDS - 15.0  # some silence before
        run.jobs.supervise(own_time.look())
        world[0] += standstill
        run.jobs.supervise(own_time.look())
        world[0] += 2.0
        run.supervise(own_time.look(), ALL)
    assert len(run.started) == 2
    assert not any(has_ended(run.pid(*each)) for each in ALL)


def test_a_late_heartbeat_of_a_predecessor_is_none_of_its_successor(make_run):
    run = make_run()
    run.jobs.start(0.0)
    run.hear(1.0, ALL)
    late = run.beat(LEARNER, 1)
    run.kill_job(LEARNER, 1)
    run.supervise(2.0, ALL[:2])
    run.supervise(5.0, ALL[:2])
    assert run.started[2:] == [('learner', (0,))]
    successor = run.beat(LEARNER, 2)
    run.jobs.hear([successor, late], 6.0)  # its process is gone
    for now in (6.0, 7.0 + jobs_lib.GONE_SECONDS):
        run.jobs.hear([late], now)
        run.supervise(now, ALL[:2])
    assert len(run.started) == 3
    run.jobs.hear([late], 7.0 + SILENCE_SECONDS)
    run.supervise(7.0 + SILENCE_SECONDS, ALL[:2])
    assert eventually(lambda: has_ended(successor.pid))  # it has been silent


def test_each_worker_is_a_job_where_the_elements_of_a_job_run_in_turn(make_run):
    run = make_run(runner='PrismRunner')
    run.jobs.start(0.0)
    assert run.started == [('actor', (0,)), ('actor', (1,)), ('learner', (0,))]
    heard = [(ACTORS[0], 0), (ACTORS[1], 1), (LEARNER, 2)]
    run.supervise(10.0, heard)
    os.kill(os.getsid(run.pid(ACTORS[1], 1)), signal.SIGKILL)
    assert eventually(lambda: run.jobs.running == ['actor', 'learner'])
    for now in (11.0, 14.0):
        run.supervise(now, heard[::2])
    assert run.started[3:] == [('actor', (1,))]


def test_all_workers_may_be_one_job_and_those_that_die_are_submitted_together(make_run):
    run = make_run(runner='PrismRunner', one_job=True)
    run.jobs.start(0.0)
    assert run.started == [('actor-learner', (0, 1, 0))]
    run.supervise(10.0, [(worker, 0) for worker, _ in ALL])
    for worker in (ACTORS[1], LEARNER):
        run.kill(worker, 0)
    for now in (11.0, 11.0 + jobs_lib.GONE_SECONDS, 14.0 + jobs_lib.GONE_SECONDS):
        run.supervise(now, [(ACTORS[0], 0)])
    assert run.started[1:] == [('actor-learner', (1, 0))]
    assert run.jobs.restarts == {'actor': 1, 'learner': 1}
    assert not has_ended(run.pid(ACTORS[0], 0))
    (text,) = [text for text in run.jobs.news() if text.startswith('learner 0: died')]
    assert text.endswith(f'log: {run.directory.logs}/actor-learner-0.log')


@pytest.fixture
def over(make_run):
    """A run of two actors and a learner that is over, just heard of."""
    run = make_run()
    run.jobs.start(0.0)
    run.hear(1.0, ALL)
    return run


def test_a_worker_killed_near_the_end_holds_the_end_up_for_seconds(over):
    over.kill(ACTORS[0], 0)
    over.jobs.end_stranded(2.0)
    over.jobs.end_stranded(2.0 + jobs_lib.GONE_SECONDS)
    assert over.jobs.running == ['actor', 'learner']  # the other actor is still at work
    over.hear(8.0, ALL[1:], ended=True)
    over.jobs.end_stranded(8.0)
    assert over.jobs.running == ['learner']  # its only worker has ended: it follows by itself
    assert len(over.started) == 2


def test_a_worker_given_up_before_does_not_hold_the_end_up(over):
    over.kill(ACTORS[0], 0)
    over.supervise(2.0, ALL[1:])
    over.supervise(2.0 + jobs_lib.GONE_SECONDS, ALL[1:])  # and submitted again later
    over.hear(8.0, ALL[1:], ended=True)
    over.jobs.end_stranded(8.0)
    assert over.jobs.running == ['learner']


def test_the_records_of_workers_whose_last_job_failed_are_written_by_one_more(over):
    gone = jobs_lib.GONE_SECONDS
    over.kill(ACTORS[0], 0)
    for now in (2.0, 2.0 + gone, 5.0 + gone):  # it is given up, and submitted again
        over.supervise(now, ALL[1:])
    assert over.jobs.unwritten == {ACTORS[0]}
    over.hear(6.0, [(ACTORS[0], 2)])
    over.kill(ACTORS[0], 2)  # a job whose shell has waited for its workers ends by itself
    over.kill(LEARNER, 1)
    over.kill_job(ACTORS[1], 0)  # Beam's runner fails, since one of its workers has died before
    over.wait_for_end('learner')
    over.jobs.stop()
    assert over.jobs.unwritten == {ACTORS[1]}
    over.jobs.submit_unwritten(10.0)
    assert over.started[3:] == [('actor', (1,))]
    over.kill(ACTORS[1], 3)
    over.wait_for_end('actor')
    over.jobs.stop()
    assert over.jobs.unwritten == frozenset()


def test_what_workers_handed_on_before_a_job_is_drained_counts_as_written(make_run):
    run = make_run(runner='DataflowRunner')
    run.jobs.start(0.0)
    run.hear(1.0, ALL)
    run.hear(2.0, ALL[1:], ended=True)  # one actor is still at work when the jobs are ended
    run.jobs.stop()
    assert run.jobs.unwritten == frozenset()  # a job of Dataflow has no tables without a place
    run.jobs._launch = dataclasses.replace(
        run.jobs._launch, jobs=JobSettings(statistics_dir='gs://bucket/statistics')
    )
    assert run.jobs.unwritten == {ACTORS[0]}


def test_workers_that_hang_or_start_hold_the_end_up_no_longer_than_it_takes_to_know(make_run):
    run = make_run()
    run.jobs.start(0.0)
    run.hear(1.0, ALL[:2])
    run.jobs.end_stranded(2.0)
    assert run.jobs.running == ['actor']  # the learner has done nothing yet
    run.jobs.end_stranded(1.0 + SILENCE_SECONDS)
    assert run.jobs.running == ['actor']
    run.jobs.end_stranded(2.0 + SILENCE_SECONDS)
    assert run.jobs.running == []


def test_workers_of_a_job_that_failed_are_submitted_again(make_run):
    run = make_run()
    run.scripts['actor'] = 'exit 1'
    run.jobs.start(0.0)
    run.wait_for_end('actor')
    run.supervise(1.0, ALL[2:])
    assert len(run.started) == 2
    run.supervise(3.0, ALL[2:])
    assert run.started[2:] == [('actor', (0, 1))]
    assert run.jobs.restarts == {'actor': 2}


def test_how_workers_failed_is_told_once_with_the_error_and_the_log(make_run):
    run = make_run()
    run.scripts['actor'] = 'echo OSError: no room; echo the end; exit 1'
    run.jobs.start(0.0)
    run.wait_for_end('actor')
    run.supervise(1.0, ALL[2:])
    assert run.jobs.failures == 2
    (text,) = run.jobs.news()
    assert text.startswith('actor 0, 1: ended with exit code 1 (OSError: no room), failure 1 in a')
    assert text.endswith(f'log: {run.directory.logs}/actor-0.log')
    assert run.jobs.news() == []


def test_workers_that_ended_well_are_no_failures(make_run):
    run = make_run()
    run.scripts['actor'] = 'exit 0'
    run.jobs.start(0.0)
    run.wait_for_end('actor')
    for now in (1.0, 3.0, 1.0 + FINISHED_SECONDS):
        run.supervise(now, ALL[2:])
    assert len(run.started) == 2
    assert run.jobs.restarts == {}


def test_a_run_does_not_hang_when_all_workers_of_a_kind_ended_before_it(make_run):
    run = make_run()
    run.scripts['learner'] = 'echo no more work; exit 0'
    run.jobs.start(0.0)
    now = 0.0
    with pytest.raises(jobs_lib.WorkersFailedError, match='(?s)ended before the run.*no more work'):
        for _ in range(100):
            run.wait_for_end('learner')
            now += 10.0
            run.supervise(now, ALL[:2])
    assert run.jobs.restarts == {'learner': jobs_lib.MAX_FAILURES - 1}


def test_a_worker_that_fails_again_and_again_ends_the_run_with_its_log(make_run):
    run = make_run()
    run.scripts['learner'] = 'echo cannot open the display; exit 3'
    run.jobs.start(0.0)
    now = 0.0
    with pytest.raises(jobs_lib.WorkersFailedError) as failure:
        for _ in range(100):
            run.wait_for_end('learner')
            now += 10.0
            run.supervise(now, ALL[:2])
    message = str(failure.value)
    assert 'learner 0: failed 5 times' in message
    assert 'exit code 3' in message
    assert message.endswith('cannot open the display')
    assert run.jobs.restarts == {'learner': 4}


def test_minutes_of_work_between_failures_forgive_them(make_run):
    run = make_run()
    run.scripts['learner'] = 'exit 3'
    run.jobs.start(0.0)
    now, worked = 0.0, jobs_lib.HEALTHY_SECONDS + 1
    for _ in range(2 * jobs_lib.MAX_FAILURES):
        run.wait_for_end('learner')
        now += worked
        run.jobs.hear([Heartbeat(*LEARNER, len(run.started) - 1, os.getpid())], now)
        run.supervise(now, ALL[:2])
        now += 3.0  # a first failure's back-off, not a later one's
        run.supervise(now, ALL[:2])
    assert run.jobs.restarts == {'learner': 2 * jobs_lib.MAX_FAILURES}


def test_a_process_of_somebody_else_is_never_killed(make_run):
    run = make_run()
    run.jobs.start(0.0)
    stranger = subprocess.Popen(['sleep', '100'], start_new_session=True)
    try:
        learner = run.pid(LEARNER, 1)
        actors = [Heartbeat(*ACTORS[0], 0, stranger.pid), Heartbeat(*ACTORS[1], 0, learner)]
        run.jobs.hear(actors, 1.0)
        run.supervise(200.0, ALL[2:])
        time.sleep(0.2)
        assert stranger.poll() is None
        assert not has_ended(learner)
    finally:
        stranger.kill()
        stranger.wait()


def test_another_engine_replaces_silent_workers_itself_but_its_failed_job_counts(make_run):
    run = make_run(runner='DaskRunner')
    run.jobs.start(0.0)
    run.jobs.supervise(10_000.0)
    run.jobs.supervise(10_100.0)
    assert len(run.started) == 2
    run.kill_job(LEARNER, 1)
    run.jobs.supervise(10_200.0)
    run.jobs.supervise(10_203.0)
    assert run.started[2:] == [('learner', (0,))]


def test_stopping_ends_every_job_and_worker(make_run):
    run = make_run()
    run.jobs.start(0.0)
    pids = [run.pid(worker, number) for worker, number in ALL]
    assert run.jobs.running
    run.jobs.stop()
    assert not run.jobs.running
    assert eventually(lambda: all(has_ended(pid) for pid in pids))


def test_what_an_engine_says_of_a_job_is_told_once(make_run):
    run = make_run()
    state = run.directory.logs / 'learner-1.state'
    state.write_text('done, https://page of an earlier job of the same number')
    run.jobs.start(1.0)
    assert run.jobs.news() == []
    state.write_text('running, https://page')
    assert run.jobs.news() == ['learner job 1: running, https://page']
    assert run.jobs.news() == []


def test_a_number_of_a_job_that_has_left_a_log_is_not_given_again(tmp_path):
    with RunDirectory.open(tmp_path / 'run') as directory:
        for name in ('actor-0', 'actor-learner-11', 'launcher', 'replay_7'):
            (directory.logs / f'{name}.log').touch()
        launch = Launch('DirectRunner', None, False, (), (), (), (), ())
        config = presets.experiment('laptop', {})
        for given, expected in ((3, 12), (40, 40)):
            jobs = Jobs(config, launch, Addresses((), (), ''), directory, first_submission=given)
            assert jobs.submissions == expected


def test_a_job_is_told_its_workers_servers_and_beams_flags(tmp_path):
    with RunDirectory.open(tmp_path / 'run') as directory:
        jobs = Jobs(
            presets.experiment('laptop', {}),
            Launch('DirectRunner', None, False, (), (), (), (), ('--job_name=mine',)),
            Addresses(('ps:1', 'ps:2'), ('replay:1',), 'telemetry:1'),
            directory,
        )
        argv = jobs._beam_command([('actor', 0), ('actor', 2)], 7)
        both = jobs._beam_command([('actor', 0), ('learner', 1)], 8)
    assert argv[1:5] == ['-m', 'pipelines.job', '--actors=0,2', '--submission=7']
    assert both[3:6] == ['--actors=0', '--learners=1', '--submission=8']
    assert '--parameter_addresses=ps:1,ps:2' in argv
    assert argv[-2:] == ['--runner=DirectRunner', '--job_name=mine']


def test_runs_of_equal_names_share_no_place_for_statistics_and_a_resumed_run_keeps_its(tmp_path):
    def place(parent, command, resumed=False):
        with RunDirectory.open(tmp_path / parent / 'pong', resumed) as directory:
            provenance.add_launch(directory.launches_file, provenance.describe([command]))
            directory.config_file.touch()
            flags = ('--temp_location=gs://bucket/tmp',)
            launch = Launch('DataflowRunner', None, resumed, (), (), (), (), flags)
            addresses = Addresses((), (), '')
            return Jobs(presets.experiment('laptop', {}), launch, addresses, directory)._settings

    one, other = (place(parent, f'run.py {parent}').statistics_dir for parent in ('a', 'b'))
    assert re.fullmatch('gs://bucket/tmp/gorila-pong-[0-9a-f]{8}/statistics', one)
    assert re.fullmatch('gs://bucket/tmp/gorila-pong-[0-9a-f]{8}/statistics', other)
    assert one != other
    assert place('a', 'run.py --resume', resumed=True).statistics_dir == one
