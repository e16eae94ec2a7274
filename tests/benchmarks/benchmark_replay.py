"""Cost of the replay: CPU per inserted step and per sampled batch, client and server, and memory.

Frames are a real game's, the shard is a process of its own. Prints one JSON object; milliseconds
are CPU time, not wall time, and medians over rounds.

    python -m tests.benchmarks.benchmark_replay --steps 20000
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from infra.replay import adder as adder_lib
from infra.replay import dataset as dataset_lib
from infra.replay.config import ReplayConfig
from infra.replay.priorities import PriorityWriter
from infra.replay.server import ShardConfig
from infra.replay.trajectory import Steps, TrajectorySpec
from tests.support.replay_shard import ShardProcess

BATCH_SIZE = 32
GAMMA = 0.99
ROUNDS = 8


def game_steps(game: str, num_environments: int) -> Iterator[tuple[Steps, np.ndarray]]:
    """Endless agent steps of random play, as the adder takes them."""
    from ale_py.vector_env import AtariVectorEnv

    environment = AtariVectorEnv(game, num_environments, num_threads=1, stack_num=1)
    frame = environment.reset(seed=0)[0][:, 0].copy()
    random = np.random.default_rng(0)
    no = np.zeros(num_environments, bool)
    first = ~no
    while True:
        action = random.integers(6, size=num_environments).astype(np.int32)
        observation, reward, ended, _, _ = environment.step(action)
        steps = Steps(
            frame,
            action,
            np.asarray(reward, np.float32),
            1.0 - np.asarray(ended, np.float32),
            first,
        )
        yield steps, no
        frame, first = observation[:, 0].copy(), np.asarray(ended, bool)


def measure_inserts(shard: ShardProcess, options: argparse.Namespace) -> dict[str, float]:
    """CPU milliseconds per inserted step, and the server's memory per million frames."""
    spec = TrajectorySpec(n_step=options.n_step)
    game = game_steps(options.game, options.environments)
    calls = options.steps // options.environments // ROUNDS
    client, server, rss = [], [], [shard.rss_bytes()]
    with adder_lib.Adder(shard.address, spec, options.environments) as adder:
        for _ in range(ROUNDS):
            steps = [next(game) for _ in range(calls)]
            server_before, client_before = shard.cpu_seconds(), time.process_time()
            for step in steps:
                adder.add(*step)
            client.append(time.process_time() - client_before)
            server.append(shard.cpu_seconds() - server_before)
            rss.append(shard.rss_bytes())
    per_round = calls * options.environments
    milliseconds = 1000 / per_round
    # The first round also pays for the start: connection, threads, arenas.
    grown = (rss[-1] - rss[1]) / (per_round * (ROUNDS - 1))
    return {
        'insert_client_ms_per_step': statistics.median(client) * milliseconds,
        'insert_server_ms_per_step': statistics.median(server) * milliseconds,
        'server_bytes_per_frame': grown,
        'server_gib_per_million_frames': (rss[1] + grown * 1e6) / 2**30,
    }


def measure_samples(shard: ShardProcess, options: argparse.Namespace) -> dict[str, float]:
    """CPU milliseconds per sampled batch, with the change of its priorities if there are any."""
    spec = TrajectorySpec(n_step=options.n_step)
    client, server, wall = [], [], []
    error = np.ones(BATCH_SIZE)
    with (
        dataset_lib.sample_dataset([shard.address], spec, BATCH_SIZE, GAMMA) as dataset,
        PriorityWriter([shard.address]) as priorities,
    ):
        for _ in range(20):  # tracing, compiling
            next(dataset)
        for _ in range(ROUNDS):
            server_before, client_before = shard.cpu_seconds(), time.process_time()
            wall_before = time.perf_counter()
            for _ in range(options.batches // ROUNDS):
                sample = next(dataset)
                if options.priority_exponent:
                    priorities.update(sample.key, sample.shard, error)
            client.append(time.process_time() - client_before)
            server.append(shard.cpu_seconds() - server_before)
            wall.append(time.perf_counter() - wall_before)
    milliseconds = 1000 / (options.batches // ROUNDS)
    return {
        'sample_client_ms_per_batch': statistics.median(client) * milliseconds,
        'sample_server_ms_per_batch': statistics.median(server) * milliseconds,
        'sample_wall_ms_per_batch': statistics.median(wall) * milliseconds,
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--game', default='pong')
    parser.add_argument('--steps', type=int, default=20_000, help='agent steps inserted')
    parser.add_argument('--batches', type=int, default=400, help=f'of {BATCH_SIZE} transitions')
    parser.add_argument('--environments', type=int, default=8)
    parser.add_argument('--n_step', type=int, default=3)
    parser.add_argument('--priority_exponent', type=float, default=0.0, help='0: uniform')
    options = parser.parse_args()
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    replay = ReplayConfig(
        replay_capacity=2_000_000,
        min_replay_size=1000,
        agent_steps_per_update=0.0,
        priority_exponent=options.priority_exponent,
    )
    config = ShardConfig(replay, TrajectorySpec(n_step=options.n_step), BATCH_SIZE)
    with tempfile.TemporaryDirectory() as directory:
        shard = ShardProcess(config, Path(directory)).wait()
        try:
            result = {**measure_inserts(shard, options), **measure_samples(shard, options)}
        finally:
            shard.close()
    result['insert_ms_per_step'] = (
        result['insert_client_ms_per_step'] + result['insert_server_ms_per_step']
    )
    result['sample_ms_per_batch'] = (
        result['sample_client_ms_per_batch'] + result['sample_server_ms_per_batch']
    )
    print(json.dumps({name: round(value, 3) for name, value in result.items()}, indent=2))


if __name__ == '__main__':
    main()
