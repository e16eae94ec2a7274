"""What goes wrong between a worker and a replay shard: two errors, both after a bounded wait."""


class ReplayError(RuntimeError):
    """Base of the replay's errors."""


class ReplayTimeout(ReplayError):
    """The shard answers, but its rate limiter stayed closed for the whole wait."""


class ReplayUnavailable(ReplayError):
    """The shard did not answer for the whole wait."""
