"""Starting `pipelines/run.py` as a user would, waiting for it, and looking at what it leaves."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from tests.support import engines, sharing
from tests.support.waiting import eventually

ROOT = pathlib.Path(__file__).resolve().parents[2]

START_SECONDS = 150  # a loaded two-core machine
RUN_SECONDS = 400

# A whole run in miniature: every box for real, a small network and few frames.
SMALL_SETTINGS: dict[str, Any] = {
    'torso': 'dqn2013_half',
    'min_replay_size': 400,
    'replay_capacity': 20_000,
    'envs_per_actor': 4,
    'evaluation_episodes': 2,
    'evaluation_max_frames': 800,
    'video': False,
}
COUNTS = ('agent_steps', 'gradients', 'outliers', 'stale', 'invalid', 'episodes')
STARTED: list[subprocess.Popen] = []
"""Runs of the present test: one that fails must not leave them to the others."""
FEW = ('--num_learners=1', '--num_parameter_shards=1')
"""As few processes as a run can have."""
SMALL = (*(f'--{name}={value}' for name, value in SMALL_SETTINGS.items() if value), '--no-video')


def start(run_dir: pathlib.Path, *flags: str) -> subprocess.Popen:
    """Starts the main job; its output goes to `<run_dir>.out`."""
    with open(f'{run_dir}.out', 'ab') as output:
        process = subprocess.Popen(
            [sys.executable, 'pipelines/run.py', f'--run_dir={run_dir}', *flags],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            umask=sharing.SHARED_UMASK,
        )
    STARTED.append(process)
    return process


@contextlib.contextmanager
def terminal(run_dir: pathlib.Path, *flags: str) -> Iterator[tuple[subprocess.Popen, Callable]]:
    """The main job in a terminal that goes away at the end; yields it, and what is shown so far."""
    master, slave = os.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):
            while part := os.read(master, 4096):
                shown.append(part)

    process = subprocess.Popen(
        ['setsid', '--ctty', sys.executable, 'pipelines/run.py', f'--run_dir={run_dir}', *flags],
        cwd=ROOT,
        env={**os.environ, 'TERM': 'xterm'},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    threading.Thread(target=read, daemon=True).start()
    try:
        yield process, lambda: b''.join(shown).decode(errors='replace')
    finally:
        os.close(master)


def output(run_dir: pathlib.Path) -> str:
    """Everything the job has printed so far, and its workers' logs, for a failure's message."""
    texts = [pathlib.Path(f'{run_dir}.out').read_text()]
    for log in sorted(run_dir.glob('logs/*.log')):
        texts.append(f'== {log.name}\n' + log.read_text(errors='replace')[-2000:])
    return '\n'.join(texts)


def summary(run_dir: pathlib.Path) -> dict:
    """The content of `summary.json`."""
    return json.loads((run_dir / 'summary.json').read_text())


def episodes(run_dir: pathlib.Path) -> list[dict]:
    """The games of the run so far."""
    return [json.loads(line) for line in (run_dir / 'episodes.jsonl').read_text().splitlines()]


def processes_of(run_dir: pathlib.Path) -> Iterator[psutil.Process]:
    """Processes, whoever their parent, that have the run directory in their command line."""
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(
                str(run_dir) in part for part in process.cmdline()
            ):
                yield process
        except psutil.Error:
            continue


def workers_of(run_dir: pathlib.Path) -> list[psutil.Process]:
    """Beam's worker processes of the run's jobs, and everything else below its processes."""
    found: dict[int, psutil.Process] = {}
    for process in processes_of(run_dir):
        try:
            for child in process.children(recursive=True):
                found[child.pid] = child
        except psutil.Error:
            continue
    return list(found.values())


def finish(process: subprocess.Popen, run_dir: pathlib.Path) -> int:
    """Waits for the job's end; its exit code."""
    try:
        return process.wait(RUN_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f'did not end within {RUN_SECONDS} s:\n{output(run_dir)}')


