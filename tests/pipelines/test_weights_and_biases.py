"""Weights & Biases: what an offline run holds, by its own reader; failures end nothing."""

import json
import pathlib
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from pipelines import run
from pipelines.monitoring import weights_and_biases
from pipelines.monitoring.monitor import Monitor
from pipelines.monitoring.run_state import MonitorConfig
from pipelines.monitoring.weights_and_biases import WandbWriter, identity
from tests.support.waiting import eventually

wandb = pytest.importorskip('wandb')

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS: dict[str, Any] = {
    'project': 'gorila',
    'id': 'abc123',
    'name': 'pong-1',
    'config': {'learning_rate': 1e-4, 'launch': {'command': 'run.py --game pong'}},
}


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')


def writer(directory, told):
    return WandbWriter(directory.path, directory.logs / 'wandb.log', SETTINGS, told.append)


def records(file: pathlib.Path):
    """The records of an offline run."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        yield record


def values(items):
    """Values by key; a nested key is joined by dots."""
    found = {}
    for item in items:
        found[item.key or '.'.join(item.nested_key)] = json.loads(item.value_json)
    return found


def test_an_offline_run_in_the_runs_directory_holds_settings_games_scalars_and_summary(
    directory, offline, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    config = MonitorConfig('pong', 'laptop', 7, 4000)
    with writer(directory, told) as sink, Monitor(directory, config, wandb=sink) as monitor:
        monitor.clock(updates=20, agent_steps=200)
        episode = {'kind': 'episode', 'component': 'actor', 'worker': 0, 'session': 's'}
        monitor.fold([{**episode, 'time': 1.0, 'raw_return': -20.0, 'agent_steps': 90}])
        monitor.write_summary('max_frames')
    assert told == []
    (file,) = directory.path.glob('wandb/offline-run-*-abc123/run-abc123.wandb')
    assert not (tmp_path / 'wandb').exists()
    kept = list(records(file))
    (begun,) = [r.run for r in kept if r.WhichOneof('record_type') == 'run']
    assert (begun.project, begun.run_id, begun.display_name) == ('gorila', 'abc123', 'pong-1')
    settings = values(begun.config.update)
    assert settings['learning_rate'] == 1e-4
    assert settings['launch'] == SETTINGS['config']['launch']
    rows = [values(r.history.item) for r in kept if r.WhichOneof('record_type') == 'history']
    assert {'frames': 800, 'return/episode': -20.0, 'episode/length': 90}.items() <= rows[0].items()
    assert (rows[1]['frames'], rows[1]['progress/updates']) == (800, 20)
    summary: dict[str, Any] = {}
    for record in kept:
        if record.WhichOneof('record_type') == 'summary':
            summary |= values(record.summary.update)
    assert (summary['exit_reason'], summary['updates']) == ('max_frames', 20)


def test_a_resume_continues_the_run_of_its_project():
    first = identity('gorila', [])
    launches: list[dict[str, Any]] = [{'engine': 'DirectRunner'}, {'wandb': first}, {'wandb': None}]
    assert identity('gorila', launches) == first
    assert identity('other', launches)['id'] != first['id']


def test_a_server_that_does_not_answer_is_reported_once_and_stops_nothing(directory, monkeypatch):
    with socket.create_server(('127.0.0.1', 0)) as server:  # accepts, and never answers
        monkeypatch.setenv('WANDB_MODE', 'online')
        monkeypatch.setenv('WANDB_BASE_URL', f'http://127.0.0.1:{server.getsockname()[1]}')
        monkeypatch.setenv('WANDB_API_KEY', 'a' * 40)
        monkeypatch.setenv('WANDB_INIT_TIMEOUT', '2')
        told: list[str] = []
        with writer(directory, told) as sink:

            def fails():
                start = time.monotonic()
                sink.write(4, {'return/episode': 1.0})
                assert time.monotonic() - start < 1.0
                return bool(told)

            assert eventually(fails, 60.0)
    (line,) = told
    assert 'CommError' in line
    assert 'the run continues without' in line
    assert str(directory.logs / 'wandb.log') in line


def test_the_reason_is_that_of_this_launch_before_what_other_threads_log(directory, monkeypatch):
    log = directory.logs / 'wandb.log'
    log.write_text('ended by CommError: of an earlier launch\n')
    monkeypatch.setattr(weights_and_biases, '__name__', 'tests.support.absent')  # no such module
    said: list[str] = []
    with writer(directory, said) as sink:
        sink._process.wait(60)
        assert 'No module named' in sink._reason()
        with log.open('a') as lines:
            lines.write('ended by CommError: no answer\nWARNING:urllib3: Retrying\n')
        assert sink._reason() == 'CommError: no answer'
    assert 'CommError: no answer; the run continues without' in said[0]


def test_the_end_waits_a_bounded_time_for_a_process_that_hangs(directory, offline, monkeypatch):
    monkeypatch.setattr(weights_and_biases, 'CLOSE_SECONDS', 0.5)
    monkeypatch.setattr(weights_and_biases, '__name__', 'tests.support.hangs')
    told: list[str] = []
    start = time.monotonic()
    with writer(directory, told) as sink:
        for step in range(20_000):  # more than the queue and the pipe hold
            sink.write(step, {'x' * 100: 1.0})
    assert time.monotonic() - start < 20
    (line,) = told
    assert 'not everything was sent within 0.5 s' in line
    assert sink._process.poll() is not None


@pytest.mark.parametrize(
    ('project', 'installed', 'mode', 'expected'),
    [
        ('a/b', True, 'offline', "'a/b': not a name of a project"),
        ('', True, 'offline', 'not a name of a project'),
        ('gorila', False, 'offline', 'requirements-wandb.txt'),
        ('gorila', True, 'online', 'WANDB_MODE=offline'),
    ],
)
def test_what_stands_in_the_way_is_one_line_before_any_file(
    tmp_path, monkeypatch, capsys, project, installed, mode, expected
):
    monkeypatch.setenv('WANDB_MODE', mode)
    monkeypatch.setenv('HOME', str(tmp_path))  # without a login
    monkeypatch.delenv('WANDB_API_KEY', raising=False)
    if not installed:
        monkeypatch.setitem(sys.modules, 'wandb', None)
    assert run.main([f'--wandb_project={project}', f'--run_dir={tmp_path / "run"}']) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith('run.py: --wandb_project')
    assert expected in line
    assert not (tmp_path / 'run').exists()


def test_a_process_without_a_login_says_so_in_one_line(tmp_path):
    command = [sys.executable, str(ROOT / 'pipelines' / 'run.py'), '--wandb_project=gorila']
    ended = subprocess.run(
        [*command, f'--run_dir={tmp_path / "run"}'],
        env={'PATH': '/usr/bin:/bin', 'HOME': str(tmp_path), 'WANDB_MODE': 'online'},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2, ended.stderr
    assert 'WANDB_MODE=offline' in ended.stderr.splitlines()[-1]
    assert not (tmp_path / 'run').exists()
