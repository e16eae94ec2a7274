"""A whole run at gs://, resumed from there as on another machine: the local copy is gone."""

import json
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from tests.end_to_end import launching
from tests.support.gcs import BUCKET, Gcs
from tests.support.waiting import eventually

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

BELOW = 'runs/pong/'


EVALUATOR = (
    '--evaluator_cpu_share=1',
    '--evaluator_episodes=1',
    '--evaluation_period_updates=1',
)


def evaluations(run_dir):
    """The evaluations during training."""
    lines = (run_dir / 'evaluations.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines]


def content(gcs, name):
    return json.loads(gcs.content(BELOW + name))


def start(copy, *flags):
    """Starts the main job at the remote place."""
    remote = (f'--run_dir=gs://{BUCKET}/runs/pong', f'--work_dir={copy}')
    return launching.start(copy, *remote, *launching.FEW, *flags)  # the later --run_dir counts


def assert_example_follows(run_dir: pathlib.Path) -> None:
    """A TF-Agents actor plays with the parameters of a run that goes on."""
    script = [sys.executable, 'tests/examples/follow_a_run.py', str(run_dir)]
    result = subprocess.run(
        script, cwd=launching.ROOT, capture_output=True, text=True, timeout=launching.START_SECONDS
    )
    assert result.returncode == 0, result.stderr
    match = re.fullmatch(r'(\d+) updates, -?\d+ points in 400 steps\n', result.stdout)
    assert match, result.stdout
    assert int(match[1]) > 0


def test_an_interrupted_run_at_a_bucket_exits_130_and_goes_on_from_the_bucket_alone(
    tmp_path, monkeypatch
):
    with Gcs() as gcs:
        for name, value in gcs.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        copy = tmp_path / 'copy'
        process = start(copy, '--max_frames=400000', *launching.SMALL, *EVALUATOR)
        launching.wait_for_updates(process, copy)
        assert_example_follows(copy)
        best = copy / 'best' / 'evaluation.json'
        assert eventually(best.exists, launching.START_SECONDS), launching.output(copy)
        process.send_signal(signal.SIGINT)
        assert launching.finish(process, copy) == 130, launching.output(copy)
        told = launching.output(copy)
        assert 'a second signal stops at once' in told
        assert '] training' not in told.partition('] stopping workers')[2]
        assert f'gs://{BUCKET}/runs/pong is complete' in told
        assert gcs.names(BELOW) == lasting_files(copy)
        first = content(gcs, 'summary.json')
        assert first == launching.summary(copy)
        assert first['exit_reason'] == 'SIGINT'
        assert first['updates'] > 0
        (evaluated, *_) = evaluations(copy)
        assert 0 < evaluated['updates'] <= first['updates']
        assert evaluated['frames'] <= first['frames']
        assert first['evaluations']['number'] == len(evaluations(copy))
        assert first['evaluations']['cpu_seconds'] > 1.0  # its imports alone take longer
        assert 0.0 < first['evaluations']['cpu_share'] < 1.0

        elsewhere, goal = tmp_path / 'elsewhere', first['frames'] + 4_000
        flags = (f'--max_frames={goal}', '--evaluator_cpu_share=0')
        process = start(elsewhere, '--resume', *flags)
        assert launching.finish(process, elsewhere) == 0, launching.output(elsewhere)
        launching.assert_nothing_runs(elsewhere, within_seconds=10)
        assert 'fetching' in launching.output(elsewhere)
        second = launching.check_run_directory(elsewhere, goal)
        assert second == content(gcs, 'summary.json')
        assert second['updates'] > first['updates']
        assert second['wall_seconds'] > first['wall_seconds']
        best, last = first['evaluations']['best'], second['evaluation']
        best = last if last['mean'] >= best['mean'] else best
        kept = second['evaluations']['best']
        for name in ('updates', 'episodes', 'mean', 'std'):
            assert kept[name] == best[name]
        assert evaluations(elsewhere) == evaluations(copy)
        assert 'policy_best/saved_model.pb' in gcs.names(BELOW)
        newest = max(name for name in gcs.names(BELOW) if name.endswith('/run.json'))
        # The replay came back: learning went on without filling it again.
        saved = content(gcs, newest)
        assert saved['inserts'] >= first['agent_steps'] - 100


def lasting_files(copy):
    """What of a working copy belongs at the remote place."""
    files = (path.relative_to(copy) for path in copy.rglob('*') if path.is_file())
    return {
        path.as_posix()
        for path in files
        if path.parts[0] != 'servers' and not path.name.startswith('.')
    }
