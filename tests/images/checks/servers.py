"""Run inside the image `servers`: a shard of each kind starts, answers and exits at SIGTERM."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from infra.parameter_server.client import ParameterClient
from infra.parameter_server.config import ParameterServerConfig
from infra.parameter_server.layout import Layout
from infra.replay.config import EXPERIENCE_TABLE, ReplayConfig
from infra.replay.server import ShardConfig
from infra.replay.trajectory import TrajectorySpec

_START_SECONDS = 120.0
_STOP_SECONDS = 30.0


@contextlib.contextmanager
def serving(module: str, config: Any, directory: pathlib.Path) -> Iterator[str]:
    """Starts shard 0 as a pod would, yields its address, and stops it."""
    settings, ready = directory / 'config.json', directory / 'ready'
    settings.write_text(json.dumps(dataclasses.asdict(config)))
    command = [sys.executable, '-m', module, f'--config={settings}', '--shard=0']
    process = subprocess.Popen([*command, f'--ready_file={ready}'], stdin=subprocess.DEVNULL)
    started = time.monotonic()
    while not ready.exists():
        assert process.poll() is None, f'{module}: exit code {process.returncode} at the start'
        assert time.monotonic() < started + _START_SECONDS, f'{module}: not ready in time'
        time.sleep(0.05)
    print(f'{module} is ready after {time.monotonic() - started:.1f} s', flush=True)
    yield f'127.0.0.1:{json.loads(ready.read_text())["port"]}'
    process.terminate()
    code = process.wait(_STOP_SECONDS)
    assert code == 0, f'{module}: exit code {code} at SIGTERM'


def probe(kind: str, address: str) -> None:
    """Probes a shard as Kubernetes does."""
    subprocess.run([sys.executable, '-m', 'infra.probe', kind, address], check=True, timeout=30)


def ask_replay(address: str, spec: TrajectorySpec) -> None:
    """An item that is inserted is sampled, and the pod's probe succeeds."""
    import reverb

    client = reverb.Client(address)
    rows = np.arange(spec.window * spec.row_bytes, dtype=np.uint8).reshape(spec.window, -1)
    with client.trajectory_writer(num_keep_alive_refs=spec.window) as writer:
        for row in rows:
            writer.append({'rows': row})
        writer.create_item(EXPERIENCE_TABLE, 1.0, {'rows': writer.history['rows'][-spec.window :]})
        writer.flush(timeout_ms=10_000)
    (sample,) = client.sample(EXPERIENCE_TABLE, emit_timesteps=False)
    np.testing.assert_array_equal(sample.data[0], rows)
    probe('replay', address)


def ask_parameters(address: str) -> None:
    """A gradient of ones lowers the parameters, and the pod's probe succeeds."""
    layout = Layout(('kernel', 'bias'), ((3, 5), (4,)))
    with ParameterClient([address], layout) as client:
        client.initialise(np.zeros(layout.size, np.float32))
        before = client.pull()
        reply = client.push(np.ones(layout.size, np.float32), before.version)
        assert reply.rejected is None, reply.message
        values = reply.snapshot.values
        assert values is not None
        np.testing.assert_array_less(values, 0.0)
    probe('parameter', address)


def main() -> None:
    assert os.getuid() != 0, 'the servers need no root'
    spec = TrajectorySpec()
    replay = ReplayConfig(replay_capacity=1000, min_replay_size=1, agent_steps_per_update=0)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        shard = ShardConfig(replay, spec)
        with serving('infra.replay.server', shard, pathlib.Path(one)) as address:
            ask_replay(address, spec)
        parameters = ParameterServerConfig(num_parameter_shards=1)
        with serving('infra.parameter_server.server', parameters, pathlib.Path(other)) as address:
            ask_parameters(address)


if __name__ == '__main__':
    main()
