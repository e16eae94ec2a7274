"""Real engines for tests: a Dask cluster, Prism, Beam's worker pool, each of real processes."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import portpicker
import pytest

from tests.support.waiting import eventually

ROOT = pathlib.Path(__file__).resolve().parents[2]
_START_SECONDS = 90.0
_BUILD_SECONDS = 600.0


@contextlib.contextmanager
def process(
    argv: Sequence[str],
    log: pathlib.Path,
    directory: pathlib.Path,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[subprocess.Popen]:
    """A process in a session of its own; killed with its children in the end."""
    # As from a shell in which this environment is active: Beam's pool calls `python` by its name.
    path = f'{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    with log.open('wb') as output:
        started = subprocess.Popen(
            list(argv),
            cwd=directory,
            env={**os.environ, 'PATH': path, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


@contextlib.contextmanager
def running(argv: Sequence[str], log: pathlib.Path, port: int) -> Iterator[subprocess.Popen]:
    """A process that listens on a port, once it does."""
    with process(argv, log, log.parent) as started:
        assert eventually(lambda: listens(port), _START_SECONDS), log.read_text()
        yield started


def listens(port: int) -> bool:
    """Whether somebody takes connections on this port of the loopback address."""
    try:
        socket.create_connection(('127.0.0.1', port), 1.0).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def dask_cluster(directory: pathlib.Path, num_workers: int) -> Iterator[str]:
    """A scheduler and workers of one thread each, with nannies; yields the scheduler's address."""
    port = portpicker.pick_unused_port()
    address = f'tcp://127.0.0.1:{port}'
    scheduler = [sys.executable, '-m', 'dask', 'scheduler', '--host=127.0.0.1', f'--port={port}']
    with running(
        [*scheduler, '--dashboard-address=127.0.0.1:0'], directory / 'scheduler.log', port
    ):
        with dask_worker(address, directory, '127.0.0.1', num_workers):
            yield address
            _close_dask_clients()


def _close_dask_clients() -> None:
    """Of jobs that this process has run: Beam's runner leaves them open."""
    import distributed

    with contextlib.suppress(ValueError):  # none is left
        while True:
            distributed.default_client().close()


@contextlib.contextmanager
def dask_worker(
    address: str, directory: pathlib.Path, host: str, num_workers: int
) -> Iterator[None]:
    """Workers of one thread each, beside those that the cluster has."""
    import distributed

    worker = [sys.executable, '-m', 'dask', 'worker', address, f'--nworkers={num_workers}']
    worker += ['--nthreads=1', f'--host={host}', '--no-dashboard', f'--local-directory={directory}']
    environment = {'DASK_CONFIG': str(ROOT / 'infra' / 'dask')}
    with distributed.Client(address, set_as_default=False) as client:
        there = len(client.nthreads())
        with process(worker, directory / f'worker-{host}.log', directory, environment):
            client.wait_for_workers(there + num_workers, timeout=_START_SECONDS)
            yield


def prism() -> str:
    """Path of Prism, built once for this environment; skips the test where it cannot be."""
    if shutil.which('go') is None:
        pytest.skip('Prism is built with Go, which is not on PATH')
    make = ['make', '--no-print-directory', 'prism', f'VENV={sys.prefix}']
    result = subprocess.run(make, cwd=ROOT, capture_output=True, timeout=_BUILD_SECONDS)
    if result.returncode:
        pytest.skip(f'Prism could not be built: {result.stderr.decode()[-500:]}')
    return str(pathlib.Path(sys.prefix) / 'bin' / 'prism')


@contextlib.contextmanager
def job_server(directory: pathlib.Path) -> Iterator[str]:
    """Prism by itself, as a job server; yields its address."""
    port = portpicker.pick_unused_port()
    server = [prism(), f'-job_port={port}', '-serve_http=false']
    with running(server, directory / 'prism.log', port):
        yield f'localhost:{port}'


@contextlib.contextmanager
def worker_pool(directory: pathlib.Path) -> Iterator[str]:
    """Beam's worker pool, a process for each job; yields its address."""
    port = portpicker.pick_unused_port()
    pool = [sys.executable, '-m', 'apache_beam.runners.worker.worker_pool_main']
    with running([*pool, f'--service_port={port}'], directory / 'pool.log', port):
        yield f'localhost:{port}'
