"""A suite of two small runs, killed in the middle of the first and started again."""

import json
import subprocess
import sys

import pytest

from tests.end_to_end import launching
from tests.support.waiting import eventually

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(500)]

_GAMES = ('pong', 'breakout')
_FRAMES = 4_000


def start(suite_dir, *flags):
    """Starts a suite; its output goes to `<suite_dir>.out`."""
    with open(f'{suite_dir}.out', 'ab') as output:
        process = subprocess.Popen(
            [sys.executable, 'pipelines/suite.py', f'--suite_dir={suite_dir}', *flags],
            cwd=launching.ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    launching.STARTED.append(process)
    return process


def launches(run_dir):
    return [json.loads(line) for line in (run_dir / 'launches.jsonl').read_text().splitlines()]


def test_a_killed_suite_continues_and_repeats_no_run(tmp_path):
    suite_dir = tmp_path / 'suite'
    runs = [suite_dir / f'{game}-laptop-seed1' for game in _GAMES]
    command = [f'--games={",".join(_GAMES)}', f'--max_frames={_FRAMES}', '--num_learners=1']
    command += launching.SMALL
    process = start(suite_dir, *command)
    log = suite_dir / 'logs' / f'{runs[0].name}.log'
    training = eventually(
        lambda: log.exists() and '] training' in log.read_text(), launching.START_SECONDS
    )
    assert training, launching.output(suite_dir)
    process.kill()
    process.wait()
    process = start(suite_dir, *command)  # while the run of the killed suite writes its checkpoint
    assert launching.finish(process, suite_dir) == 0, launching.output(suite_dir)
    for run in runs:
        launching.check_run_directory(run, _FRAMES)
    assert [launch['resumed'] for launch in launches(runs[0])] == [False, True]
    assert [launch['resumed'] for launch in launches(runs[1])] == [False]
    page = (suite_dir / 'report.html').read_text()
    assert all(game in page for game in _GAMES)
    (runs[1] / 'summary.json').unlink()  # as if it had been killed while it evaluated
    (runs[1] / 'evaluation.json').unlink()
    process = start(suite_dir, '--resume')
    assert launching.finish(process, suite_dir) == 0, launching.output(suite_dir)
    launching.check_run_directory(runs[1], _FRAMES)
    assert [len(launches(run)) for run in runs] == [2, 2]
    assert launching.output(suite_dir).count('2 of 2 runs are done, 0 failed') == 2
    launching.assert_nothing_runs(suite_dir, within_seconds=10)
