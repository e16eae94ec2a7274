"""What one push+pull costs, with real server processes on this host; prints JSON.

`python -m tests.benchmarks.benchmark_parameter_server [--repeats N] [--shards 1 2 4 31]
[--parameters N]`
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from infra.parameter_server.client import ParameterClient
from infra.parameter_server.config import WIRE_NAMES, ParameterServerConfig
from infra.parameter_server.layout import Layout

# The Nature network with six actions: about 1.7 million parameters.
_SHAPES = (
    (8, 8, 4, 32), (32,), (4, 4, 32, 64), (64,), (3, 3, 64, 64), (64,),
    (3136, 512), (512,), (512, 6), (6,),
)  # fmt: skip
_LAYOUT = Layout(tuple(f'variable_{i}' for i in range(len(_SHAPES))), _SHAPES)
_TRANSPORTS: dict[str, dict] = {
    'shared_memory': {'shared_memory': True},
    **{wire: {'shared_memory': False, 'wire': wire} for wire in WIRE_NAMES},
}
_START_SECONDS = 400.0
_STOP_SECONDS = 10.0
_ROUNDS = 5


@contextlib.contextmanager
def server_processes(config: ParameterServerConfig) -> Iterator[tuple[list[str], list[int]]]:
    """Starts the shards; gives their addresses and process ids."""
    with tempfile.TemporaryDirectory() as directory:
        config_file = pathlib.Path(directory, 'config.json')
        config_file.write_text(json.dumps(dataclasses.asdict(config)))
        ready_files = [pathlib.Path(directory, f'{i}') for i in range(config.num_parameter_shards)]
        processes = [
            subprocess.Popen(
                [sys.executable, '-m', 'infra.parameter_server.server', '--port=0']
                + [f'--config={config_file}', f'--shard={i}', f'--ready_file={ready}'],
                stdout=sys.stderr,  # JSON alone goes to this process's
            )
            for i, ready in enumerate(ready_files)
        ]
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not all(file.exists() for file in ready_files):
                if time.monotonic() > deadline:
                    raise TimeoutError(f'the servers did not start in {_START_SECONDS} s')
                time.sleep(0.1)
            ports = [json.loads(file.read_text())['port'] for file in ready_files]
            yield [f'127.0.0.1:{port}' for port in ports], [p.pid for p in processes]
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(_STOP_SECONDS)


def cpu_seconds(pid: int) -> float:
    """Returns the user and system time of a process."""
    fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def measure(
    layout: Layout, addresses: list[str], pids: list[int], transport: dict, repeats: int
) -> dict:
    """Returns medians, in milliseconds per push+pull, over several rounds."""
    gradient = np.random.default_rng(0).normal(size=layout.size).astype(np.float32)
    rounds = []
    with ParameterClient(addresses, layout, **transport) as client:
        client.initialise(np.zeros(layout.size, np.float32))
        version = client.pull().version
        for _ in range(_ROUNDS + 1):
            wall, own = time.perf_counter(), time.process_time()
            servers = sum(map(cpu_seconds, pids))
            for _ in range(repeats):
                version = client.push(gradient, version).snapshot.version
            servers = sum(map(cpu_seconds, pids)) - servers
            own, wall = time.process_time() - own, time.perf_counter() - wall
            rounds.append([1e3 * seconds / repeats for seconds in (wall, own, servers)])
    wall, own, servers = (statistics.median(column) for column in zip(*rounds[1:]))
    return {
        'wall_ms': round(wall, 2),
        'client_cpu_ms': round(own, 2),
        'server_cpu_ms': round(servers, 2),
        'cpu_ms': round(own + servers, 2),
    }


def measure_apply(size: int, optimizer: str, repeats: int) -> dict:
    """Returns the cost of the optimizer's step alone, all parameters in one slice."""
    import tensorflow as tf

    from infra.parameter_server.optimizers import OptimizedSlice

    part = OptimizedSlice(ParameterServerConfig(optimizer=optimizer), size)
    gradient = tf.random.normal([size])
    part.step(gradient, update=1)
    times = []
    for _ in range(_ROUNDS):
        start = time.process_time()
        for _ in range(repeats):
            part.step(gradient, update=1)
        times.append(1e3 * (time.process_time() - start) / repeats)
    return {'cpu_ms': round(statistics.median(times), 2)}


def main() -> None:
    """Measures every transport at every number of shards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--repeats', type=int, default=60, help='push+pulls per round')
    parser.add_argument('--shards', type=int, nargs='+', default=[1, 2, 4, 31])
    parser.add_argument('--parameters', type=int, help='in one vector; default: Nature network')
    options = parser.parse_args()
    layout = Layout(('all',), ((options.parameters,),)) if options.parameters else _LAYOUT
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    result: dict = {'parameters': layout.size, 'apply': {}, 'push_pull': {}}
    for optimizer in ('adagrad', 'rmsprop', 'adam'):
        result['apply'][optimizer] = measure_apply(layout.size, optimizer, options.repeats)
    for shards in options.shards:
        with server_processes(ParameterServerConfig(num_parameter_shards=shards)) as (hosts, pids):
            result['push_pull'][shards] = {
                name: measure(layout, hosts, pids, transport, options.repeats)
                for name, transport in _TRANSPORTS.items()
            }
    print(json.dumps(result, indent=2))


if __name__ == '__main__':
    main()