def wait_for_updates(process: subprocess.Popen, run_dir: pathlib.Path) -> None:
    """Waits until the job says that it trains."""
    deadline = time.monotonic() + START_SECONDS
    while '] training' not in pathlib.Path(f'{run_dir}.out').read_text():
        assert process.poll() is None, output(run_dir)
        assert time.monotonic() < deadline, output(run_dir)
        time.sleep(0.5)


def assert_nothing_runs(run_dir: pathlib.Path, within_seconds: float) -> None:
    """Waits until no process of the run is left."""
    deadline = time.monotonic() + within_seconds
    while left := [*processes_of(run_dir), *workers_of(run_dir)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def check_run_directory(run_dir: pathlib.Path, max_frames: int, epsilon: float = 0.05) -> dict:
    """Checks what every finished run leaves; returns its summary.

    `epsilon`: of the evaluation, by the preset's protocol.
    """
    told = summary(run_dir)
    assert told['exit_reason'] == 'max_frames', told
    assert told['frames'] == 4 * told['agent_steps'] >= max_frames
    assert told['updates'] > 0
    assert all(0 < episode['frames'] <= told['frames'] for episode in episodes(run_dir))
    assert told['rejected'].keys() == {'stale', 'outlier', 'invalid'}
    evaluation = told['evaluation']
    assert (evaluation['episodes'], evaluation['epsilon']) == (2, epsilon)
    for name in ('config.json', 'episodes.jsonl', 'learning_curve.png', 'policy/saved_model.pb'):
        assert (run_dir / name).exists(), name
    assert (run_dir / 'logs' / 'launcher.log').stat().st_size > 0
    assert list(run_dir.glob('events/events.out.tfevents.*'))
    assert list(run_dir.glob('checkpoints/checkpoint-*/run.json'))
    return told


def check_statistics(run_dir: pathlib.Path, finished: dict) -> None:
    """Checks that the rows of a run without failures are those of its summary."""
    rows: dict[str, list[dict]] = {'segments': [], 'episodes': []}
    for table, found in rows.items():
        for file in run_dir.glob(f'statistics/{table}-*.jsonl'):
            found.extend(json.loads(line) for line in file.read_text().splitlines())
    segments, games = rows['segments'], rows['episodes']
    assert len({(row['kind'], row['worker'], row['segment']) for row in segments}) == len(segments)
    total = {name: sum(row[name] for row in segments) for name in COUNTS}
    rejected = {name: finished['rejected'][name] for name in ('stale', 'invalid')}
    rejected['outliers'] = finished['rejected']['outlier']
    assert total == {
        'agent_steps': finished['agent_steps'],
        'gradients': finished['updates'] + sum(rejected.values()),
        'episodes': finished['episodes'],
        **rejected,
    }
    staleness = [row['staleness'] for row in segments if row['staleness']]
    histogram = list(finished['staleness']['histogram'].values())
    assert [sum(bins) for bins in zip(*staleness)] == histogram
    returns = [row['raw_return'] for row in sorted(games, key=lambda row: row['time'])[-100:]]
    assert len(games) == finished['episodes']
    if returns:
        assert finished['mean_return_100'] == pytest.approx(sum(returns) / len(returns))
    counted = finished['beam'].values()  # empty where the engine gives none
    if counted:
        assert sum(kind['agent_steps'] for kind in counted) == finished['agent_steps']


@contextlib.contextmanager
def servers(directory: pathlib.Path, *flags: str) -> Iterator[list[str]]:
    """Servers by themselves; yields the flags that lead a run to them."""
    log = directory / 'servers.log'
    argv = [sys.executable, 'pipelines/servers.py', f'--run_dir={directory / "servers"}', *flags]
    with engines.process(argv, log, ROOT) as process:
        ready = eventually(lambda: '--replay_addresses' in log.read_text(), 60.0)
        assert ready, log.read_text()
        yield log.read_text().splitlines()[-1].split()
        process.terminate()
        assert process.wait(30) == 0
        assert_nothing_runs(directory / 'servers', within_seconds=10)
