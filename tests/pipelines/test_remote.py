"""Runs whose directory is at gs://: copied as they go on, claimed, fetched, evaluated there."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import tracemalloc
import types

import numpy as np
import pytest
from apache_beam.internal.gcp import auth
from apache_beam.io.gcp import gcsio_retry
from apache_beam.io.localfilesystem import LocalFileSystem
from google.cloud.storage.retry import DEFAULT_RETRY  # type: ignore[import-untyped]

from infra.disk import write_json
from pipelines import evaluate, export, job, report, run, stop
from pipelines import mirror as mirror_command
from pipelines.errors import UsageError
from pipelines.experiment import builders, command_line, presets
from pipelines.experiment import config as config_lib
from pipelines.launch import launcher
from pipelines.launch.interrupts import Signals
from pipelines.monitoring.display import open_display
from pipelines.storage import mirror, object_store, remote_reading, remote_run
from pipelines.storage.checkpoints import Checkpoints, readable_counters
from pipelines.storage.mirror import Mirror
from pipelines.storage.object_store import MissingError, Place, RemoteError
from pipelines.storage.remote_run import RemoteRun
from pipelines.storage.run_directory import MARK_FILE, RunDirectory, command
from pipelines.storage.snapshots import Snapshots, keep_best
from tests.support import parameter_servers
from tests.support.gcs import BUCKET, Gcs
from tests.support.waiting import eventually

ROOT = pathlib.Path(__file__).resolve().parents[2]
URL = f'gs://{BUCKET}/runs/pong'
BELOW = 'runs/pong/'
CONFIG = presets.experiment(
    'laptop', {'torso': 'dqn2013_half', 'evaluation_episodes': 2, 'evaluation_max_frames': 200}
)
FIRST, SECOND, THIRD = (f'checkpoints/checkpoint-0000000{number}/' for number in (1, 2, 3))


@pytest.fixture
def gcs(tmp_path, monkeypatch):
    """The storage; Google's client, which tries for two minutes, gives up after half a second."""
    monkeypatch.setattr(auth._Credentials, '_credentials_init', False)
    monkeypatch.setattr(auth._Credentials, '_credentials', None)
    for retry in (DEFAULT_RETRY, gcsio_retry.DEFAULT_RETRY_WITH_THROTTLING_COUNTER):
        monkeypatch.setattr(retry, '_timeout', 0.5)
        monkeypatch.setattr(retry, '_deadline', 0.5)
    monkeypatch.setattr(mirror, '_LAST_DELAY_SECONDS', 0.05)
    with Gcs() as storage:
        for name, value in storage.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv('NO_GCE_CHECK', 'true')
        monkeypatch.chdir(tmp_path)
        yield storage


@pytest.fixture
def short_periods(monkeypatch):
    for module in (mirror, remote_run):
        monkeypatch.setattr(module, 'PERIOD_SECONDS', 0.05)


@pytest.fixture(scope='module')
def client():
    """A client of a parameter server with the network of `CONFIG`."""
    policy = builders.build_policy(CONFIG)
    with contextlib.ExitStack() as stack:
        shards = stack.enter_context(
            parameter_servers.serve(parameter_servers.config(max_staleness=100))
        )
        addresses = [shard.address for shard in shards]
        connected = parameter_servers.connect(addresses, builders.layout_of(policy))
        stack.enter_context(connected).initialise(policy.parameters())
        yield connected


class Run:
    """A remote run as the launcher has it, but for the training.

    Attributes:
      told: what its user was told.
    """

    def __init__(self, client, resume=False, url=URL, work_dir=None):
        self.told: list[str] = []
        self.remote = RemoteRun(url, work_dir)
        try:
            path = self.remote.open(resume, self.told.append)
            self.directory = RunDirectory.open(path, resume)
        except BaseException:
            self.remote.close()
            raise
        self.directory.config_file.write_text(config_lib.to_json(CONFIG))
        self._client = client
        self.checkpoints = Checkpoints(self.directory, CONFIG)
        self.mirror = Mirror(self.remote, self.directory, self.told.append)
        self.remote.mark()

    def save(self):
        """Trains for an update and writes a checkpoint."""
        gradient = np.full(self._client.layout.size, 1e-6, np.float32)
        pushed = self._client.push(gradient, self._client.pull().version)
        assert pushed.rejected is None
        updates = self._client.report()['shards'][0]['version']
        self.checkpoints.save(self._client, (), {'updates': updates})
        return updates

    def die(self):
        """As by `kill -9`: nothing is given free but the kernel's lock."""
        self.directory.close()

    def end(self):
        self.mirror.copy(last=True)
        self.directory.close()
        self.remote.close()


