"""What one machine's servers carry: many light clients at real shards; prints JSON.

    python -m tests.benchmarks.benchmark_load --actors 100 --learners 100 --parameter_shards 1

A light client asks what a worker asks and computes nothing: a learner waits as long as a gradient
would take, then pushes one and pulls; an actor pulls, and adds steps to the replay, at the pace of
its games. Latencies are in milliseconds; staleness is in updates that came between.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from infra.parameter_server.client import ParameterClient
from infra.parameter_server.config import WIRE_NAMES, ParameterServerConfig
from infra.parameter_server.layout import Layout
from infra.replay.config import ReplayConfig
from infra.replay.server import ShardConfig
from infra.replay.trajectory import Steps, TrajectorySpec
from tests.benchmarks.benchmark_parameter_server import cpu_seconds, server_processes
from tests.support.replay_shard import ShardProcess

# The network of 2013 with six actions, `laptop`'s until 2026-11-30: 0.68 million parameters.
_SHAPES = (
    (8, 8, 4, 16), (16,), (4, 4, 16, 32), (32,), (2592, 256), (256,), (256, 6), (6,),
)  # fmt: skip
_LAYOUT = Layout(tuple(f'variable_{i}' for i in range(len(_SHAPES))), _SHAPES)
_SPEC = TrajectorySpec(n_step=3)
_ENVIRONMENTS = 8
_PULL_PERIOD = 16  # steps of one environment, the preset's
_WARM_UP_SECONDS = 10.0
_CONNECT_SECONDS = 120.0

Tally = dict[str, list[float]]
"""Measurements by name."""


class Recorder:
    """Keeps what is measured between `start` and `end`, seconds since the epoch."""

    def __init__(self, start: float, end: float):
        self._start = start
        self._end = end
        self.tally: Tally = {}

    def going(self) -> bool:
        """Whether there is still something to measure."""
        return time.time() < self._end

    def add(self, name: str, value: float) -> None:
        """Keeps a measurement, unless the clients are still warming up."""
        if self._start <= time.time():
            self.tally.setdefault(name, []).append(value)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measures the milliseconds of what is done inside."""
        begin = time.perf_counter()
        yield
        self.add(name, 1e3 * (time.perf_counter() - begin))


def learn(addresses: list[str], options: argparse.Namespace, recorder: Recorder) -> None:
    """One learner's pushes."""
    rng = np.random.default_rng()
    gradient = rng.normal(size=_LAYOUT.size).astype(np.float32)
    settings = {'wire': options.wire, 'shared_memory': options.shared_memory}
    with ParameterClient(
        addresses, _LAYOUT, timeout_seconds=_CONNECT_SECONDS, **settings
    ) as client:
        version = client.pull().version
        while recorder.going():
            time.sleep(1e-3 * options.gradient_ms * rng.uniform(0.5, 1.5))
            with recorder.timed('push_ms'):
                reply = client.push(gradient, version)
            if reply.rejected is None:
                recorder.add('staleness', reply.staleness)
            else:
                recorder.add('stale', 1.0)
            version = reply.snapshot.version


def act(addresses: list[str], replay: str, options: argparse.Namespace, recorder: Recorder) -> None:
    """One actor's pulls and inserts."""
    from infra.replay.adder import Adder

    rng = np.random.default_rng()
    period = _ENVIRONMENTS / options.actor_steps_per_second
    no = np.zeros(_ENVIRONMENTS, bool)
    frames = rng.integers(256, size=(16, _ENVIRONMENTS, 84, 84), dtype=np.uint8)
    frames[:, :, :, 10:] = 0  # most of a game's screen does not change
    zeros, ones = np.zeros(_ENVIRONMENTS, np.int32), np.ones(_ENVIRONMENTS, np.float32)
    client = ParameterClient(
        addresses, _LAYOUT, timeout_seconds=_CONNECT_SECONDS, shared_memory=options.shared_memory
    )
    with client, Adder(replay, _SPEC, _ENVIRONMENTS, timeout_seconds=_CONNECT_SECONDS) as adder:
        due = time.perf_counter() + rng.uniform(0, period)
        step = 0
        while recorder.going():
            time.sleep(max(0.0, due - time.perf_counter()))
            recorder.add('late', float(time.perf_counter() - due > period))
            due = max(due + period, time.perf_counter() - period)
            with recorder.timed('add_ms'):
                adder.add(Steps(frames[step % 16], zeros, 0 * ones, ones, no if step else ~no), no)
            step += 1
            if step % _PULL_PERIOD == 0:
                with recorder.timed('pull_ms'):
                    client.pull(_PULL_PERIOD * _ENVIRONMENTS)


