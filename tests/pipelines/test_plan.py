"""Sizing: measured costs and a target in, processes, cores and price out."""

import json

import pytest

from pipelines import plan as plan_lib
from pipelines.plan import Costs, plan

# Per agent step 1 ms of actor, 0.5 of replay; per update 40 ms of learner, 8 of the server.
MEASURED = {
    'agent_steps': 1000,
    'updates': 250,
    'cpu_seconds': {'actor': 1.0, 'replay': 0.5, 'learner': 10.0, 'parameter_server': 2.0},
    'parameters': 1_000_000,
    'actor_pulls_per_step': 1 / 128,
}
COSTS = Costs(1.0, 0.5, 40.0, 8.0, 1_000_000, 1 / 128)


@pytest.fixture
def costs_file(tmp_path):
    path = tmp_path / 'costs.json'
    path.write_text(json.dumps(MEASURED))
    return path


def test_costs_are_read_from_what_the_benchmark_prints(costs_file):
    assert plan_lib.read_costs(costs_file) == COSTS


def test_a_plan_gives_each_box_the_cores_its_rate_takes_at_four_fifths():
    found = plan(COSTS, agent_steps_per_second=4_000, steps_per_update=4.0)
    assert found.updates_per_second == 1_000
    assert found.actors == 5  # 4000 x 1 ms / 0.8
    assert found.replay_shards == 3  # 4000 x 0.5 ms / 0.8 = 2.5
    assert found.learners == 50  # 1000 x 40 ms / 0.8
    assert found.parameter_shards == 10  # 1000 x 8 ms / 0.8
    assert found.cores == 68  # 5 + 2.5 + 50 + 10
    # 2 x 1000 vectors of updates, 4000 / 128 of pulls, 32 million bits each.
    assert found.parameter_gbit_per_second == pytest.approx(65.0)


def test_a_small_target_still_takes_one_of_each():
    found = plan(COSTS, agent_steps_per_second=1, steps_per_update=4.0)
    assert (found.actors, found.learners) == (1, 1)
    assert (found.parameter_shards, found.replay_shards) == (1, 1)
    # 1 ms, 0.5 ms and a quarter of 48 ms: they share one core.
    assert found.cores == 1


def test_there_are_as_many_actors_as_replay_shards_since_a_run_wants_it_so():
    found = plan(Costs(0.1, 0.5, 40.0, 8.0, 1_000_000, 0.0), 4_000, steps_per_update=4.0)
    assert (found.actors, found.replay_shards) == (3, 3)  # not 4000 x 0.1 ms / 0.8 = 0.5


def test_a_plan_beyond_a_machines_network_says_how_many_machines_carry_it(costs_file, capsys):
    # 65 Gbit/s as above, of which a machine carries four fifths of 10.
    assert plan_lib.main(['--target_fps=16000', f'--costs={costs_file}']) == 0
    network, rate = capsys.readouterr().err.splitlines()
    assert network.startswith('plan.py: network: parameters and gradients need 65 Gbit/s')
    assert 'at least 9 parameter shards over 9 machines' in network
    assert 'rate: 1000 updates/s is an extrapolation (highest measured: 106.6)' in rate


@pytest.mark.parametrize('flag', ['--machine_gbit_per_second=100', '--machine_cores=96'])
def test_a_network_that_carries_it_or_one_machine_is_no_warning(costs_file, capsys, flag):
    assert plan_lib.main(['--target_fps=16000', f'--costs={costs_file}', flag]) == 0
    assert 'network' not in capsys.readouterr().err


def test_more_learners_than_gradients_may_be_old_is_a_warning(costs_file, capsys):
    # 3000 updates/s x 40 ms / 0.8 = 150 learners; the default bound is 100 updates.
    assert plan_lib.main(['--target_ups=3000', f'--costs={costs_file}']) == 0
    assert 'about 150 updates old' in capsys.readouterr().err


def test_a_modest_plan_says_nothing(costs_file, capsys):
    assert plan_lib.main(['--target_ups=20', f'--costs={costs_file}']) == 0
    assert capsys.readouterr().err == ''


def test_frames_are_agent_steps_times_the_repeat_and_machines_have_a_price(costs_file, capsys):
    argv = ['--target_fps=16000', f'--costs={costs_file}', '--machine_cores=8']
    assert plan_lib.main([*argv, '--price_per_hour=0.5']) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['agent_steps_per_second'] == 4_000
    assert result['machines'] == 9  # 68 cores of 8 each
    assert result['price_per_hour'] == 4.5
    assert result['flags'].startswith('--num_actors=5 --num_learners=50')


def test_the_same_plan_comes_from_updates(costs_file, capsys):
    assert plan_lib.main(['--target_ups=1000', f'--costs={costs_file}']) == 0
    assert json.loads(capsys.readouterr().out)['agent_steps_per_second'] == 4_000


def test_the_costs_of_this_project_are_there():
    costs = plan_lib.read_costs(plan_lib.COSTS)
    assert costs.learner_ms > costs.actor_ms > 0


@pytest.mark.parametrize(
    'flag', ['--target_fps=0', '--target_ups=-1', '--target_fps=inf', '--target_fps=1e300']
)
def test_a_target_out_of_range_is_refused(flag, capsys):
    assert plan_lib.main([flag]) == 2
    assert 'must be from 1e-06 to 1e+12' in capsys.readouterr().err


def test_a_file_that_is_no_benchmark_is_refused(tmp_path, capsys):
    file = tmp_path / 'other.json'
    file.write_text('{"cpu_seconds": {}}')
    assert plan_lib.main(['--target_fps=1', f'--costs={file}']) == 2
    assert 'benchmark_run.py' in capsys.readouterr().err