@pytest.fixture
def start(gcs, client):
    """Starts runs; those that have not ended end with the test."""
    runs = []

    def start_(*args, **kwargs):
        runs.append(Run(client, *args, **kwargs))
        return runs[-1]

    yield start_
    for started in runs:
        started.directory.close()


def launch(started, train):
    """The launcher's part in a run that has been started, the training being `train`."""
    parsed, _, _ = command_line.parse([f'--run_dir={URL}'])
    with open_display() as display, Signals(display, started.directory) as signals:
        whole = launcher.Launcher(CONFIG, parsed, started.directory, display, signals)
        whole.run = train  # type: ignore[method-assign]
        return launcher.mirrored(whole, started.remote)


def puts(gcs, since=0):
    """Names of the files written to the run's place, in their order, without those of owners."""
    named = [name.removeprefix(BELOW) for kind, name in gcs.changes[since:] if kind == 'put']
    return [name for name in named if name != 'owner.json']


def complete(gcs):
    """Numbers of the checkpoints that are complete at the place."""
    paths = [name.split('/') for name in gcs.names(BELOW) if name.endswith('/run.json')]
    return sorted(int(path[1].removeprefix('checkpoint-')) for path in paths)


class TestMirror:
    def test_what_lasts_of_a_run_arrives_and_what_is_local_does_not(self, gcs, start):
        new = start()
        path = new.directory.path
        for name in ('episodes.jsonl', 'events/events.1', 'logs/actor.log', 'policy/a/saved.pb'):
            (path / name).parent.mkdir(exist_ok=True, parents=True)
            (path / name).write_text(name)
        for name in (
            'servers/parameters-1/part',
            '.episodes.jsonl.x7',
            'checkpoints/.writing-checkpoint-00000007/part',
            'checkpoints/.replaced-checkpoint-00000006/run.json',
            'checkpoints/damaged-checkpoint-00000005/run.json',
        ):
            (path / name).parent.mkdir(exist_ok=True, parents=True)
            (path / name).write_text(name)
        new.save()
        new.mirror.copy()
        expected = {
            file.relative_to(path).as_posix()
            for file in path.glob('checkpoints/checkpoint-*/**/*.*')
        }
        expected |= {'config.json', 'episodes.jsonl', 'events/events.1', 'logs/actor.log'}
        expected |= {'policy/a/saved.pb', 'owner.json'}
        assert gcs.names(BELOW) == expected
        for name in expected - {'owner.json'}:
            assert gcs.content(BELOW + name) == (path / name).read_bytes()

    def test_only_what_changed_is_sent_again(self, gcs, start):
        new = start()
        (new.directory.path / 'summary.json').write_text('{}')
        new.save()
        new.mirror.copy()
        before = len(gcs.changes)
        new.mirror.copy()
        assert gcs.changes[before:] == []
        (new.directory.path / 'summary.json').write_text('{"frames": 1}')
        new.mirror.copy()
        assert gcs.changes[before:] == [('put', BELOW + 'summary.json')]

    def test_a_file_that_grows_is_sent_seldom_while_it_is_large(self, gcs, start):
        new = start()
        log = new.directory.logs / 'actor.log'
        log.write_bytes(bytes(2_000_000))  # ten seconds at 200 kB/s
        new.mirror.copy()
        with log.open('ab') as file:
            file.write(b'more')
        new.mirror.copy()
        assert len(gcs.content(f'{BELOW}logs/actor.log')) == 2_000_000
        new.save()  # with which the rest must agree
        new.mirror.copy()
        assert len(gcs.content(f'{BELOW}logs/actor.log')) == 2_000_004

    def test_a_checkpoint_is_there_whole_or_not_at_all(self, gcs, start):
        new = start()
        new.save()
        (new.directory.path / FIRST / 'z-later-in-the-alphabet').write_text('than run.json')
        # The upload of the second file of the parameters fails half-way.
        seen = []

        def refuse(method, address):
            if method == 'PUT' and '/parameters/' in address:
                seen.append(address)
                return 403 if len(seen) == 2 else None
            return None

        gcs.refuse = refuse
        with pytest.raises(RemoteError, match='403'):
            new.mirror.copy()
        sent = {name for name in gcs.names(BELOW) if name.startswith(FIRST)}
        assert len(sent) == 1
        assert complete(gcs) == []
        before = len(gcs.changes)
        new.mirror.copy()
        again = puts(gcs, before)
        assert not sent & set(again)  # what had arrived is not sent twice
        assert again.index(f'{FIRST}run.json') == len(again) - 1
        local = new.directory.path / FIRST
        there = {name.removeprefix(FIRST) for name in gcs.names(BELOW) if name.startswith(FIRST)}
        assert there == {
            file.relative_to(local).as_posix() for file in local.rglob('*') if file.is_file()
        }

    def test_episodes_are_sent_before_the_checkpoint_that_counts_them(self, gcs, start):
        new = start()
        new.directory.episodes_file.write_text('{}\n')
        new.save()
        new.mirror.copy()
        order = puts(gcs)
        assert order[0] == 'config.json'
        assert order.index('episodes.jsonl') < order.index(f'{FIRST}run.json')

    def test_of_a_pruned_checkpoint_run_json_goes_first(self, gcs, start):
        new = start()
        for _ in range(2):
            new.save()
        new.mirror.copy()
        new.save()
        new.mirror.copy()
        assert complete(gcs) == [2, 3]
        assert not {name for name in gcs.names(BELOW) if name.startswith(FIRST)}
        of_first = [name for kind, name in gcs.changes if kind == 'delete']
        assert of_first[0] == f'{BELOW}{FIRST}run.json'
        assert len(of_first) > 3
        # And only when the newest was there.
        newest = gcs.changes.index(('put', f'{BELOW}{THIRD}run.json'))
        assert newest < gcs.changes.index(('delete', of_first[0]))

    def test_the_last_complete_checkpoint_stays_until_another_is_there(self, gcs, start):
        new = start()
        new.save()
        new.mirror.copy()
        for _ in range(2):
            new.save()

        # All the files of the new ones are pruned while they are being sent.
        def refuse(method, address):
            if method == 'PUT' and THIRD in address:
                for _ in range(2):
                    new.save()

        gcs.refuse = refuse
        new.mirror.copy()
        assert complete(gcs) == [1]
        assert 'pruned before' in new.told[-1]
        gcs.refuse = lambda *_: None
        new.mirror.copy()
        assert len(complete(gcs)) == 2
        assert 1 not in complete(gcs)

    def test_a_removed_local_copy_leaves_the_remote_run_alone(self, gcs, start):
        new = start()
        new.save()
        new.mirror.copy()
        before = gcs.names(BELOW)
        for file in new.directory.path.rglob('*.*'):
            if file.is_file():
                file.unlink()
        new.mirror.copy()
        assert gcs.names(BELOW) == before

    @pytest.mark.usefixtures('short_periods')
    def test_a_place_that_is_away_is_told_of_once_and_caught_up_with(self, gcs, start):
        new = start()
        with new.mirror:
            assert eventually(lambda: 'config.json' in gcs.names(BELOW))
            gcs.stop()
            new.directory.episodes_file.write_text('{}\n')
            assert eventually(lambda: len(new.told) == 1)
            new.save()
            time.sleep(1.5)  # some more tries
            gcs.start()
            assert eventually(lambda: len(new.told) == 2)
            assert complete(gcs) == [1]
        assert URL in new.told[0]
        assert 'retrying' in new.told[0]
        assert new.told[1:] == [f'{URL}: reachable again, everything is uploaded']
        assert new.mirror.problem == ''

    @pytest.mark.usefixtures('short_periods')
    def test_the_end_waits_for_the_last_pass(self, gcs, start):
        new = start()
        with new.mirror:
            new.save()
            new.directory.summary_file.write_text('{"exit_reason": "max_frames"}')
        assert new.mirror.problem == ''
        assert complete(gcs) == [1]
        assert gcs.content(f'{BELOW}summary.json') == new.directory.summary_file.read_bytes()

    @pytest.mark.usefixtures('short_periods')
    @pytest.mark.parametrize('code', [0, 130])
    def test_the_launcher_keeps_the_exit_code_of_a_run_that_is_there(self, start, code, capsys):
        new = start()
        assert launch(new, lambda: code) == code
        assert f'{URL} is complete' in capsys.readouterr().out

    @pytest.mark.usefixtures('short_periods')
    def test_what_could_not_be_sent_is_named_and_sent_by_a_command(
        self, gcs, start, monkeypatch, capsys
    ):
        monkeypatch.setattr(mirror, '_LAST_SECONDS', 2.0)
        monkeypatch.setattr(remote_run, 'RELEASE_SECONDS', 1.0)
        new = start()
        new.save()
        started = time.monotonic()
        assert launch(new, lambda: gcs.stop() or 0) == 1
        assert time.monotonic() - started < 10
        line = capsys.readouterr().out.strip().splitlines()[-1]
        assert URL in line
        assert 'Connection refused' in line
        assert f'Fix: run {command("mirror", new.directory.path)}.' in line
        assert line.count('Fix: ') == 1
        new.remote.close()
        new.directory.close()
        gcs.start()
        assert mirror_command.main([f'--run_dir={new.directory.path}']) == 0
        assert URL in capsys.readouterr().out
        assert complete(gcs) == [1]
        assert 'owner.json' not in gcs.names(BELOW)

    @pytest.mark.usefixtures('short_periods')
    def test_a_new_run_that_leaves_nothing_here_leaves_nothing_there(self, gcs, start):
        new = start()
        with new.mirror:
            assert eventually(lambda: 'config.json' in gcs.names(BELOW))
            new.directory.discard()
        new.remote.close()
        assert gcs.names(BELOW) == set()

    def test_a_command_for_an_older_copy_is_refused(self, gcs, start, capsys):
        old = start()
        old.save()
        old.end()
        newer = start(resume=True, work_dir='elsewhere')
        newer.save()
        newer.end()
        before = gcs.changes
        assert mirror_command.main([f'--run_dir={old.directory.path}']) == 2
        assert 'nothing copied' in capsys.readouterr().err
        assert [change for change in gcs.changes[len(before) :] if 'owner' not in change[1]] == []


