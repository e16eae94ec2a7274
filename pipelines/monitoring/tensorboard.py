"""Figures of a run in, TensorBoard's event files out; works without TensorFlow."""

import os
import pathlib
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

METRICS = ('return/evaluation', 'return/episode')
"""Scalars by which TensorBoard's HPARAMS page compares runs."""


class EventWriter:
    """Writes to a TensorBoard event file; steps are the run's emulator frames."""

    def __init__(self, directory: pathlib.Path, start_step: int = 0):
        """Creates an event file; TensorBoard then hides older events after `start_step`."""
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer import record_writer

        self._event_pb2, self._summary_pb2 = event_pb2, summary_pb2
        self._start_step = start_step
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

    def _write_summary(self, step: int, summary: Any, when: float) -> None:
        self._write(self._event_pb2.Event(wall_time=when, step=step, summary=summary))

    def describe(
        self, name: str, settings: Mapping[str, Any], launch: Mapping[str, Any], when: float
    ) -> None:
        """Writes the settings as hyperparameters, and settings and launch as texts.

        They are written at the first step, where no later start hides them.

        Args:
          name: of the run, its trial ID among the hyperparameters.
          settings: value of each setting, by its name.
          launch: its line of `launches.jsonl`.
          when: seconds since 1970.
        """
        from tensorboard.plugins.hparams import summary_v2 as hparams
        from tensorboard.plugins.text import summary_v2 as text

        for summary in (
            _experiment(settings),
            hparams.hparams_pb(settings, trial_id=name, start_time_secs=when),
            text.text_pb('configuration', _table(name, settings.items())),
            text.text_pb('provenance', _table(name, _flat(launch))),
        ):
            self._write_summary(self._start_step, summary, when)
        self.flush()

    def write(self, step: int, scalars: Mapping[str, float | None], when: float) -> None:
        """Writes the scalars that are not None at `step` frames, `when` seconds since 1970."""
        values = [
            self._summary_pb2.Summary.Value(tag=tag, simple_value=value)
            for tag, value in scalars.items()
            if value is not None
        ]
        if values:
            self._write_summary(step, self._summary_pb2.Summary(value=values), when)

    def write_histogram(
        self, step: int, tag: str, bounds: Sequence[float], numbers: Sequence[int], when: float
    ) -> None:
        """Writes how many values lie in each bin.

        Args:
          step, when: as for `write`.
          tag: of the histogram.
          bounds: upper bound of each bin, ascending; the first bin holds the bound alone.
          numbers: of values, one per bin.
        """
        from tensorboard.plugins.histogram import metadata
        from tensorboard.util import tensor_util

        bins = list(zip((bounds[0], *bounds), bounds, map(float, numbers)))
        summary = self._summary_pb2.Summary()
        described = metadata.create_summary_metadata(display_name=None, description=None)
        summary.value.add(tag=tag, metadata=described, tensor=tensor_util.make_tensor_proto(bins))
        self._write_summary(step, summary, when)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _experiment(settings: Mapping[str, Any]) -> Any:
    """Declares hyperparameters and metrics; otherwise TensorBoard makes each scalar a metric."""
    from tensorboard.compat.proto import summary_pb2
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    types = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
    experiment = api_pb2.Experiment(
        hparam_infos=[
            api_pb2.HParamInfo(name=name, type=types.get(type(value), api_pb2.DATA_TYPE_FLOAT64))
            for name, value in settings.items()
        ],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in METRICS],
    )
    data = plugin_data_pb2.HParamsPluginData(experiment=experiment)
    summary = summary_pb2.Summary()
    described = metadata.create_summary_metadata(data)
    summary.value.add(tag=metadata.EXPERIMENT_TAG, metadata=described, tensor=metadata.NULL_TENSOR)
    return summary


def _flat(values: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    """The entries of nested mappings, their names joined by dots."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f'{prefix}{name}.')
        else:
            yield f'{prefix}{name}', value


def _table(title: str, entries: Iterable[tuple[str, Any]]) -> str:
    """A Markdown table below a heading."""
    rows = [f'| {name} | {_cell(value)} |' for name, value in entries]
    return '\n'.join([f'## {title}', '', '| name | value |', '|---|---|', *rows])


def _cell(value: Any) -> str:
    return f'`{value}`'.replace('|', '\\|').replace('\n', ' ')
