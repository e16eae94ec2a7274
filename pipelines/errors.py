"""The error of a user's mistake: a command prints its message and exits with code 2."""


class UsageError(Exception):
    """A mistake the user can fix; the message is one line that names value and remedy."""