class TestResuming:
    def test_another_machine_fetches_the_run_and_goes_on(self, gcs, start, tmp_path):
        new = start()
        (new.directory.path / 'episodes.jsonl').write_text('{}\n')
        new.save()
        updates = new.save()
        new.end()
        gcs.put(f'{BELOW}{THIRD}parameters/part', b'of a checkpoint that was cut short')
        (tmp_path / 'runs').rename(tmp_path / 'the-other-machine')
        before = len(gcs.changes)

        resumed = start(resume=True)
        assert resumed.directory.path == tmp_path / 'runs' / 'pong'
        assert any('fetching' in text for text in resumed.told)
        assert readable_counters(resumed.directory)['updates'] == updates
        assert (resumed.directory.path / 'episodes.jsonl').read_text() == '{}\n'
        assert [path.name for path in resumed.directory.latest_checkpoints()] == [
            'checkpoint-00000002',
            'checkpoint-00000001',
        ]
        resumed.save()
        resumed.end()
        assert complete(gcs) == [2, 3]
        # Sent: what is new, and the configuration that was written again.
        assert {name for name in puts(gcs, before) if not name.startswith(THIRD)} == {'config.json'}
        assert f'{THIRD}parameters/part' not in gcs.names(BELOW)

    def test_the_same_machine_goes_on_with_its_copy_if_that_is_as_new(self, gcs, start):
        new = start()
        new.save()
        new.mirror.copy()
        updates = new.save()  # which nobody has copied
        new.die()
        before = len(gcs.changes)
        resumed = start(resume=True)
        assert resumed.directory.path == new.directory.path
        assert f'{updates} updates' in resumed.told[-1]
        assert 'local copy' in resumed.told[-1]
        resumed.end()
        assert complete(gcs) == [1, 2]
        assert not [name for name in puts(gcs, before) if name.startswith(FIRST)]

    def test_a_copy_that_is_older_is_kept_beside_the_fetched_one(self, gcs, start, tmp_path):
        old = start()
        older = old.save()
        old.end()
        elsewhere = start(resume=True, work_dir='elsewhere')
        newer = elsewhere.save()
        elsewhere.end()
        resumed = start(resume=True)
        assert resumed.directory.path == old.directory.path
        assert readable_counters(resumed.directory)['updates'] == newer
        (kept,) = (tmp_path / 'runs').glob('pong-before-*')
        assert readable_counters(RunDirectory.existing(kept))['updates'] == older
        assert str(kept) in '\n'.join(resumed.told)

    def test_a_damaged_copy_gives_way_to_the_whole_one_there(self, gcs, start):
        new = start()
        new.save()
        updates = new.save()
        new.end()
        (part, *_) = (new.directory.path / SECOND / 'parameters').glob('*.data-*')
        part.write_bytes(part.read_bytes()[:-8])
        resumed = start(resume=True)
        assert readable_counters(resumed.directory)['updates'] == updates

    def test_another_checkpoint_of_the_same_number_is_replaced_run_json_first(self, gcs, start):
        new = start()
        new.save()
        new.end()
        gcs.put(f'{BELOW}{FIRST}run.json', b'{"updates": 0}')  # as another machine had it
        before = len(gcs.changes)
        resumed = start(resume=True)
        resumed.end()
        changes = [c for c in gcs.changes[before:] if FIRST in c[1]]
        assert changes[0] == ('delete', f'{BELOW}{FIRST}run.json')
        assert changes[-1] == ('put', f'{BELOW}{FIRST}run.json')
        assert len(changes) > 3

    def test_a_fetch_that_is_cut_short_leaves_no_local_copy(self, gcs, start, tmp_path):
        new = start()
        new.save()
        new.end()
        gcs.refuse = lambda _, address: (
            403 if '/download' in address and 'manifest' in address else None
        )
        with pytest.raises(UsageError, match='403'):
            start(resume=True, work_dir='elsewhere')
        gcs.refuse = lambda _, address: None
        assert not list(tmp_path.glob('*elsewhere*'))
        start(resume=True, work_dir='elsewhere')

    def test_a_place_without_a_run_is_refused(self, start):
        with pytest.raises(UsageError, match='holds no run'):
            start(resume=True)

    def test_a_directory_of_something_else_is_left_alone(self, gcs, start, tmp_path):
        for name in ('runs/pong', 'thesis'):
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / 'thesis.tex').write_text('years of work')
        new = start()
        assert new.directory.path == tmp_path / 'runs' / 'pong-2'
        new.save()
        new.end()
        assert start(resume=True).directory.path == tmp_path / 'runs' / 'pong-2'
        with pytest.raises(UsageError, match='not a copy'):
            start(resume=True, work_dir='thesis')


