"""Hosts for tests: network namespaces of this machine, each with an address of its own."""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest

from tests.support import engines
from tests.support.waiting import eventually

_NETWORK = '10.77.0'
FIRST = f'{_NETWORK}.1'
"""Address of the first host of a network."""

_START_SECONDS = 120.0
_ROOT = pathlib.Path(__file__).resolve().parents[2]


class Host:
    """A network namespace.

    Attributes:
      address: how the other hosts reach it.
    """

    def __init__(self, name: str, address: str):
        self.address = address
        self._name = name

    def argv(self, command: Sequence[str]) -> list[str]:
        """The command, to be run on this host."""
        return ['ip', 'netns', 'exec', self._name, *command]


@contextlib.contextmanager
def network(count: int) -> Iterator[list[Host]]:
    """So many hosts, all joined by one switch; skips the test where they cannot be had."""
    if os.geteuid() != 0 or shutil.which('ip') is None:
        pytest.skip('network namespaces need root and the program ip')
    prefix = f'gorila-{os.getpid()}'
    switch = f'{prefix}-switch'
    made: list[str] = []
    try:
        _make(switch, made)
        _ip('-n', switch, 'link', 'add', 'switch', 'type', 'bridge')
        _ip('-n', switch, 'link', 'set', 'switch', 'up')
        hosts = []
        for number in range(1, count + 1):
            name = f'{prefix}-{number}'
            _make(name, made)
            _join(name, f'{_NETWORK}.{number}', switch, f'port{number}')
            hosts.append(Host(name, f'{_NETWORK}.{number}'))
        yield hosts
    finally:
        for name in made:
            subprocess.run(['ip', 'netns', 'del', name], check=False)


def _make(name: str, made: list[str]) -> None:
    result = subprocess.run(['ip', 'netns', 'add', name], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f'no network namespace can be made here: {result.stderr.strip()}')
    made.append(name)


def _join(name: str, address: str, switch: str, port: str) -> None:
    _ip('-n', name, 'link', 'set', 'lo', 'up')
    _ip('-n', name, 'link', 'add', 'eth0', 'type', 'veth', 'peer', 'name', port, 'netns', switch)
    _ip('-n', name, 'address', 'add', f'{address}/24', 'dev', 'eth0')
    _ip('-n', name, 'link', 'set', 'eth0', 'up')
    _ip('-n', switch, 'link', 'set', port, 'master', 'switch', 'up')


def _ip(*arguments: str) -> None:
    subprocess.run(['ip', *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def three_host_run(
    directory: pathlib.Path,
    flags: Sequence[str],
    round_trip_ms: float,
    loss: float = 0.0,
) -> Iterator[subprocess.Popen]:
    """A run whose servers and launcher, actor and learners are on three hosts.

    Its directory is `directory / 'run'`, its output `directory / 'run.out'`.

    Args:
      directory: for logs and outputs; flags: of the run and of its servers.
      round_trip_ms: between the servers and everybody else.
      loss: probability of a segment on the same way.
    """
    shared = [*flags, '--num_learners=1']
    with contextlib.ExitStack() as stack:
        first, second, third = stack.enter_context(network(3))
        started = functools.partial(_started, stack, directory)
        servers = [f'--run_dir={directory / "servers"}', f'--host={first.address}', *shared]
        attach = started(first, 'servers', ['pipelines/servers.py', *servers], '--replay_addresses')
        distant = ['tests/support/distant.py', f'--host={first.address}']
        distant += ['--ports=' + ','.join(re.findall(r':(\d+)', attach))]
        distant += [f'--round_trip_ms={round_trip_ms}', f'--loss={loss}']
        stand_ins = json.loads(started(first, 'distant', distant, 'listening').split(maxsplit=1)[1])
        for port, stand_in in stand_ins.items():
            attach = attach.replace(f':{port}', f':{stand_in}')
        scheduler = f'tcp://{second.address}:8786'
        dask = ['-m', 'dask', 'scheduler', f'--host={second.address}', '--port=8786']
        started(second, 'scheduler', [*dask, '--dashboard-address=:0'], 'Scheduler at')
        for host in (second, third):
            worker = ['-m', 'dask', 'worker', scheduler, '--nworkers=1', '--nthreads=1']
            worker += [f'--host={host.address}', '--no-dashboard', f'--local-directory={directory}']
            started(host, f'worker-{host.address}', worker, 'Registered to')
        run = ['pipelines/run.py', f'--run_dir={directory / "run"}', *shared]
        run += ['--runner=DaskRunner', f'--dask_client_address={scheduler}']
        run += [f'--actor_flags=--dask_hosts={second.address}', *attach.split()]
        run += [f'--learner_flags=--dask_hosts={third.address}']
        run = first.argv([sys.executable, *run])
        yield stack.enter_context(engines.process(run, directory / 'run.out', _ROOT))


def _started(
    stack: contextlib.ExitStack,
    directory: pathlib.Path,
    host: Host,
    name: str,
    arguments: Sequence[str],
    sign: str,
) -> str:
    """Starts a Python program on a host; the line of its output that says that it is ready."""
    log = directory / f'{name}.log'
    stack.enter_context(engines.process(host.argv([sys.executable, '-u', *arguments]), log, _ROOT))
    assert eventually(lambda: sign in log.read_text(), _START_SECONDS), log.read_text()
    return next(line for line in log.read_text().splitlines() if sign in line)
