"""The model of a cluster, where its figures can be computed by hand."""

import pytest

from tests.benchmarks.cluster_model import Cluster, Costs, Topology, costs_from

# A push and pull takes a learner 1 ms and a shard 1 ms + 1 ms for each share of the vector.
COSTS = Costs(
    parameters=1_000_000,
    client_message=0.0,
    client_vector=1.0,
    shard_message=1.0,
    shard_vector=1.0,
    apply=0.5,
    learner=19.0,
    actor=0.5,
    replay=2.0,
)


def observed(actors, learners, shards, **more):
    return Cluster(Topology(actors, learners, shards, **more), COSTS).observe(4.0)


def test_one_learner_is_bound_by_its_own_core_and_is_one_update_behind():
    found = observed(1, 1, 1)
    # 19 + 1 ms an update; its push travels beside the next gradient.
    assert found['updates_per_second'] == pytest.approx(50.0, rel=0.02)
    assert found['agent_steps_per_second'] == pytest.approx(200.0, rel=0.1)
    assert (found['staleness_median'], found['bottleneck']) == (1, 'learner')


def test_many_learners_are_bound_by_the_replay_then_by_the_shard():
    # 2 ms a batch at one replay shard; 2 ms a push at one shard, 1 + 1/4 ms at one of four.
    assert observed(8, 20, 4)['updates_per_second'] == pytest.approx(500.0, rel=0.02)
    found = observed(8, 40, 1, replays=4)
    assert found['bottleneck'] == 'parameter_shard'
    # Actors pull once in 128 steps, so 1 / 32 of an update's 4; a pull takes 1.5 ms.
    assert found['updates_per_second'] == pytest.approx(1e3 / (2.0 + 1.5 / 32), rel=0.02)
    # Each of 40 learners has two gradients on their way, in turn.
    assert found['staleness_median'] == pytest.approx(79, abs=2)


def test_an_actor_waits_for_learners_and_learners_for_an_actor():
    waiting = observed(0, 1, 1)  # the steps of the start are used up
    assert waiting['updates_per_second'] < 50.0
    found = observed(1, 4, 1, replays=2)  # 0.5 ms a step: 2,000 steps/s would be 500 updates/s
    assert found['updates_per_second'] == pytest.approx(4 * 50.0, rel=0.02)


def test_a_link_and_a_round_trip_take_their_time():
    # 32 megabits each way at 1 gigabit/s take 32 ms, one message after the other.
    found = observed(8, 20, 1, replays=2, gigabits=1.0)
    assert found['updates_per_second'] == pytest.approx(1e3 / 32, rel=0.1)
    # 1 ms at the learner, 78 on the way and 2 at the shard, longer than a gradient.
    assert observed(1, 1, 1, round_trip_ms=78.0)['updates_per_second'] == pytest.approx(
        1e3 / 81.0, rel=0.05
    )


def test_cores_that_all_share_are_shared():
    # 20 + 2 + 2 ms of learners, shard and replay and 4 * 0.5 ms of actors, on two cores.
    found = observed(4, 4, 1, replays=1, host_cores=2)
    assert found['updates_per_second'] == pytest.approx(2e3 / 26.0, rel=0.03)


def test_costs_are_split_into_those_of_a_message_and_those_of_the_vector():
    messages = {
        'parameters': 10,
        'apply': {'adam': {'cpu_ms': 0.5}},
        'push_pull': {
            '1': {'float32': {'client_cpu_ms': 1.0, 'server_cpu_ms': 3.0}},
            '31': {'float32': {'client_cpu_ms': 7.0, 'server_cpu_ms': 18.0}},
        },
    }
    run = {
        'updates': 100,
        'agent_steps': 400,
        'cpu_seconds': {'learner': 2.0, 'actor': 0.4, 'replay': 0.1},
    }
    costs = costs_from(messages, run)
    assert (costs.client_message, costs.client_vector) == pytest.approx((0.2, 0.8))
    assert (costs.shard_message, costs.shard_vector) == pytest.approx((0.5, 2.5))
    assert (costs.learner, costs.actor, costs.replay) == pytest.approx((20.0, 1.0, 1.0))