class TestOwner:
    def test_a_place_with_a_run_is_refused_to_a_new_one(self, start):
        start().end()
        with pytest.raises(UsageError, match='--resume'):
            start()

    def test_a_second_launcher_is_refused_and_told_of_the_first(self, gcs, start):
        first = start()
        first.mirror.copy()
        with pytest.raises(UsageError, match=f'process {os.getpid()}') as refusal:
            start(resume=True, work_dir='elsewhere')
        assert str(first.directory.path) in str(refusal.value)
        assert '300 s' in str(refusal.value)
        first.mirror.copy()  # it still has the place

    def test_on_one_machine_the_lock_of_the_copy_refuses_it(self, gcs, start):
        first = start()
        first.mirror.copy()
        owner = gcs.content(f'{BELOW}owner.json')
        with pytest.raises(UsageError, match='in use by process'):
            start(resume=True)
        assert gcs.content(f'{BELOW}owner.json') == owner

    def test_a_launcher_that_died_on_another_machine_counts_for_five_minutes(self, gcs, start):
        first = start()
        first.save()
        first.mirror.copy()
        first.die()
        with pytest.raises(UsageError, match='in use'):
            start(resume=True, work_dir='elsewhere')
        owner = json.loads(gcs.content(f'{BELOW}owner.json'))
        owner['time'] -= 301
        gcs.put(f'{BELOW}owner.json', json.dumps(owner).encode())
        start(resume=True, work_dir='elsewhere')

    @pytest.mark.usefixtures('short_periods')
    def test_a_launcher_that_lost_its_place_writes_there_no_more(self, gcs, start):
        first = start()
        with first.mirror:
            assert eventually(lambda: 'config.json' in gcs.names(BELOW))
            owner = {'id': 'another', 'host': 'far-away', 'time': time.time()}

            def seen():
                # Again, since the first launcher may have been about to write it.
                gcs.put(f'{BELOW}owner.json', json.dumps(owner).encode())
                return bool(first.told)

            assert eventually(seen)
            first.directory.summary_file.write_text('{}')
        assert 'far-away' in first.told[0]
        assert 'far-away' in first.mirror.problem
        first.remote.close()
        assert json.loads(gcs.content(f'{BELOW}owner.json')) == owner
        assert 'summary.json' not in gcs.names(BELOW)

    def test_the_mark_of_a_copy_is_not_copied(self, gcs, start):
        new = start()
        new.end()
        assert (new.directory.path / MARK_FILE).exists()
        assert gcs.names(BELOW) == {'config.json'}


