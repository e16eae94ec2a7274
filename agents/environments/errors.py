"""Errors of environments that are not this project's."""


class EnvironmentFailedError(ValueError):
    """An environment cannot be used; the message names it, what is wrong, and the remedy."""
