"""What goes wrong between a worker and a replay shard."""


class ReplayError(RuntimeError):
    """Base of the replay's errors."""


class ReplaySpecMismatch(ValueError):
    """The shard stores windows of another shape; no wait will change that."""


class ReplayTimeout(ReplayError):
    """The shard answers, but its rate limiter stayed closed for the whole wait."""


class ReplayUnavailable(ReplayError):
    """The shard did not answer for the whole wait."""