class DiskFileSystem(LocalFileSystem):
    """A place that has directories: `disk://` and a path of this machine."""

    @classmethod
    def scheme(cls):
        return 'disk'

    def create(self, path, *args, **kwargs):
        return super().create(path.removeprefix('disk://'), *args, **kwargs)

    def open(self, path, *args, **kwargs):
        return super().open(path.removeprefix('disk://'), *args, **kwargs)

    def match(self, patterns, limits=None):
        (result,) = super().match([pattern.removeprefix('disk://') for pattern in patterns])
        for entry in result.metadata_list:
            entry.path = f'disk://{entry.path}'
        return [result]

    def delete(self, paths):
        for path in paths:
            os.remove(path.removeprefix('disk://'))

    def exists(self, path):
        return super().exists(path.removeprefix('disk://'))


def no_beat():
    pass


class TestPlace:
    def test_a_place_with_directories_serves_as_well(self, tmp_path):
        place = Place(f'disk://{tmp_path}/store/pong')
        place.write('a/b/c.json', b'{}')
        assert place.files() == {'a/b/c.json': 2}
        assert place.read('a/b/c.json') == b'{}'
        assert place.read('a/none') is None
        place.delete(['a/b/c.json'])
        place.delete(['a/b/c.json'])  # by now it is not there
        assert place.files() == {}

    def test_a_large_file_passes_in_blocks(self, tmp_path):
        size = 200 << 20
        with (tmp_path / 'replay').open('wb') as file:
            file.truncate(size)
        place = Place(f'disk://{tmp_path}/store')
        tracemalloc.start()
        try:
            place.send(tmp_path / 'replay', 'replay', no_beat)
            place.fetch('replay', tmp_path / 'back', no_beat)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert (tmp_path / 'back').stat().st_size == size
        assert peak < 20 << 20

    def test_a_large_object_arrives_as_it_was(self, gcs, tmp_path):
        content = np.random.default_rng(1).bytes(40 << 20)  # three parts of an upload
        (tmp_path / 'replay').write_bytes(content)
        place = Place.at(URL)
        place.send(tmp_path / 'replay', 'replay', no_beat)
        assert gcs.content(f'{BELOW}replay') == content
        assert place.fetch('replay', tmp_path / 'back', no_beat)[0] == len(content)
        assert (tmp_path / 'back').read_bytes() == content

    def test_what_fails_half_way_makes_no_object(self, gcs, tmp_path):
        (tmp_path / 'log').write_bytes(bytes(10 << 20))

        def fail():
            raise OSError('the disk is broken')

        with pytest.raises(OSError, match='broken'):
            Place.at(URL).send(tmp_path / 'log', 'log', fail)
        assert gcs.names(BELOW) == set()

    def test_a_name_that_looks_compressed_is_copied_as_it_is(self, gcs, tmp_path):
        (tmp_path / 'log.gz').write_bytes(b'plain')
        Place.at(URL).send(tmp_path / 'log.gz', 'log.gz', no_beat)
        assert gcs.content(f'{BELOW}log.gz') == b'plain'

    def test_a_missing_object_is_named(self, gcs, tmp_path):
        with pytest.raises(MissingError, match='runs/pong/nothing'):
            Place.at(URL).fetch('nothing', tmp_path / 'back', no_beat)

    def test_a_file_that_is_gone_is_no_error(self, gcs, tmp_path):
        assert Place.at(URL).send(tmp_path / 'gone', 'gone', no_beat) is None
        assert gcs.names(BELOW) == set()


