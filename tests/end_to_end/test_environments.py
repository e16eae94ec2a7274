"""A whole run in an environment that shows a dictionary, through the real servers and Beam."""

import numpy as np
import pytest

from pipelines import api
from tests.end_to_end import launching
from tests.support.environments import LENGTH, Structured

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]


def test_a_dictionary_is_stored_learned_from_evaluated_and_exported(tmp_path):
    run_dir, game = tmp_path / 'run', 'tests.support.environments:structured'
    experiment = api.experiment(
        'classic',
        game=game,
        topology='separate',
        num_actors=1,
        num_learners=1,
        dense_layers='16,8',
        frame_stack=2,
        min_replay_size=200,
        max_frames=3_000,
        evaluation_episodes=2,
        video=False,
    )
    summary = api.train(experiment, run_dir)
    assert summary['exit_reason'] == 'max_frames'
    assert summary['agent_steps'] >= 3_000
    assert summary['updates'] > 0
    # Every episode has five steps; they earn 1 + 2 + 3 + 4 + 5 = 15, whatever the actions.
    assert {episode['agent_steps'] for episode in launching.episodes(run_dir)} == {LENGTH}
    assert summary['evaluation']['mean'] == 15
    assert api.evaluate(run_dir, episodes=2, output=tmp_path / 'result.json')['mean'] == 15
    assert_policy_takes_a_dictionary(run_dir / 'policy')


def assert_policy_takes_a_dictionary(path):
    from tf_agents.policies import py_tf_eager_policy
    from tf_agents.trajectories import time_step as ts

    policy = py_tf_eager_policy.SavedModelPyTFEagerPolicy(str(path), load_specs_from_pbtxt=True)
    spec = policy.time_step_spec.observation
    assert set(spec) == set(Structured.observation_space)
    observation = {
        'picture': np.zeros((10, 10, 2), np.uint8),
        'phase': np.zeros(12, np.uint8),
        'pair': (np.zeros(4, np.float32), np.zeros(4, np.int8)),
        'counter': np.zeros(6),
    }
    assert int(policy.action(ts.restart(observation)).action) in (0, 1)
