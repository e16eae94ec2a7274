"""A whole run at gs://, resumed from there as on another machine: the local copy is gone."""

import json

import pytest

from tests.end_to_end import launching
from tests.gcs import BUCKET, Gcs

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(500)]

BELOW = 'runs/pong/'


def content(gcs, name):
    return json.loads(gcs.content(BELOW + name))


def train(copy, *flags):
    """Runs the main job at the remote place; what it has printed."""
    remote = (f'--run_dir=gs://{BUCKET}/runs/pong', f'--work_dir={copy}')
    process = launching.start(copy, *remote, *flags)  # the later --run_dir counts
    assert launching.finish(process, copy) == 0, launching.output(copy)
    launching.assert_nothing_runs(copy, within_seconds=10)
    return launching.output(copy)


def test_a_run_at_a_bucket_is_resumed_from_the_bucket_alone(tmp_path, monkeypatch):
    with Gcs() as gcs:
        for name, value in gcs.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        copy = tmp_path / 'copy'
        told = train(copy, '--max_frames=4000', *launching.SMALL)
        assert f'gs://{BUCKET}/runs/pong has all of it' in told
        launching.check_run_directory(copy, 4_000)
        local = {
            path.relative_to(copy).as_posix()
            for path in copy.rglob('*')
            if path.is_file() and not path.is_relative_to(copy / 'servers')
        }
        hidden = {name for name in local if name.startswith('.')}
        assert gcs.names(BELOW) == local - hidden
        first = content(gcs, 'summary.json')
        assert first == launching.summary(copy)

        elsewhere = tmp_path / 'elsewhere'
        told = train(elsewhere, '--resume', '--max_frames=8000')
        assert 'fetching' in told
        second = launching.check_run_directory(elsewhere, 8_000)
        assert second == content(gcs, 'summary.json')
        assert second['updates'] > first['updates']
        assert second['wall_seconds'] > first['wall_seconds']
        newest = max(name for name in gcs.names(BELOW) if name.endswith('/run.json'))
        # The replay came back: learning went on without filling it again.
        assert content(gcs, newest)['inserts'] > 1.5 * first['agent_steps']
