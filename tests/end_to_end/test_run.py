"""The main job from the command line to its run directory, through the real servers and Beam."""

import contextlib
import json
import pathlib
import shlex
import shutil
import signal

import av
import numpy as np
import psutil
import pytest
from tensorboard.backend.event_processing import event_accumulator

from pipelines import api
from pipelines.storage import provenance
from tests.end_to_end import launching
from tests.support import sharing
from tests.support.names import ODD_NAME
from tests.support.waiting import eventually

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]


def test_all_parts_of_the_family_train_past_a_proxy_and_leave_a_complete_run_directory(
    tmp_path, monkeypatch
):
    for name in ('http_proxy', 'https_proxy', 'grpc_proxy', 'all_proxy'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')  # the port of `discard`, where nobody is
    run_dir = tmp_path / ODD_NAME
    parts = {'actor_priorities': True, 'epsilon_ladder': True, 'max_frames': 10_000}
    workers = {'num_actors': 2, 'num_replay_shards': 2, 'video': True}
    settings = {**launching.SMALL_SETTINGS, **parts, **workers}
    experiment = api.experiment('rainbow_lite', game='breakout', **settings)
    with sharing.shared_umask(), open(f'{run_dir}.out', 'w') as out:
        told = api.train(experiment, run_dir, progress=lambda line: print(line, file=out))
    summary = launching.check_run_directory(run_dir, 10_000, epsilon=0.001)
    assert told == summary
    launching.check_statistics(run_dir, summary)
    assert api.evaluate(run_dir, episodes=1, output=tmp_path / 'one.json')['episodes'] == 1
    # Batch 32, 4 agent steps an update (the preset's): 32 / 4 = 8 samples an insert behind the
    # first 400. Each of two shards' limiters lets sampling lag or lead by half of 2,000; 3 batches
    # may be under way. In updates: 2,500 agent steps, less the 400, a fourth; the lag and what was
    # under way when the actors ended, 125.
    steps = summary['agent_steps']
    expected = 8 * (steps - 400)
    assert summary['samples_per_insert'] * steps == pytest.approx(expected, abs=2_000 + 3 * 96)
    assert summary['updates'] == pytest.approx(525, abs=125)
    # The ladder's rungs, of 16 environments in all, are 0.4 at most.
    assert all(episode['epsilon'] <= 0.4 for episode in launching.episodes(run_dir))
    for log in (run_dir / 'logs').glob('learner-*.log'):
        assert 'took no priorities' not in log.read_text()
    assert 'copy it to another directory' in pathlib.Path(f'{run_dir}.out').read_text()
    assert_video_shows_the_policy(run_dir / 'video.mp4')
    assert ', video.mp4 and the rest are in' in pathlib.Path(f'{run_dir}.out').read_text()
    assert_policy_loads_and_acts(shutil.copytree(run_dir / 'policy', tmp_path / 'policy'))
    assert sharing.unshared(run_dir) == []
    assert_says_where_it_comes_from(run_dir)
    launching.assert_nothing_runs(run_dir, within_seconds=10)


def assert_says_where_it_comes_from(run_dir: pathlib.Path) -> None:
    (launch,) = provenance.launches(run_dir / 'launches.jsonl')
    assert f'--run_dir={run_dir}' in shlex.split(launch['command'])
    assert not (run_dir / 'servers' / 'replay').exists()
    assert (launch['engine'], launch['resumed'], launch['frames']) == ('DirectRunner', False, 0)
    events = event_accumulator.EventAccumulator(str(run_dir / 'events'))
    events.Reload()
    assert {'configuration', 'provenance'} <= set(events.Tags()['tensors'])
    assert 'staleness/histogram' in events.Tags()['tensors']
    figures = ('mean_q', 'max_q', 'gradient_norm', 'mean_absolute_error', 'max_priority')
    boxes = [f'{kind}_{number}' for kind in ('actor', 'learner', 'replay') for number in range(2)]
    assert {
        'return/evaluation',
        'episode/length',
        'staleness/learner_1/percentile_99',
        *(f'learner/{name}' for name in figures),
        *(f'{figure}/{box}' for figure in ('rate', 'memory_bytes') for box in boxes),
        'memory_bytes/launcher',
        'rate/parameter_server_0',
    } <= set(events.Tags()['scalars'])
    summary = launching.summary(run_dir)
    assert summary['learner'].keys() >= set(figures)
    assert summary['learners']['learner_0']['gradients'] > 0
    assert summary['learners']['learner_0']['precision'] == 'float32'
    assert all(summary['rates'][box] > 0 for box in boxes)
    assert all(size > 10_000_000 for size in summary['memory_bytes'].values())


def assert_video_shows_the_policy(path: pathlib.Path) -> None:
    with av.open(str(path)) as video:
        assert 1 < sum(1 for _ in video.decode(video=0)) <= 201  # 800 frames, and the last picture


def assert_policy_loads_and_acts(path: pathlib.Path) -> None:
    from tf_agents.policies import py_tf_eager_policy
    from tf_agents.trajectories import time_step as ts

    policy = py_tf_eager_policy.SavedModelPyTFEagerPolicy(str(path), load_specs_from_pbtxt=True)
    observation = np.zeros((84, 84, 4), np.uint8)  # the policy adds the batch dimension itself
    action = policy.action(ts.restart(observation)).action
    assert 0 <= int(action) < 4  # Breakout's minimal action set


def test_interrupt_while_servers_start_ends_without_workers(tmp_path):
    run_dir = tmp_path / 'run'
    process = launching.start(run_dir, '--max_frames=400000', *launching.SMALL)
    out = pathlib.Path(f'{run_dir}.out')
    assert eventually(lambda: '] starting servers' in out.read_text(), launching.START_SECONDS)
    process.send_signal(signal.SIGINT)
    assert launching.finish(process, run_dir) == 130, launching.output(run_dir)
    assert '] starting workers' not in out.read_text()
    launching.assert_nothing_runs(run_dir, within_seconds=10)


def test_a_run_whose_terminal_goes_away_ends_in_order_and_keeps_logs_of_failures(
    tmp_path, monkeypatch
):
    (tmp_path / 'sitecustomize.py').write_text(
        "import os, sys\nif 'pipelines.job' in sys.orig_argv:\n"
        "    print('OSError: no licence', flush=True)\n    os._exit(1)\n"
    )
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    run_dir = tmp_path / 'run'
    with launching.terminal(run_dir, *launching.SMALL) as (process, shown):
        reason = 'actor 0: ended with exit code 1 (OSError: no licence), failure 1 in a row'
        assert eventually(lambda: reason in shown(), launching.START_SECONDS), shown()
    assert process.wait(60) == 128 + signal.SIGHUP
    assert launching.summary(run_dir)['exit_reason'] == 'SIGHUP'
    assert 'no licence' in (run_dir / 'logs' / 'actor-0.log').read_text()
    launching.assert_nothing_runs(run_dir, within_seconds=10)


HANG_SECONDS = 20
SDK_WORKER = 'apache_beam.runners.worker.sdk_worker_main'
HANGS = """
import pathlib, sys, time
if any('sdk_worker_main' in part for part in sys.orig_argv):
    from agents.environments.atari import AtariEnvironment
    file, step = pathlib.Path(__file__).parent / 'hang', AtariEnvironment.step_frames

    def step_frames(self, action):
        if file.exists():
            time.sleep(600)
        return step(self, action)

    AtariEnvironment.step_frames = step_frames
"""
"""Steps of a game never end while the file `hang` is there."""


def bundles_of(run_dir):
    """Beam's workers of the bundles' job that works now, without the shells that start them."""
    found = []
    for job in launching.processes_of(run_dir):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ends meanwhile
            if any(flag.startswith('--bundles=') for flag in job.cmdline()):
                workers = job.children(recursive=True)
                found += [w for w in workers if SDK_WORKER in w.cmdline()]
    return found


def both_bundles_of(run_dir, other_than=()):
    """Waits for the processes of two bundles; the first starts some time before the second."""

    def new():
        return [worker for worker in bundles_of(run_dir) if worker not in other_than]

    assert eventually(lambda: len(new()) == 2, 60.0), launching.output(run_dir)
    return new()


def test_hung_and_killed_bundles_and_a_killed_shard_with_the_clock_are_replaced(
    tmp_path, monkeypatch
):
    (tmp_path / 'sitecustomize.py').write_text(HANGS)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    monkeypatch.setenv('WANDB_MODE', 'offline')
    run_dir = tmp_path / 'run'
    flags = ('--topology=bundled', '--num_actors=2', '--num_learners=2', '--max_frames=12000')
    more = ('--bundle_replay=servers', '--wandb_project=gorila', f'--hang_seconds={HANG_SECONDS}')
    process = launching.start(run_dir, *flags, *more, *launching.SMALL)
    launching.wait_for_updates(process, run_dir)
    hung = both_bundles_of(run_dir)
    (tmp_path / 'hang').touch()

    def log():
        return ''.join(file.read_text() for file in run_dir.glob('logs/bundle-*.log'))

    noticed = f'no step and no update for {HANG_SECONDS} s (--hang_seconds)'
    assert eventually(lambda: noticed in log(), HANG_SECONDS + 40.0), launching.output(run_dir)
    (tmp_path / 'hang').unlink()
    assert 'in step_frames\n    time.sleep(600)' in log()  # where it stood

    for worker in both_bundles_of(run_dir, other_than=hung):
        worker.kill()
    ready = json.loads((run_dir / 'servers' / 'parameter_server_0.ready').read_text())
    psutil.Process(ready['pid']).kill()
    assert launching.finish(process, run_dir) == 0, launching.output(run_dir)
    restarts = launching.check_run_directory(run_dir, 12_000)['restarts']
    assert restarts.get('bundle', 0) >= 4  # both, twice
    assert [*run_dir.glob('checkpoints/*/replay/shard-0')]
    assert restarts.get('parameter_server', 0) >= 1
    (launch,) = provenance.launches(run_dir / 'launches.jsonl')
    (logged,) = run_dir.glob(f'wandb/offline-run-*-{launch["wandb"]["id"]}/*.wandb')
    assert b'max_frames' in logged.read_bytes()  # the summary
