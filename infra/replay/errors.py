"""Errors between a worker and a replay shard."""


class ReplayError(RuntimeError):
    """Base of the replay's errors."""


class ReplaySpecMismatch(ValueError):
    """The shard stores windows of another shape; waiting does not help."""


class ReplayTimeout(ReplayError):
    """The shard is reachable, but its rate limiter stayed closed for the whole wait."""


class ReplayUnavailable(ReplayError):
    """The shard was unreachable for the whole wait."""
