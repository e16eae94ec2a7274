"""Environments in processes of their own: makers in, gymnasium's vector environment out; its end.

This module does not import TensorFlow: each process would.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import time
from collections.abc import Callable, Iterator, Sequence

import gymnasium
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from infra.process import exit_with_parent

_CLOSE_SECONDS = 3.0  # a simulator may have to end a program of its own


def in_processes(makers: Sequence[Callable[[], gymnasium.Env]]) -> AsyncVectorEnv:
    """Steps each environment in a process of its own, which ends with this one."""
    with _parenthood():
        return AsyncVectorEnv(
            [functools.partial(_made, os.getpid(), make) for make in makers],
            autoreset_mode=AutoresetMode.NEXT_STEP,
            # A fork of a process with TensorFlow's and gRPC's threads may hang.
            context='spawn',
        )


@contextlib.contextmanager
def _parenthood() -> Iterator[None]:
    """Lets a daemon of multiprocessing, as Dask's workers are, start processes.

    Python forbids it, as they would outlive the daemon; these do not (see `_made`).
    """
    process = multiprocessing.current_process()
    daemon = process.daemon
    if daemon:
        process.daemon = False
    try:
        yield
    finally:
        if daemon:
            process.daemon = True


def _made(parent: int, make: Callable[[], gymnasium.Env]) -> gymnasium.Env:
    if os.getpid() != parent:  # gymnasium makes one in the parent, to look at its spaces
        exit_with_parent()  # a step that hangs would outlive it
    return make()


def lost(environments: AsyncVectorEnv) -> int | None:
    """Number of the environment whose process has ended by itself, if one has."""
    sentinels = [process.sentinel for process in environments.processes]
    ended = multiprocessing.connection.wait(sentinels, _CLOSE_SECONDS)
    return next((i for i, sentinel in enumerate(sentinels) if sentinel in ended), None)


def close_processes(environments: AsyncVectorEnv) -> None:
    """Closes the environments; kills processes that have not ended in `_CLOSE_SECONDS`.

    gymnasium's own `close` waits without a bound, or gives an environment no time to close.
    """
    if environments.closed:
        return
    environments.closed = True
    for pipe in environments.parent_pipes:
        if pipe is not None:  # None: its process ended with an error
            with contextlib.suppress(OSError):
                pipe.send(('close', None))
    deadline = time.monotonic() + _CLOSE_SECONDS
    for process in environments.processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    for pipe in environments.parent_pipes:
        if pipe is not None:
            pipe.close()
