"""Errors of environments that are not this project's."""

import socket
import sys

import gymnasium

from infra.named_function import brief

_MISSING = (ImportError, gymnasium.error.DependencyNotInstalled, gymnasium.error.UnregisteredEnv)


class EnvironmentFailedError(ValueError):
    """An environment cannot be used; the message names it, what is wrong, and the remedy."""


def failure_text(error: BaseException) -> str:
    """An error of an environment on one line; its process may have ended without one."""
    lost = isinstance(error, (EOFError, ConnectionError))
    return 'lost its process (see the log)' if lost else f'raised {brief(error)}'


def opening_failed(name: str, error: BaseException, remedy: str) -> EnvironmentFailedError:
    """The error for an environment that cannot be opened; of a missing package it names the place.

    Workers may run where the launcher's packages are not.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, _MISSING):
        cause = cause.__cause__
    if cause is None:
        return EnvironmentFailedError(f'{name}: {brief(error)}. Fix: {remedy}.')
    return EnvironmentFailedError(
        f'{name}: {brief(cause).rstrip(".")}, in {sys.executable} on {socket.gethostname()}. Fix:'
        ' install its package there (workers of a service get it by --requirements_file or their'
        ' image), or put your own module on PYTHONPATH there.'
    )
