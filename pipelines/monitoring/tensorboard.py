"""Scalars of a run in, TensorBoard's event files out; works without TensorFlow."""

import os
import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any


class ScalarWriter:
    """Writes scalars to a TensorBoard event file; steps are the run's emulator frames."""

    def __init__(self, directory: pathlib.Path, start_step: int = 0):
        """Creates an event file; TensorBoard then hides older events after `start_step`."""
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer import record_writer

        self._event_pb2, self._summary_pb2 = event_pb2, summary_pb2
        name = f'events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}'
        self._file = (directory / name).open('xb')
        self._records = record_writer.RecordWriter(self._file)
        # 'brain.Event:2' identifies the format.
        self._write(event_pb2.Event(wall_time=time.time(), file_version='brain.Event:2'))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        # Keeps events at `start_step`: an evaluation has the last step of its run.
        step = start_step + 1
        self._write(event_pb2.Event(wall_time=time.time(), step=step, session_log=start))
        self.flush()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())

    def write(self, step: int, scalars: Mapping[str, float | None], when: float) -> None:
        """Writes the scalars that are not None at `step` frames, `when` seconds since 1970."""
        values = [
            self._summary_pb2.Summary.Value(tag=tag, simple_value=value)
            for tag, value in scalars.items()
            if value is not None
        ]
        if values:
            summary = self._summary_pb2.Summary(value=values)
            self._write(self._event_pb2.Event(wall_time=when, step=step, summary=summary))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
