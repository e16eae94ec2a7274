"""An actor whose replay takes no rows: it hands on its segments in time, and loses no row."""

import contextlib
import threading
import time

import pytest
import reverb

from infra.replay.config import EXPERIENCE_TABLE
from infra.replay.errors import ReplayTimeout
from infra.replay.server import ShardConfig, build_tables, start_server, stop_server
from pipelines.experiment import frames, presets
from pipelines.experiment.launch import Addresses
from pipelines.workers import boxes
from pipelines.workers.spec import WorkerSpec
from tests.support import parameter_servers

ENVS = 2


@pytest.fixture
def opened():
    """An actor of a game on servers in this process; gives its worker and what it opened."""
    settings = {
        'torso': 'dqn2013_half', 'num_actors': 1, 'num_learners': 1, 'envs_per_actor': ENVS,
        'num_replay_shards': 1, 'replay_capacity': 2_000, 'min_replay_size': 40, 'batch_size': 8,
        'sample_insert_tolerance': 1.0,
    }  # fmt: skip
    config = presets.experiment('laptop', settings)
    shard = ShardConfig(config.replay, frames.trajectory_spec(config), 8, telemetry=True)
    with contextlib.ExitStack() as stack:
        server = start_server(build_tables(shard, 0))
        stack.callback(stop_server, server)
        replay = f'127.0.0.1:{server.port}'
        shards = stack.enter_context(parameter_servers.serve(config.parameter_server))
        addresses = Addresses(tuple(each.address for each in shards), (replay,), replay)
        worker = stack.enter_context(boxes.open_actor(config, addresses, WorkerSpec(0, 0)))
        yield worker, config, replay


def test_an_actor_that_waits_for_the_replay_hands_on_a_record_in_time_and_loses_no_row(
    opened, monkeypatch
):
    monkeypatch.setattr(boxes, 'SEGMENT_SECONDS', 1.0)
    worker, config, replay = opened
    worker.begin(0)
    segments = [worker.segment(0)]  # until the replay waits for samples: no learner runs
    begun = time.monotonic()
    segments.append(worker.segment(1))
    assert 1.0 <= time.monotonic() - begun < 10.0
    assert segments[1].agent_steps == 0
    ended = threading.Event()
    with boxes.samples_of(config, (replay,)) as samples:

        def learn():
            while not ended.is_set():
                with contextlib.suppress(ReplayTimeout):  # the actor was late
                    next(samples)

        thread = threading.Thread(target=learn)
        thread.start()
        while not segments[-1].agent_steps and len(segments) < 30:
            segments.append(worker.segment(len(segments)))
        flushed = worker.box._adder.flush(20.0)
        ended.set()
        thread.join(10.0)
    assert flushed
    assert segments[-1].agent_steps > 0
    # A step's item needs n more rows: the last n of each game have none yet.
    made = sum(segment.agent_steps for segment in segments)
    info = reverb.Client(replay).server_info(5)[EXPERIENCE_TABLE]
    assert info.current_size == made - config.agent.n_step * ENVS
