"""Errors of environments that are not this project's."""

from infra.named_function import brief


class EnvironmentFailedError(ValueError):
    """An environment cannot be used; the message names it, what is wrong, and the remedy."""


def failure_text(error: BaseException) -> str:
    """An error of an environment on one line; its process may have ended without one."""
    lost = isinstance(error, (EOFError, ConnectionError))
    return 'lost its process (see the log)' if lost else f'raised {brief(error)}'
