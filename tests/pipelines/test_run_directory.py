"""The run directory: refusals with a remedy, the lock, numbered checkpoints."""

import contextlib
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from infra import disk
from infra.disk import beside
from pipelines.errors import UsageError
from pipelines.storage import run_directory, space
from pipelines.storage.run_directory import RunDirectory
from tests.support.names import UNFIT_NAMES

ROOT = pathlib.Path(__file__).resolve().parents[2]


def started_run(path: pathlib.Path) -> pathlib.Path:
    """A directory as a run leaves it."""
    with RunDirectory.open(path) as directory:
        disk.write_json(directory.config_file, {'preset': 'laptop'})
    return path


def add_checkpoint(directory: RunDirectory, updates: int) -> None:
    with directory.new_checkpoint() as path:
        disk.write_json(path / 'run.json', {'updates': updates})


def updates_of(checkpoint: pathlib.Path) -> int:
    return json.loads((checkpoint / 'run.json').read_text())['updates']


class TestOpening:
    def test_a_new_run_gets_the_directories_that_are_written_to_at_once(self, tmp_path):
        with RunDirectory.open(tmp_path / 'runs' / 'a') as directory:
            names = {path.name for path in directory.path.iterdir()}
        assert names == {'.lock', 'events', 'logs'}

    def test_an_empty_directory_may_be_used(self, tmp_path):
        with RunDirectory.open(tmp_path) as directory:
            assert directory.logs.is_dir()

    def test_a_used_directory_is_refused_with_both_remedies(self, tmp_path):
        path = started_run(tmp_path / 'a')
        with pytest.raises(UsageError) as refusal:
            RunDirectory.open(path)
        message = str(refusal.value)
        assert str(path) in message
        assert 'another --run_dir' in message
        assert '--resume' in message
        assert '\n' not in message

    def test_a_directory_with_other_things_is_refused_and_left_alone(self, tmp_path):
        (tmp_path / 'thesis.tex').write_text('precious')
        with pytest.raises(UsageError, match='not an empty directory'):
            RunDirectory.open(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']

    def test_resume_takes_over_a_used_directory(self, tmp_path):
        path = started_run(tmp_path / 'a')
        with RunDirectory.open(path, resume=True) as directory:
            assert directory.config_file.is_file()

    def test_resume_of_a_missing_directory_is_refused_and_makes_none(self, tmp_path):
        with pytest.raises(UsageError, match='no such run directory'):
            RunDirectory.open(tmp_path / 'a', resume=True)
        assert not (tmp_path / 'a').exists()

    def test_resume_of_a_directory_without_a_run_is_refused(self, tmp_path):
        with pytest.raises(UsageError, match=r'config\.json is missing'):
            RunDirectory.open(tmp_path, resume=True)

    @pytest.mark.parametrize('name', ['checkpoints', 'events', 'logs', 'policy', 'servers'])
    def test_resume_names_a_file_where_a_directory_belongs(self, tmp_path, name):
        path = started_run(tmp_path / 'a')
        with contextlib.suppress(FileNotFoundError):
            (path / name).rmdir()
        (path / name).write_text('')
        with pytest.raises(UsageError) as refusal:
            RunDirectory.open(path, resume=True)
        remedy = 'put the directory back, or remove the file'
        assert str(refusal.value) == f'{path / name}: not a directory. Fix: {remedy}.'

    @pytest.mark.parametrize('name', ['.lock', 'episodes.jsonl', 'launches.jsonl', 'summary.json'])
    def test_resume_names_a_directory_where_a_file_belongs(self, tmp_path, name):
        path = started_run(tmp_path / 'a')
        (path / name).unlink(missing_ok=True)
        (path / name).mkdir()
        with pytest.raises(UsageError) as refusal:
            RunDirectory.open(path, resume=True)
        remedy = 'put the file back, or remove the directory'
        assert str(refusal.value) == f'{path / name}: not a file. Fix: {remedy}.'

    def test_existing_reads_a_directory_in_use_but_not_one_without_a_run(self, tmp_path):
        path = started_run(tmp_path / 'a')
        with RunDirectory.open(path, resume=True):
            assert RunDirectory.existing(path).latest_checkpoints() == []
        with pytest.raises(UsageError, match='holds no run'):
            RunDirectory.existing(tmp_path)

    @pytest.mark.parametrize('name', ['file/run', 'file', '/proc/no/run'])
    def test_an_unwritable_path_is_refused_naming_it(self, tmp_path, name):
        (tmp_path / 'file').write_text('')
        path = tmp_path / name  # an absolute name replaces tmp_path
        with pytest.raises(UsageError, match=r'cannot be written .*choose another --run_dir'):
            RunDirectory.open(path)
        assert list(tmp_path.iterdir()) == [tmp_path / 'file']

    @pytest.mark.parametrize('name', UNFIT_NAMES)
    def test_a_name_that_no_run_can_work_with_is_refused_in_one_line(self, tmp_path, name):
        takers: list[Callable] = [RunDirectory.open, RunDirectory.existing]
        for take in takers:
            with pytest.raises(UsageError, match=UNFIT_NAMES[name]) as refusal:
                take(tmp_path / name / 'run')
            assert str(refusal.value).isprintable()
        assert list(tmp_path.iterdir()) == []

    def test_a_usage_error_in_a_new_run_leaves_nothing(self, tmp_path):
        with pytest.raises(UsageError), RunDirectory.open(tmp_path / 'runs' / 'a') as directory:
            disk.write_json(directory.config_file, {})
            raise UsageError('port 1 is busy')
        assert list(tmp_path.iterdir()) == []

    def test_a_usage_error_in_a_resumed_run_removes_nothing(self, tmp_path):
        path = started_run(tmp_path / 'a')
        with pytest.raises(UsageError), RunDirectory.open(path, resume=True):
            raise UsageError('port 1 is busy')
        assert (path / 'config.json').is_file()

    def test_default_path_names_game_preset_and_time_and_avoids_an_old_one(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        now = datetime.datetime(2026, 11, 22, 18, 5, 9)
        path = run_directory.default_path('pong', 'laptop', now)
        assert path == pathlib.Path('runs/pong-laptop-20261122-180509')
        path.mkdir(parents=True)
        assert run_directory.default_path('pong', 'laptop', now).name == path.name + '-2'
        path = run_directory.default_path('MinAtar/Asterix-v1', 'minatar', now)
        assert path == pathlib.Path('runs/MinAtar_Asterix-v1-minatar-20261122-180509')


def test_a_command_is_what_the_user_types_in_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'executable', str(ROOT / '.venv' / 'bin' / 'python'))
    monkeypatch.chdir(ROOT)
    typed = run_directory.command('run', ROOT / 'runs' / 'a run', '--resume')
    assert typed == "`.venv/bin/python pipelines/run.py --run_dir 'runs/a run' --resume`"
    monkeypatch.chdir(tmp_path)
    typed = run_directory.command('stop', 'gs://bucket/a')
    assert typed == (f'`{ROOT}/.venv/bin/python {ROOT}/pipelines/stop.py --run_dir gs://bucket/a`')


class TestLock:
    def test_a_second_run_is_refused_naming_the_first(self, tmp_path):
        path = started_run(tmp_path / 'a')
        with RunDirectory.open(path, resume=True):
            with pytest.raises(UsageError, match=f'in use by .*process {os.getpid()}'):
                RunDirectory.open(path, resume=True)

    def test_the_lock_is_free_after_close(self, tmp_path):
        path = started_run(tmp_path / 'a')
        for _ in range(2):
            RunDirectory.open(path, resume=True).close()

    def test_a_new_run_in_an_active_runs_directory_is_told_to_wait(self, tmp_path):
        path = started_run(tmp_path / 'a')
        program = (
            'import sys\n'
            'from pipelines.storage.run_directory import RunDirectory\n'
            'directory = RunDirectory.open(sys.argv[1], resume=True)\n'
            'print("held", flush=True)\n'
            'sys.stdin.read()\n'
        )
        argv = [sys.executable, '-c', program, str(path)]
        with subprocess.Popen(
            argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b'held\n'
            for resume in (False, True):
                with pytest.raises(UsageError) as refusal:
                    RunDirectory.open(path, resume=resume)
                assert str(refusal.value) == (
                    f'{path}: in use by process {holder.pid}. Fix: wait until it ends, stop it with'
                    f' {run_directory.command("stop", path)}, or choose another --run_dir.'
                )
            holder.communicate()

    def test_a_killed_run_gives_the_lock_free(self, tmp_path):
        path = started_run(tmp_path / 'a')
        program = (
            'import sys, time\n'
            'from pipelines.storage.run_directory import RunDirectory\n'
            'directory = RunDirectory.open(sys.argv[1], resume=True)\n'
            'print("held", flush=True)\n'
            'time.sleep(60)\n'
        )
        holder = subprocess.Popen(
            [sys.executable, '-c', program, str(path)], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == b'held\n'
            with pytest.raises(UsageError, match=f'process {holder.pid}'):
                RunDirectory.open(path, resume=True)
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait(10)
            holder.stdout.close()
        RunDirectory.open(path, resume=True).close()


class TestCheckpoints:
    def test_latest_checkpoints_come_newest_first(self, directory):
        for updates in (10, 20, 15):  # numbers follow time, not updates: a resume goes back
            add_checkpoint(directory, updates)
        assert [updates_of(path) for path in directory.latest_checkpoints()] == [15, 20, 10]
        assert directory.latest_checkpoints()[0].name == 'checkpoint-00000003'

    def test_a_failed_write_publishes_nothing_and_leaves_nothing(self, directory):
        with pytest.raises(ZeroDivisionError), directory.new_checkpoint() as path:
            (path / 'run.json').write_text('{}')
            raise ZeroDivisionError
        assert list(directory.checkpoints.iterdir()) == []

    def test_a_checkpoint_without_run_json_is_not_published(self, directory):
        with pytest.raises(FileNotFoundError, match=r'run\.json'), directory.new_checkpoint():
            pass
        assert list(directory.checkpoints.iterdir()) == []

    def test_an_unfinished_checkpoint_is_not_listed_and_is_removed_at_resume(self, tmp_path):
        path = started_run(tmp_path / 'b')
        leftover = path / 'checkpoints' / '.writing-checkpoint-00000001'
        leftover.mkdir(parents=True)
        (leftover / 'run.json').write_text('{}')
        assert RunDirectory.existing(path).latest_checkpoints() == []
        with RunDirectory.open(path, resume=True):
            assert not leftover.exists()

    def test_what_a_kill_in_the_midst_of_writing_left_is_removed_at_resume(self, tmp_path):
        path = started_run(tmp_path / 'b')
        whole = sorted(entry.name for entry in path.iterdir())
        beside(path / 'learning_curve.png').write_text('half')
        (beside(path / 'policy') / 'new').mkdir(parents=True)
        (path / 'servers').mkdir()
        beside(path / 'servers' / 'replay_0.ready').write_text('{')
        (path / 'servers' / 'replay' / 'shard-0' / '00000001-2026').mkdir(parents=True)
        (path / 'servers' / 'parameters-3').mkdir()
        with RunDirectory.open(path, resume=True):
            assert sorted(entry.name for entry in path.iterdir()) == [*whole, 'servers']
            assert [entry.name for entry in (path / 'servers').iterdir()] == ['parameters-3']

    def test_prune_keeps_the_newest(self, directory):
        for updates in range(4):
            add_checkpoint(directory, updates)
        directory.prune(keep=2)
        assert [updates_of(path) for path in directory.latest_checkpoints()] == [3, 2]
        assert len(list(directory.checkpoints.iterdir())) == 2

    def test_a_damaged_checkpoint_set_aside_does_not_push_a_good_one_out(self, directory):
        for updates in range(3):
            add_checkpoint(directory, updates)
        aside = disk.set_aside(directory.latest_checkpoints()[0])
        directory.prune(keep=2)
        add_checkpoint(directory, 3)
        assert [updates_of(path) for path in directory.latest_checkpoints()] == [3, 1, 0]
        assert aside.is_dir()  # nothing is lost
        # The number of the damaged one is not given again.
        assert directory.latest_checkpoints()[0].name == 'checkpoint-00000004'


class TestDiscarding:
    def test_a_discarded_new_directory_leaves_nothing(self, tmp_path):
        with RunDirectory.open(tmp_path / 'new' / 'run') as directory:
            directory.config_file.write_text('{}')
            directory.discard()
        assert list(tmp_path.iterdir()) == []

    def test_an_empty_directory_that_was_there_stays_and_is_empty(self, tmp_path):
        with RunDirectory.open(tmp_path) as directory:
            directory.config_file.write_text('{}')
            directory.discard()
        assert list(tmp_path.iterdir()) == []

    def test_what_a_resumed_run_found_is_kept(self, tmp_path):
        started_run(tmp_path / 'run')
        with RunDirectory.open(tmp_path / 'run', resume=True) as directory:
            directory.discard()
        assert (tmp_path / 'run' / 'config.json').exists()


class TestResources:
    def test_enough_disk_and_memory_pass(self, tmp_path):
        space.require_disk(tmp_path / 'not' / 'yet' / 'there', 1)
        space.require_memory(1)

    def test_too_little_disk_names_path_need_and_remedy(self, tmp_path):
        with pytest.raises(
            UsageError, match=r'a: .* the run needs 1048576\.0 GiB\. Fix: free some'
        ):
            space.require_disk(tmp_path / 'a', 2**50)  # 2^50 / 2^30 GiB

    def test_too_little_memory_names_need_and_remedy(self):
        with pytest.raises(
            UsageError, match=r'needs 1048576\.0 GiB\. Fix: end .*--replay_capacity'
        ):
            space.require_memory(2**50)
