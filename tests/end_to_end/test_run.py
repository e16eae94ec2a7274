"""The main job from the command line to its run directory, through the real servers and Beam."""

import json
import pathlib
import signal

import numpy as np
import psutil
import pytest

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


def test_killed_learner_and_shard_with_the_clock_are_replaced_and_the_run_reaches_its_budget(
    tmp_path,
):
    run_dir = tmp_path / 'run'
    process = launching.start(run_dir, '--max_frames=12000', '--num_learners=1', *launching.SMALL)
    launching.wait_for_updates(process, run_dir)
    job = next(p for p in launching.processes_of(run_dir) if '--kind=learner' in p.cmdline())
    for worker in job.children(recursive=True):
        worker.kill()
    ready = json.loads((run_dir / 'servers' / 'parameter_server_0.ready').read_text())
    psutil.Process(ready['pid']).kill()
    assert launching.finish(process, run_dir) == 0, launching.output(run_dir)
    restarts = launching.check_run_directory(run_dir, 12_000)['restarts']
    assert restarts.get('learner', 0) >= 1
    assert restarts.get('parameter_server', 0) >= 1
