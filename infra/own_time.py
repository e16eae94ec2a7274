"""A process's own time: looks at the clock in, seconds out, without pauses of the process."""

import time
from collections.abc import Callable

_LONGEST_LOOK_SECONDS = 10.0  # a loop may take this long if servers do not reply


class OwnTime:
    """A clock to measure the silence of other processes; it pauses while this process does.

    A process that is stopped for a minute receives no message meanwhile, though the others sent
    theirs. The pause must not count as their silence.

    Attributes:
      seconds: value at the last look.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic):
        """Starts at 0; `monotonic` returns the system's time in seconds."""
        self._monotonic = monotonic
        self._looked = monotonic()
        self.seconds = 0.0

    def look(self, counts: bool = True) -> float:
        """Returns the seconds so far.

        Args:
          counts: whether to add the time since the last look, at most 10 s of it.
        """
        now = self._monotonic()
        if counts:
            self.seconds += min(now - self._looked, _LONGEST_LOOK_SECONDS)
        self._looked = now
        return self.seconds


class Silences:
    """Servers that do not reply, and since when; true while there is one."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self._since)

    def see(self, address: str, answers: bool, now: float) -> float:
        """Records a reply or its absence; returns the seconds since the first absence in a row."""
        if answers:
            self._since.pop(address, None)
            return 0.0
        return now - self._since.setdefault(address, now)

    def restart(self, address: str, now: float) -> None:
        """Restarts the silence of one server at `now`."""
        self._since[address] = now

    def clear(self) -> None:
        """Forgets all silences, after every server has replied."""
        self._since.clear()
