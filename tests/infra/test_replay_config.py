"""The replay's configuration: what is refused, and what a shard's share is."""

import dataclasses
import json

import pytest

from infra.replay.config import ReplayConfig, shard_of_worker
from infra.replay.server import ShardConfig
from infra.replay.trajectory import TrajectorySpec


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('num_replay_shards', 0),
        ('replay_mode', 'shared'),
        ('replay_capacity', 0),
        ('min_replay_size', 0),
        ('min_replay_size', 250_001),
        ('agent_steps_per_update', -1.0),
        ('agent_steps_per_update', float('nan')),
        ('sample_insert_tolerance', 0.0),
        ('max_in_flight_items', 0),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        ReplayConfig(**{field: value})


def test_the_shards_share_capacity_and_minimum():
    config = ReplayConfig(num_replay_shards=3, replay_capacity=100, min_replay_size=10)
    assert config.shard_capacity == 34  # 100 / 3, rounded up: together not less than asked for
    assert config.shard_min_size == 4


def test_samples_per_insert_is_batch_size_over_agent_steps_per_update():
    assert ReplayConfig(agent_steps_per_update=4.0).samples_per_insert(32) == 8.0
    assert ReplayConfig(agent_steps_per_update=0.0).samples_per_insert(32) == 0.0


def test_the_tolerance_of_a_shard_is_never_below_two_batches():
    config = ReplayConfig(num_replay_shards=100, sample_insert_tolerance=100.0)
    assert config.shard_tolerance(32) == 64.0


def test_workers_are_dealt_to_shards_in_turn():
    assert [shard_of_worker(worker, 3) for worker in range(5)] == [0, 1, 2, 0, 1]


def test_a_configuration_survives_json():
    config = ShardConfig(ReplayConfig(num_replay_shards=2), TrajectorySpec(n_step=5), 16)
    assert ShardConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