def client_process(
    share: tuple[int, int],
    addresses: list[str],
    replay: str,
    options: argparse.Namespace,
    times: tuple[float, float],
    queue: Any,
) -> None:
    """One process's share of the actors and learners, a thread each."""
    actors, learners = share
    recorders = [Recorder(*times) for _ in range(actors + learners)]
    threads = [
        threading.Thread(target=act, args=(addresses, replay, options, recorder))
        for recorder in recorders[:actors]
    ]
    threads += [
        threading.Thread(target=learn, args=(addresses, options, recorder))
        for recorder in recorders[actors:]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.put(together(recorder.tally for recorder in recorders))


def together(tallies: Iterable[Tally]) -> Tally:
    """All measurements of all tallies."""
    total: Tally = {}
    for tally in tallies:
        for name, values in tally.items():
            total.setdefault(name, []).extend(values)
    return total


@contextlib.contextmanager
def replay_shard() -> Iterator[ShardProcess]:
    """A replay shard that samples are not drawn from."""
    config = ReplayConfig(replay_capacity=200_000, min_replay_size=1000, agent_steps_per_update=0.0)
    with tempfile.TemporaryDirectory() as directory:
        shard = ShardProcess(ShardConfig(config, _SPEC, 32), Path(directory)).wait()
        try:
            yield shard
        finally:
            shard.close()


def percentiles(values: list[float]) -> dict[str, float]:
    """Median, tail and largest of the values."""
    if not values:
        return {}
    ranks = {'p50': 50, 'p90': 90, 'p99': 99, 'max': 100}
    return {name: round(float(np.percentile(values, rank)), 2) for name, rank in ranks.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Throughput, latencies and staleness of one load."""
    config = ParameterServerConfig(
        num_parameter_shards=options.parameter_shards, max_staleness=options.max_staleness
    )
    with server_processes(config) as (addresses, pids), replay_shard() as shard:
        with ParameterClient(addresses, _LAYOUT) as client:
            client.initialise(np.zeros(_LAYOUT.size, np.float32))
        context = multiprocessing.get_context('spawn')
        queue = context.Queue()
        start = time.time() + _WARM_UP_SECONDS + 0.1 * (options.actors + options.learners)
        times = (start, start + options.seconds)
        shares = [
            (len(range(i, options.actors, options.processes)),
             len(range(i, options.learners, options.processes)))
            for i in range(options.processes)
        ]  # fmt: skip
        processes = [
            context.Process(
                target=client_process,
                args=(share, addresses, shard.address, options, times, queue),
            )
            for share in shares
        ]
        for process in processes:
            process.start()
        time.sleep(max(0.0, start - time.time()))
        before = sum(map(cpu_seconds, pids)), shard.cpu_seconds()
        time.sleep(max(0.0, times[1] - time.time()))
        after = sum(map(cpu_seconds, pids)), shard.cpu_seconds()
        tallies = [queue.get(timeout=options.seconds + _CONNECT_SECONDS) for _ in processes]
        for process in processes:
            process.join()
    return summarise(together(tallies), options.seconds, [b - a for a, b in zip(before, after)])


def summarise(every: Tally, seconds: float, cpu: list[float]) -> dict[str, Any]:
    """What the clients measured, as rates and percentiles."""
    adds, late = every.get('add_ms', []), every.get('late', [])
    return {
        'updates_per_second': round(len(every.get('staleness', [])) / seconds, 1),
        'refused_as_stale_per_second': round(sum(every.get('stale', [])) / seconds, 1),
        'pulls_per_second': round(len(every.get('pull_ms', [])) / seconds, 1),
        'agent_steps_per_second': round(_ENVIRONMENTS * len(adds) / seconds, 1),
        'late_steps': round(float(np.mean(late)), 3) if late else 0.0,
        'push_and_pull_ms': percentiles(every.get('push_ms', [])),
        'pull_ms': percentiles(every.get('pull_ms', [])),
        'add_ms': percentiles(adds),
        'staleness': percentiles(every.get('staleness', [])),
        'parameter_server_cores': round(cpu[0] / seconds, 2),
        'replay_cores': round(cpu[1] / seconds, 2),
    }


def main() -> None:
    """Measures one load and prints it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--actors', type=int, default=8)
    parser.add_argument('--learners', type=int, default=8)
    parser.add_argument('--parameter_shards', type=int, default=1)
    parser.add_argument('--gradient_ms', type=float, default=1000.0, help='wait before a push')
    parser.add_argument(
        '--actor_steps_per_second', type=float, default=60.0, help='of one actor (15 a game: 8)'
    )
    parser.add_argument('--max_staleness', type=int, default=1000, help='in updates')
    parser.add_argument('--wire', default='float32', choices=WIRE_NAMES, help='as of a run')
    parser.add_argument(
        '--shared_memory', action='store_true', help='as on one host; else as from other hosts'
    )
    parser.add_argument('--processes', type=int, default=4, help='that the clients share')
    parser.add_argument('--seconds', type=float, default=20.0)
    options = parser.parse_args()
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    print(json.dumps({**vars(options), **measure(options)}, indent=2))


if __name__ == '__main__':
    main()
