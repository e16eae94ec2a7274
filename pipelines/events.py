"""Telemetry events: workers' records in, checked values out; heartbeats."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from agents.config import STALENESS_BOUNDS
from infra.memory import resident_bytes
from infra.sealed import LARGEST_COUNT

if TYPE_CHECKING:
    from infra.telemetry import Telemetry


_KINDS = ('episode', 'actor', 'learner', 'heartbeat')
_MAX_FIELDS = 64
_MAX_CHARACTERS = 200
_MAX_NUMBER = 3.4e38
"""Largest float32, which TensorBoard keeps; sums of such numbers are finite float64."""
_MAX_INTEGER = 2**31 - 1
"""Largest worker number and process ID."""


def is_event(event: Any) -> bool:
    """Whether an item of the telemetry queue is a valid worker event of bounded size."""
    if not isinstance(event, Mapping) or len(event) > _MAX_FIELDS:
        return False
    if not all(is_name(name) for name in event) or not is_name(event.get('component')):
        return False
    kind, worker = event.get('kind'), event.get('worker')
    if not isinstance(kind, str) or kind not in _KINDS or not _is_index(worker):
        return False
    pid, session = event.get('pid', 1), event.get('session', 's')
    if not _is_index(pid) or pid == 0 or not is_name(session):
        return False
    return isinstance(event.get('replay', {}), Mapping)


def is_name(value: Any) -> bool:
    """Whether `value` is a short printable text (no lone surrogate, no newline)."""
    return isinstance(value, str) and len(value) <= _MAX_CHARACTERS and value.isprintable()


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INTEGER


def finite(value: Any) -> float | None:
    """`value` (also NumPy's) as a float if it is a finite float32, else None."""
    if isinstance(value, bool | str | bytes) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= _MAX_NUMBER else None


def count(value: Any) -> int | None:
    """`value` as an int if it is a number from 0 to 2^53, else None."""
    number = finite(value)
    return int(number) if number is not None and 0 <= number <= LARGEST_COUNT else None


def counts(value: Any) -> dict[str, int]:
    """The entries of `value` that are counts; empty if it is not a mapping."""
    if not isinstance(value, Mapping):
        return {}
    numbers = {str(name): count(number) for name, number in value.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def histogram(value: Any) -> list[int] | None:
    """`value` if it is a histogram of staleness (see `STALENESS_BOUNDS`), else None."""
    if not isinstance(value, list) or len(value) != len(STALENESS_BOUNDS) + 1:
        return None
    bins = [count(number) for number in value]
    return None if None in bins else bins  # type: ignore[return-value]


HEARTBEAT = 'heartbeat'


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """A worker's sign of life.

    Attributes:
      component: such as 'actor'.
      worker: its index.
      submission: of its job; a late heartbeat of a predecessor has an older one.
      pid: its process ID.
      ended: True in the last heartbeat of a worker that ended well.
    """

    component: str
    worker: int
    submission: int
    pid: int
    ended: bool = False


def beat(telemetry: 'Telemetry', ended: bool = False) -> None:
    """Sends a heartbeat of this process with its memory; the telemetry adds `submission`."""
    telemetry.record(HEARTBEAT, pid=os.getpid(), ended=ended, memory_bytes=resident_bytes())


def heartbeats_in(events: Iterable[Mapping[str, Any]]) -> Iterator[Heartbeat]:
    """Yields the heartbeats among valid events (`is_event`), in order.

    Skips those without job or process. Ignores `time`: clocks of two processes are never compared.
    """
    for event in events:
        job, pid = count(event.get('submission')), event.get('pid')
        if event['kind'] == HEARTBEAT and job is not None and pid is not None:
            ended = event.get('ended') is True
            yield Heartbeat(event['component'], event['worker'], job, pid, ended)
