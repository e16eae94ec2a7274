"""Members of the family from the command line through the real servers and Beam."""

import re
import subprocess
import sys

import pytest

from tests.end_to_end import launching

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(500)]


def test_all_parts_together_train_breakout_on_two_prioritized_shards(tmp_path):
    run_dir = tmp_path / 'run'
    process = launching.start(
        run_dir,
        '--preset=rainbow_lite',
        '--game=breakout',
        '--num_actors=2',
        '--num_replay_shards=2',
        '--actor_priorities',
        '--epsilon_ladder',
        '--max_frames=10000',
        *launching.SMALL,
    )
    assert launching.finish(process, run_dir) == 0, launching.output(run_dir)
    summary = launching.check_run_directory(run_dir, 10_000)
    assert summary['preset'] == 'rainbow_lite'
    # 2,500 agent steps, 400 before the first update, 4 an update: 525. Each shard's limiter lets
    # sampling lag or lead by half of 2,000 samples, 62 updates together; what is still on its way
    # when the actors end, and the actors' head start, may be as much again.
    assert summary['updates'] == pytest.approx(525, abs=125)
    assert summary['episodes'] > 0
    # The ladder's rungs, of 16 environments in all, are 0.4 at most.
    assert all(episode['epsilon'] <= 0.4 for episode in launching.episodes(run_dir))
    for line in (run_dir / 'logs').glob('learner-*.log'):
        assert 'took no priorities' not in line.read_text()
    launching.assert_nothing_runs(run_dir, within_seconds=10)


def test_somebody_elses_agent_trains_breakout_in_two_bundles(tmp_path):
    run_dir = tmp_path / 'run'
    process = launching.start(
        run_dir,
        '--agent=tests.examples.own_agent:munchausen',
        '--game=breakout',
        '--topology=bundled',
        '--num_actors=2',
        '--num_learners=2',
        '--num_parameter_shards=3',
        '--max_frames=10000',
        *(flag for flag in launching.SMALL if not flag.startswith('--torso')),  # it brings its own
    )
    assert launching.finish(process, run_dir) == 0, launching.output(run_dir)
    summary = launching.check_run_directory(run_dir, 10_000)
    # 2,500 agent steps, 400 of them before the first update, 4 an update; segments of 64 steps may
    # still be unlearned, or have come on top, in each of the two bundles.
    assert summary['updates'] == pytest.approx(2_100 / 4, abs=2 * 2 * 64 / 4)
    assert summary['episodes'] > 0
    script = [sys.executable, 'tests/examples/play_a_trained_policy.py', str(run_dir)]
    played = subprocess.run(script, cwd=launching.ROOT, capture_output=True, text=True, timeout=90)
    assert played.returncode == 0, played.stderr
    assert re.fullmatch(
        rf'{summary["updates"]} updates, -?\d+ points in 400 steps\n', played.stdout
    )
