"""Bounds the CPU time of a process that runs beside others: CPU time used in, pauses out."""

import os
import time
from collections.abc import Callable

from infra.cores import usable_cores
from infra.process import cpu_seconds

_MOST_CPU = 2.0  # CPU seconds saved up while the process waits


def rate_of(share: float) -> float:
    """CPU seconds per second that are a share of the CPU that this process may use."""
    return share * usable_cores()


def level_after(level: float, elapsed_seconds: float, used_seconds: float, rate: float) -> float:
    """The new level of a token bucket, CPU seconds; negative while more was used than allowed.

    Args:
      level: the old one.
      elapsed_seconds: since then, wall time.
      used_seconds: since then, CPU time.
      rate: CPU seconds gained per second of wall time.
    """
    return min(_MOST_CPU, level + rate * elapsed_seconds) - used_seconds


class Allowance:
    """A token bucket of CPU time: gains `rate` CPU seconds a second, loses what the process uses.

    Over any time T the process uses at most `rate` x T + 2 CPU seconds, once its start is paid off
    and if it pauses as told.
    """

    def __init__(
        self,
        rate: float,
        debt_seconds: float = 0.0,
        monotonic: Callable[[], float] = time.monotonic,
        used: Callable[[], float] = lambda: cpu_seconds(os.getpid()) or 0.0,
    ):
        """
        Args:
          rate: CPU seconds per second, above 0.
          debt_seconds: CPU seconds to pay off first, besides those used so far.
          monotonic: clock, seconds.
          used: CPU seconds of this process so far.
        """
        self._rate, self._monotonic, self._used = rate, monotonic, used
        self._level = -debt_seconds
        self._looked, self._used_before = monotonic(), 0.0

    def pause_seconds(self) -> float:
        """How long to sleep before the next work; 0 while CPU time is left."""
        now, used = self._monotonic(), self._used()
        self._level = level_after(
            self._level, now - self._looked, used - self._used_before, self._rate
        )
        self._looked, self._used_before = now, used
        return max(0.0, -self._level / self._rate)
