"""The error of a user's mistake: `run.py` prints its one line and exits with code 2."""


class UsageError(Exception):
    """Something the user can mend; the message is one line naming the value and the remedy."""
