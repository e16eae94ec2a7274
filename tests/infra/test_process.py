"""Supervised processes, with small real children."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra import process as process_lib
from infra.process import ProcessSpec, SupervisedProcess
from tests.support.waiting import eventually, has_ended

ROOT = Path(__file__).resolve().parents[2]

SLEEP = 'import time; time.sleep(60)'
IGNORES_SIGTERM = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True);"
    ' time.sleep(60)'
)
HELD = 'from infra.process import await_release; print("ready"); print(await_release())'
EXITS_WITH_PARENT = (
    'import os, sys, time; from infra.process import exit_with_parent; exit_with_parent();'
    ' exit_with_parent(); print(os.getpid(), flush=True); time.sleep(60)'
)


@pytest.fixture
def start(tmp_path: Path):
    """Starts a Python one-liner; whatever runs at the end of the test is killed."""
    started: list[SupervisedProcess] = []

    def start_code(code: str, **spec: object) -> SupervisedProcess:
        argv = [sys.executable, '-u', '-c', code]
        log_file = tmp_path / 'logs' / 'child.log'
        child = SupervisedProcess(ProcessSpec('child', argv, log_file, **spec))  # type: ignore[arg-type]
        started.append(child)
        child.start()
        return child

    yield start_code
    for child in started:
        child.terminate(grace_seconds=0.0)


class TestSupervisedProcess:
    def test_poll_gives_none_while_running_and_then_the_exit_code(self, start):
        child = start('import sys, time; time.sleep(0.3); sys.exit(7)')
        assert child.poll() is None
        assert child.wait(10.0) == 7
        assert child.poll() == 7

    def test_before_start_nothing_runs_and_terminate_does_nothing(self, tmp_path):
        child = SupervisedProcess(ProcessSpec('child', ['true'], tmp_path / 'log'))
        assert (child.pid, child.poll(), child.terminate(), child.wait(0.0)) == (None,) * 4

    def test_terminate_ends_with_sigterm_and_is_idempotent(self, start):
        child = start(SLEEP)
        assert child.terminate() == -signal.SIGTERM
        assert child.terminate() == -signal.SIGTERM

    def test_terminate_kills_a_process_that_ignores_sigterm(self, start):
        child = start(IGNORES_SIGTERM)
        assert eventually(lambda: child.last_log_lines() == ['deaf'])
        before = time.monotonic()
        assert child.terminate(grace_seconds=0.3) == -signal.SIGKILL
        assert 0.3 <= time.monotonic() - before < 5.0

    def test_a_held_process_goes_on_once_it_is_released_and_not_before(self, start):
        child = start(HELD, held=True)
        assert eventually(lambda: child.last_log_lines() == ['ready'])
        assert child.poll() is None
        child.release()
        assert child.wait(10.0) == 0
        assert child.last_log_lines() == ['ready', 'True']
        child.release()  # too late, without an error

    def test_a_held_process_whose_parent_lets_go_of_it_is_told(self, start):
        child = start(HELD, held=True)
        child._process.stdin.close()  # as by the parent's end
        assert child.wait(10.0) == 0
        assert child.last_log_lines() == ['ready', 'False']

    def test_children_of_an_ended_process_are_killed(self, start):
        child = start(
            f'import subprocess, sys; p = subprocess.Popen([sys.executable, "-c", "{SLEEP}"]);'
            ' print(p.pid)'
        )
        assert child.wait(10.0) == 0
        (grandchild,) = child.last_log_lines()
        assert eventually(lambda: has_ended(int(grandchild)))

    def test_runs_in_a_session_of_its_own(self, start):
        child = start(SLEEP)
        assert os.getsid(child.pid) == child.pid != os.getsid(0)

    def test_nice_is_added_to_the_parents_level(self, start):
        level = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 3)
        child = start(SLEEP, nice=3)
        assert os.getpriority(os.PRIO_PROCESS, child.pid) == level

    def test_environment_is_added_and_unset(self, start, monkeypatch):
        monkeypatch.setenv('GORILA_TEST_UNSET', 'there')
        child = start(
            'import os; print(os.environ["GORILA_TEST_SET"], "GORILA_TEST_UNSET" in os.environ)',
            environment={'GORILA_TEST_SET': 'yes'},
            unset=('GORILA_TEST_UNSET',),
        )
        child.wait(10.0)
        assert child.last_log_lines() == ['yes False']

    def test_ready_is_none_until_the_ready_file_is_written(self, start, tmp_path):
        ready_file = tmp_path / 'ready'
        ready_file.write_text('{"port": 1, "pid": 1}')  # of an earlier process: must not count
        child = start(
            'import time; from infra.process import announce_ready; time.sleep(0.3);'
            f' announce_ready({str(ready_file)!r}, 4321); time.sleep(60)',
            ready_file=ready_file,
        )
        assert child.ready() is None
        assert eventually(lambda: child.ready() is not None)
        assert child.ready() == {'port': 4321, 'pid': child.pid}

    def test_restart_appends_to_the_log_and_forgets_old_lines(self, start, tmp_path):
        child = start('print("one"); print(); print("two")')
        child.wait(10.0)
        assert child.last_log_lines() == ['one', 'two']
        assert child.last_log_lines(1) == ['two']
        child.spec = ProcessSpec('child', ['true'], child.spec.log_file)
        child.start()
        child.wait(10.0)
        assert child.last_log_lines() == []
        assert 'two' in child.spec.log_file.read_text()

    def test_failure_names_process_code_log_and_last_lines(self, start):
        child = start('import sys; print("no such file"); sys.exit(3)')
        child.wait(10.0)
        text = child.describe_failure()
        assert text.startswith('child ended with exit code 3; ')
        assert str(child.spec.log_file) in text
        assert text.endswith('\n  no such file')

    @pytest.mark.parametrize(
        'line',
        [
            'ModuleNotFoundError: No module named agents.config',
            'agents.custom_agent.ForeignAgentError: no licence',
            'KeyError',
            '/opt/venv/bin/python: No module named pipelines.job',
            'Fatal Python error: Segmentation fault',
            'worker process 1 of 2 failed: Worker subprocess exited with return code -9',
        ],
    )
    def test_failure_names_the_last_error_even_far_above_the_end(self, start, line):
        child = start(f'print("OSError: before"); print({line!r}); print("at work\\n" * 50)')
        child.wait(10.0)
        assert child.last_error() == line
        assert f'child ended with exit code 0 ({line}); ' in child.describe_failure()

    def test_a_hang_is_named_in_place_of_the_engines_error_that_follows_from_it(self, start):
        hang = 'actor 0: no step and no update for 15 s (--hang_seconds); it stands at the line'
        for after, named in (('grpc.RpcError', hang), ('OSError: full', 'OSError: full')):
            child = start(f'print({hang!r}); print({after!r})')
            child.wait(10.0)
            assert child.last_error() == named

    @pytest.mark.parametrize(
        'line',
        [
            'INFO: no Error here: or there',
            '/lib/python3.11/google/_python_version_support.py:273: FutureWarning: to end',
            '/lib/python3.11/google/auth/grpc.py:43: FutureWarning: deprecated',
        ],
    )
    def test_a_log_without_an_error_names_none(self, start, line):
        child = start(f'print({line!r})')
        child.wait(10.0)
        assert child.last_error() == ''

    def test_failure_names_the_signal_and_no_error_that_a_child_wrote_after_it(self, start):
        child = start('print("BrokenPipeError: [Errno 32] Broken pipe", flush=True);' + SLEEP)
        assert eventually(child.last_log_lines, 10.0)
        child.signal(signal.SIGKILL)
        child.wait(10.0)
        assert child.last_error() == ''
        assert 'child was ended by SIGKILL;' in child.describe_failure()

    def test_missing_program_is_an_error(self, tmp_path):
        child = SupervisedProcess(ProcessSpec('child', ['/nonexistent'], tmp_path / 'log'))
        with pytest.raises(FileNotFoundError):
            child.start()


class TestExitWithParent:
    def test_child_ends_when_its_parent_is_killed(self):
        run_child = f'subprocess.run([sys.executable, "-c", {EXITS_WITH_PARENT!r}])'
        parent = subprocess.Popen(
            [sys.executable, '-c', f'import subprocess, sys; {run_child}'],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not has_ended(child)
        parent.kill()
        parent.wait()
        assert eventually(lambda: has_ended(child))
        parent.stdout.close()

    def test_child_ends_when_the_launcher_died_before_it_could_look(self):
        gone = subprocess.Popen(['true'])
        gone.wait()
        environment = {**os.environ, process_lib.LAUNCHER_VARIABLE: str(gone.pid)}
        child = subprocess.run(
            [sys.executable, '-c', EXITS_WITH_PARENT],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            timeout=20,
        )
        assert child.returncode == -signal.SIGTERM

    def test_child_that_ignores_sigterm_is_killed(self):
        gone = subprocess.Popen(['true'])
        gone.wait()
        code = f'import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {EXITS_WITH_PARENT}'
        environment = {**os.environ, process_lib.LAUNCHER_VARIABLE: str(gone.pid)}
        child = subprocess.run(
            [sys.executable, '-c', code],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            timeout=30,
        )
        assert child.returncode == -signal.SIGKILL

    def test_child_lives_while_its_parent_does(self, start):
        child = start(EXITS_WITH_PARENT)
        assert eventually(lambda: child.last_log_lines() == [str(child.pid)])
        assert child.wait(2.5) is None  # more than two polls


def test_ready_file_is_written_whole(tmp_path):
    process_lib.announce_ready(tmp_path / 'ready', 17)
    assert json.loads((tmp_path / 'ready').read_text()) == {'port': 17, 'pid': os.getpid()}
    assert [path.name for path in tmp_path.iterdir()] == ['ready']


@pytest.mark.parametrize(
    ('code', 'text'),
    [
        (None, 'still runs'),
        (0, 'ended with exit code 0'),
        (2, 'ended with exit code 2'),
        (-9, 'was ended by SIGKILL'),
    ],
)
def test_exit_is_described(code, text):
    assert process_lib.describe_exit(code) == text


@pytest.mark.parametrize(('variable', 'watched'), [(None, []), ('1', ['yes'])])
def test_only_a_launcher_is_watched_by_what_a_user_may_start_too(monkeypatch, variable, watched):
    calls: list[str] = []
    monkeypatch.setattr(process_lib, 'exit_with_parent', lambda _: calls.append('yes'))
    monkeypatch.delenv(process_lib.LAUNCHER_VARIABLE, raising=False)
    if variable:
        monkeypatch.setenv(process_lib.LAUNCHER_VARIABLE, variable)
    process_lib.exit_with_launcher()
    assert calls == watched