@pytest.fixture
def rejected(gcs, tmp_path, capsys):
    """Starts the main job with a remote directory that it must refuse; returns the line it says."""

    def check(url, *flags):
        before = sorted(tmp_path.rglob('*'))
        assert run.main([f'--run_dir={url}', '--replay_capacity=10000', *flags]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert sorted(tmp_path.rglob('*')) == before
        assert gcs.names(BELOW) == set()
        return line

    return check


class TestBadInput:
    def test_a_missing_bucket_is_named(self, rejected):
        assert 'no bucket gs://nowhere' in rejected('gs://nowhere/pong')

    def test_a_bucket_that_may_not_be_read_is_named_with_the_role(self, gcs, rejected):
        gcs.refuse = lambda *_: 403
        line = rejected(URL)
        assert f'gs://{BUCKET}' in line
        assert 'roles/storage.objectUser' in line

    def test_a_bucket_that_may_not_be_written_is_named_with_the_role(self, gcs, rejected):
        gcs.refuse = lambda method, _: 403 if method != 'GET' else None
        assert 'roles/storage.objectUser' in rejected(URL)

    def test_an_unknown_scheme_names_those_that_are_known(self, rejected):
        line = rejected('ftp://host/pong')
        assert 'ftp://' in line
        assert 'gs://' in line

    @pytest.mark.parametrize('url', ['gs://', 'gs:///pong', 'gs://lab/runs/*'])
    def test_no_directory_is_refused(self, rejected, url):
        assert 'not a remote directory' in rejected(url)

    def test_missing_credentials_are_named_with_the_command(self, rejected, monkeypatch, tmp_path):
        monkeypatch.delenv('STORAGE_EMULATOR_HOST')
        monkeypatch.delenv('GOOGLE_APPLICATION_CREDENTIALS')
        monkeypatch.setenv('CLOUDSDK_CONFIG', str(tmp_path))
        assert 'gcloud auth application-default login' in rejected(URL)

    def test_a_place_that_does_not_answer_is_named(self, gcs, rejected, monkeypatch):
        monkeypatch.setattr(object_store, '_ANSWER_SECONDS', 0.2)
        gcs.refuse = lambda *_: time.sleep(1.0)
        assert 'no answer within 0.2 s' in rejected(URL)

    def test_a_place_that_is_away_is_named_with_the_reason(self, gcs, rejected):
        gcs.stop()
        try:
            assert 'Connection refused' in rejected(URL)
        finally:
            gcs.start()

    def test_a_wrong_value_gives_the_place_free(self, rejected):
        assert 'brekout' in rejected(URL, '--game=brekout')

    def test_a_working_directory_without_a_remote_place_is_refused(self, capsys):
        assert run.main(['--run_dir=here', '--work_dir=there']) == 2
        assert '--work_dir' in capsys.readouterr().err

    def test_a_signal_during_the_start_leaves_no_trace(self, gcs, tmp_path):
        started = subprocess.Popen(
            [
                *(sys.executable, 'pipelines/run.py', f'--run_dir={URL}'),
                *(f'--work_dir={tmp_path / "copy"}', '--replay_capacity=10000'),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert started.stdout is not None
        lines = (started.stdout.readline(), started.stdout.readline())
        assert lines[1].startswith('run directory')
        started.send_signal(signal.SIGINT)
        assert started.communicate(timeout=60)[1] == ''
        assert started.returncode == 130
        assert gcs.names(BELOW) == set()
        assert not (tmp_path / 'copy').exists()

    def test_the_run_s_process_cannot_be_stopped_from_its_place(self, capsys):
        assert stop.main([f'--run_dir={URL}/']) == 2
        line = capsys.readouterr().err
        assert 'local copy' in line
        assert f'{URL}/owner.json' in line


def evaluations(gcs):
    """Names of the results that were written back."""
    return [BELOW + name for name in gcs.names(BELOW) if name.startswith('evaluation-')]


class TestReading:
    def test_evaluation_reads_the_newest_parameters_and_writes_back(self, gcs, start, capsys):
        new = start()
        new.save()
        updates = new.save()
        new.mirror.copy()  # and the run goes on
        gcs.put(f'{BELOW}{SECOND}replay/shard-0/data', b'large')
        gcs.refuse = lambda _, address: 403 if '/replay/' in address else None
        assert evaluate.main([f'--run_dir={URL}']) == 0
        assert 'mean return' in capsys.readouterr().out
        (written,) = evaluations(gcs)
        result = json.loads(gcs.content(written))
        assert (result['episodes'], result['updates']) == (2, updates)
        new.mirror.copy(last=True)
        assert evaluations(gcs) == [written]  # the mirror leaves alone what it does not know

    def test_export_of_the_best_reads_it_alone(self, gcs, start):
        new = start()
        new.save()
        new.checkpoints.save_parameters(new._client)
        snapshot = Snapshots(new.directory, since=0.0).take(1)
        assert snapshot is not None
        keep_best(new.directory, snapshot.path, {'mean': 3.0})
        new.mirror.copy()  # and the run goes on
        gcs.refuse = lambda _, address: 403 if 'checkpoint-' in address else None
        assert export.main([f'--run_dir={URL}', '--checkpoint=best']) == 0
        assert 'policy_best/saved_model.pb' in gcs.names(BELOW)
        assert 'policy/saved_model.pb' not in gcs.names(BELOW)

    def test_a_best_that_is_replaced_while_it_is_read_is_read_again(
        self, gcs, start, monkeypatch, capsys
    ):
        new = start()
        new.save()
        for updates in (1, 2):
            new.checkpoints.save_parameters(new._client)
            snapshot = Snapshots(new.directory, since=0.0).take(1)
            assert snapshot is not None
            keep_best(new.directory, snapshot.path, {'mean': float(updates)})
            new.mirror.copy()
        part = next(name for name in gcs.names(BELOW) if 'best/' in name and '.data-' in name)
        whole = gcs.content(f'{BELOW}{part}')
        gcs.put(f'{BELOW}{part}', whole[:-8] + b'of other')
        waited: list[float] = []

        def wait(seconds):
            waited.append(seconds)
            gcs.put(f'{BELOW}{part}', whole)

        monkeypatch.setattr(remote_reading, 'time', types.SimpleNamespace(sleep=wait))
        assert evaluate.main([f'--run_dir={URL}', '--checkpoint=best']) == 0, capsys.readouterr()
        assert waited == [5.0]

    @pytest.mark.parametrize('which', ['7', 'best'])
    def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(
        self, gcs, start, capsys, which
    ):
        new = start()
        new.save()
        new.mirror.copy()
        assert evaluate.main([f'--run_dir={URL}', f'--checkpoint={which}']) == 2
        told = capsys.readouterr().err
        assert f'no checkpoint {which} (there are: checkpoint-00000001)' in told

    def test_export_writes_the_policy_back_in_place_of_the_one_before(self, gcs, start, capsys):
        new = start()
        new.save()
        new.end()
        gcs.put(f'{BELOW}policy/variables/variables.data-00007-of-00008', b'of another policy')
        assert export.main([f'--run_dir={URL}']) == 0
        assert f'{URL}/policy' in capsys.readouterr().out
        names = {name for name in gcs.names(BELOW) if name.startswith('policy/')}
        assert 'policy/saved_model.pb' in names
        assert 'policy/variables/variables.data-00000-of-00001' in names
        assert 'policy/variables/variables.data-00007-of-00008' not in names

    def test_a_report_reads_results_and_leaves_checkpoints_alone(self, gcs, start, tmp_path):
        new = start()
        new.save()
        result = {'protocol': 'noop', 'episodes': 30, 'epsilon': 0.05, 'mean': 20.0, 'std': 1.0}
        write_json(new.directory.path / 'evaluation.json', result)
        new.mirror.copy()  # and the run goes on
        gcs.refuse = lambda _, address: 403 if '/parameters' in address else None
        assert report.main([URL, '--output', str(tmp_path / 'report.html')]) == 0
        assert 'Pong: 20.0 points' in (tmp_path / 'report.html').read_text()

    def test_a_report_of_nothing_remote_names_the_url(self, gcs, tmp_path, capsys):
        assert report.main([URL, '--output', str(tmp_path / 'report.html')]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert URL in line
        assert not (tmp_path / 'report.html').exists()

    def test_a_checkpoint_pruned_meanwhile_is_no_obstacle(self, gcs, start, capsys):
        new = start()
        new.save()
        updates = new.save()
        new.mirror.copy()
        pruned: list[str] = []

        def prune(method, address):
            if f'/{FIRST}parameters' in address and not pruned:
                pruned.append(address)
                for name in gcs.names(BELOW):
                    if name.startswith(FIRST):
                        gcs.delete(BELOW + name)

        gcs.refuse = prune
        assert evaluate.main([f'--run_dir={URL}', '--episodes=1']) == 0
        assert pruned
        assert json.loads(gcs.content(*evaluations(gcs)))['updates'] == updates

    def test_a_run_without_a_checkpoint_is_one_line(self, start, capsys):
        start().mirror.copy()
        assert evaluate.main([f'--run_dir={URL}']) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f'evaluate.py: {URL}: no checkpoint yet')

    def test_a_place_without_a_run_is_one_line(self, gcs, capsys):
        assert export.main([f'--run_dir={URL}']) == 2
        assert 'holds no run' in capsys.readouterr().err

    def test_a_result_that_cannot_be_written_back_is_told(self, gcs, start, capsys):
        start_ = start()
        start_.save()
        start_.end()
        gcs.refuse = lambda method, _: 403 if method != 'GET' else None
        assert evaluate.main([f'--run_dir={URL}', '--episodes=1']) == 2
        assert '403' in capsys.readouterr().err
        assert evaluate.main([f'--run_dir={URL}', '--episodes=1', '--output=here.json']) == 0
        assert json.loads(pathlib.Path('here.json').read_text())['episodes'] == 1

    def test_a_job_reads_its_configuration_from_there(self, gcs, start):
        start().end()
        assert job.read_config(f'{URL}/config.json') == CONFIG
        with pytest.raises(UsageError, match='no such file'):
            job.read_config(f'{URL}/other.json')
