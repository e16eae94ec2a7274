"""A suite of two small runs: killed in the first, the launcher of the second killed, resumed."""

import json
import subprocess
import sys

import pytest

from tests.end_to_end import launching
from tests.support.browser import browser, opened
from tests.support.waiting import eventually, has_ended

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

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


def launcher(run_dir):
    """The process of an active run's `run.py`."""
    (found,) = (
        process
        for process in launching.processes_of(run_dir)
        if 'pipelines.run' in process.cmdline()
    )
    return found


def trains(run_dir, suite_dir):
    log = suite_dir / 'logs' / f'{run_dir.name}.log'
    shown = lambda: log.exists() and '] training' in log.read_text()  # noqa: E731
    return eventually(shown, launching.RUN_SECONDS)


def assert_report_shows(page):
    """Both runs' scores, every plot, and a video that plays; on a phone and on a screen."""
    with browser() as chromium:
        for width in (400, 1280):
            with opened(chromium, page, width, 'light') as shown:
                assert all(
                    shown.page.locator(f'text={game}').count() for game in ('Pong', 'Breakout')
                )
                plots = shown.page.locator('figure.plot svg').all()
                assert len(plots) > 5
                assert all(plot.locator('path').count() for plot in plots)
                shown.play_video()
                assert (shown.messages, shown.asks_nobody()) == ([], True)


def test_a_killed_suite_continues_repeats_no_run_and_a_killed_launcher_leaves_no_orphan(tmp_path):
    suite_dir = tmp_path / 'suite'
    first, second = [suite_dir / f'{game}-laptop-seed1' for game in _GAMES]
    command = [f'--games={",".join(_GAMES)}', f'--max_frames={_FRAMES}']
    command += (*launching.FEW, *launching.SMALL, '--video')
    process = start(suite_dir, *command)
    assert trains(first, suite_dir), launching.output(suite_dir)
    process.kill()
    process.wait()
    process = start(suite_dir, *command)  # while the run of the killed suite writes its checkpoint
    assert trains(second, suite_dir), launching.output(suite_dir)
    launching.check_run_directory(first, _FRAMES)
    workers = launching.workers_of(second)
    assert len(workers) >= 2  # a learner and an actor
    launcher(second).kill()
    assert eventually(lambda: all(has_ended(worker.pid) for worker in workers), 15.0)
    assert launching.finish(process, suite_dir) == 0, launching.output(suite_dir)  # tried again
    launching.check_run_directory(second, _FRAMES)
    (first / 'summary.json').unlink()  # as if it had been killed while it evaluated
    (first / 'evaluation.json').unlink()
    process = start(suite_dir, '--resume')
    assert launching.finish(process, suite_dir) == 0, launching.output(suite_dir)
    launching.check_run_directory(first, _FRAMES)
    assert [launch['resumed'] for launch in launches(first)] == [False, True, True]
    assert [launch['resumed'] for launch in launches(second)] == [False]  # it had no checkpoint
    assert_report_shows(suite_dir / 'report.html')
    assert launching.output(suite_dir).count('2 of 2 runs are done, 0 failed') == 2
    launching.assert_nothing_runs(suite_dir, within_seconds=10)
