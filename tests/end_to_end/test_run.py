"""The main job from the command line to its run directory, through the real servers and Beam."""

import json
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest

from infra.parameter_server.connection import health
from tests import certificates
from tests.end_to_end import launching
from tests.waiting import eventually, has_ended

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(500)]


def test_separate_topology_trains_pong_and_leaves_a_complete_run_directory(tmp_path):
    run_dir = tmp_path / 'run'
    process = launching.start(run_dir, '--max_frames=10000', *launching.SMALL)
    assert launching.finish(process, run_dir) == 0, launching.output(run_dir)
    summary = launching.check_run_directory(run_dir, 10_000)
    # Batch 32, 4 agent steps an update (the preset's): 32 / 4 = 8 samples an insert behind the
    # first 400; the limiter lets sampling lag or lead by 2,000, and 3 batches may be under way.
    steps = summary['agent_steps']
    expected = 8 * (steps - 400)
    assert summary['samples_per_insert'] * steps == pytest.approx(expected, abs=2_000 + 3 * 96)
    assert_policy_loads_and_acts(run_dir / 'policy')
    launching.assert_nothing_runs(run_dir, within_seconds=10)


def assert_policy_loads_and_acts(path: pathlib.Path) -> None:
    from tf_agents.policies import py_tf_eager_policy
    from tf_agents.trajectories import time_step as ts

    policy = py_tf_eager_policy.SavedModelPyTFEagerPolicy(str(path), load_specs_from_pbtxt=True)
    observation = np.zeros((84, 84, 4), np.uint8)  # the policy adds the batch dimension itself
    action = policy.action(ts.restart(observation)).action
    assert 0 <= int(action) < 6  # Pong's minimal action set


def test_bundled_topology_trains_breakout_with_two_bundles(tmp_path):
    run_dir = tmp_path / 'run'
    process = launching.start(
        run_dir,
        '--game=breakout',
        '--topology=bundled',
        '--num_actors=2',
        '--num_learners=2',
        '--num_parameter_shards=3',
        '--max_frames=10000',
        *launching.SMALL,
    )
    assert launching.finish(process, run_dir) == 0, launching.output(run_dir)
    summary = launching.check_run_directory(run_dir, 10_000)
    # 2,500 agent steps, 400 of them before the first update, 4 an update; segments of 64 steps may
    # still be unlearned, or have come on top, in each of the two bundles.
    assert summary['updates'] == pytest.approx(2_100 / 4, abs=2 * 2 * 64 / 4)
    assert summary['episodes'] > 0


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


def test_interrupted_run_exits_130_and_resumes_where_it_was(tmp_path):
    run_dir = tmp_path / 'run'
    process = launching.start(run_dir, '--max_frames=400000', *launching.SMALL)
    launching.wait_for_updates(process, run_dir)
    assert_example_follows(run_dir)
    process.send_signal(signal.SIGINT)
    assert launching.finish(process, run_dir) == 130, launching.output(run_dir)
    told = pathlib.Path(f'{run_dir}.out').read_text()
    assert 'once more to stop at once' in told
    assert '] training' not in told.partition('] stopping workers')[2]
    first = launching.summary(run_dir)
    assert first['exit_reason'] == 'SIGINT'
    assert first['updates'] > 0

    goal = first['frames'] + 4_000
    process = launching.start(run_dir, '--resume', f'--max_frames={goal}')
    assert launching.finish(process, run_dir) == 0, launching.output(run_dir)
    second = launching.check_run_directory(run_dir, goal)
    assert second['updates'] > first['updates']
    assert second['wall_seconds'] > first['wall_seconds']
    # The replay came back: learning went on without filling it again.
    saved = json.loads(sorted(run_dir.glob('checkpoints/checkpoint-*/run.json'))[-1].read_text())
    assert saved['inserts'] >= first['agent_steps'] - 100


