"""TensorBoard's event files of a run in, its sessions with their scalars out.

A session is one launch: the time between its first and its last event.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

_POINTS = 10_000
"""Kept of each scalar of a session; TensorBoard samples them evenly if there are more."""


@dataclasses.dataclass(frozen=True)
class Session:
    """What one launch wrote.

    Attributes:
      start, end: seconds since 1970.
      scalars: by tag, <float64>[points, 3]: emulator frames, seconds since 1970, value.
    """

    start: float
    end: float
    scalars: Mapping[str, np.ndarray]


def read_sessions(directory: pathlib.Path, notify: Callable[[str], None]) -> list[Session]:
    """The sessions whose events are in `directory`, oldest first; names unreadable files.

    Drops values that a later session replaces, because it resumed from an earlier checkpoint.
    """
    # TensorFlow, which TensorBoard imports to read files, says at length what it was built with.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    sessions = []
    for file in sorted(directory.glob('events.out.tfevents.*')):
        try:
            session = _read(file)
        except Exception as error:  # of any kind: TensorBoard documents none
            reason = (str(error) or type(error).__name__).splitlines()[0]
            notify(f'events/{file.name}: skipped ({reason}). Fix: restore a copy of the file.')
            continue
        if session is not None:
            sessions.append(session)
    sessions.sort(key=lambda session: session.start)
    return [_before(session, sessions[index + 1 :]) for index, session in enumerate(sessions)]


def _read(file: pathlib.Path) -> Session | None:
    """The session of one event file, None if it has no event."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not file.stat().st_size:
        return None
    events = EventAccumulator(str(file), size_guidance={'scalars': _POINTS})
    events.Reload()
    scalars = {
        tag: np.array([(e.step, e.wall_time, e.value) for e in events.Scalars(tag)], np.float64)
        for tag in events.Tags()['scalars']
    }
    start = events.FirstEventTimestamp()
    end = max((float(rows[:, 1].max()) for rows in scalars.values()), default=start)
    return Session(start, max(start, end), scalars)


def _before(session: Session, later: Sequence[Session]) -> Session:
    """The session without the values from the first frames of `later` on."""
    starts = [rows[0, 0] for follower in later for rows in follower.scalars.values()]
    limit = min(starts, default=np.inf)
    kept = {tag: rows[rows[:, 0] <= limit] for tag, rows in session.scalars.items()}
    return dataclasses.replace(session, scalars={t: rows for t, rows in kept.items() if len(rows)})