def test_interrupt_while_servers_start_ends_without_workers(tmp_path):
    run_dir = tmp_path / 'run'
    process = launching.start(run_dir, '--max_frames=400000', *launching.SMALL)
    out = pathlib.Path(f'{run_dir}.out')
    assert eventually(lambda: '] starting servers' in out.read_text(), launching.START_SECONDS)
    process.send_signal(signal.SIGINT)
    assert launching.finish(process, run_dir) == 130, launching.output(run_dir)
    assert '] starting workers' not in out.read_text()
    launching.assert_nothing_runs(run_dir, within_seconds=10)


def test_killed_launcher_leaves_no_orphan(tmp_path):
    run_dir = tmp_path / 'run'
    process = launching.start(run_dir, '--max_frames=400000', *launching.SMALL)
    launching.wait_for_updates(process, run_dir)
    workers = launching.workers_of(run_dir)
    assert len(workers) >= 3  # two learners and an actor
    process.kill()
    process.wait()
    launching.assert_nothing_runs(run_dir, within_seconds=15)
    assert eventually(lambda: all(has_ended(worker.pid) for worker in workers), 15.0)


def test_killed_learner_is_replaced_and_the_run_reaches_its_budget(tmp_path):
    run_dir = tmp_path / 'run'
    process = launching.start(run_dir, '--max_frames=12000', '--num_learners=1', *launching.SMALL)
    launching.wait_for_updates(process, run_dir)
    job = next(p for p in launching.processes_of(run_dir) if '--kind=learner' in p.cmdline())
    for worker in job.children(recursive=True):
        worker.kill()
    assert launching.finish(process, run_dir) == 0, launching.output(run_dir)
    summary = launching.check_run_directory(run_dir, 12_000)
    assert summary['restarts'].get('learner', 0) >= 1


def test_a_killed_launchers_run_goes_on_with_servers_that_kept_its_state(tmp_path):
    run_dir, flags = tmp_path / 'run', ('--checkpoint_period_seconds=5', '--num_learners=1')
    files = certificates.issue(tmp_path)
    tls = [f'--tls_{name}={files[name]}' for name in ('certificate', 'key')]
    alone = ('--num_parameter_shards=1', *tls)
    with launching.servers(tmp_path, *flags, *launching.SMALL, *alone) as attach:
        attach += [f'--tls_roots={files["roots"]}']
        process = launching.start(run_dir, '--max_frames=8000', *flags, *launching.SMALL, *attach)
        checkpoints = run_dir / 'checkpoints'
        assert eventually(lambda: any(checkpoints.glob('checkpoint-*/run.json')), 120.0)
        process.kill()
        process.wait()
        launching.assert_nothing_runs(run_dir, within_seconds=60)
        saved = json.loads(sorted(checkpoints.glob('checkpoint-*/run.json'))[-1].read_text())
        roots = pathlib.Path(files['roots']).read_bytes()
        kept = health(attach[0].partition('=')[2], 10.0, roots)
        assert kept['version'] >= saved['updates'] > 0
        resumed = launching.start(run_dir, '--resume', *attach)
        assert launching.finish(resumed, run_dir) == 0, launching.output(run_dir)
    summary = launching.check_run_directory(run_dir, 8_000)
    # The shard's own clock went on: nothing was learned, and no frame made, twice.
    assert summary['updates'] > kept['version']
    assert summary['frames'] < 8_000 + 3_000


def test_killed_shard_with_the_clock_is_restarted_and_the_run_reaches_its_budget(tmp_path):
    run_dir = tmp_path / 'run'
    process = launching.start(run_dir, '--max_frames=12000', *launching.SMALL)
    launching.wait_for_updates(process, run_dir)
    ready = json.loads((run_dir / 'servers' / 'parameter_server_0.ready').read_text())
    psutil.Process(ready['pid']).kill()
    assert launching.finish(process, run_dir) == 0, launching.output(run_dir)
    summary = launching.check_run_directory(run_dir, 12_000)
    assert summary['restarts'].get('parameter_server', 0) >= 1
