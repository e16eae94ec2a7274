"""Sinks: the rows of a table in, JSON lines and Parquet files out.

A file's name says whose rows it holds and the number of the first, such as a worker's segment. What
an engine does again, after a worker's death or a failed commit, writes the same rows to files of
the same names: each row is there once. Beam's own file sinks group first, so that an engine that
fails later, or drops what it takes for late, loses rows there.
"""

import io
import json
import logging
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics import Metrics
from pyarrow import parquet

from infra.disk import is_remote, write_atomically
from infra.parameter_server.ledger import BLOCK_SEGMENTS
from pipelines.errors import reason_of
from pipelines.experiment.job_settings import JobSettings
from pipelines.monitoring.beam_counters import REASONS, UNWRITTEN

Sink = Callable[[str, type], beam.PTransform]
"""Makes the transform that writes a table, given its name and the type of its rows."""


FILE_SEGMENTS = BLOCK_SEGMENTS
"""Segments in one file, at most; a new one begins at each multiple."""

_ARROW: Mapping[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    list[int]: pa.list_(pa.int64()),
}


def schema_of(row: type) -> pa.Schema:
    """The Arrow schema of a named tuple's fields."""
    return pa.schema([(name, _ARROW[kind]) for name, kind in typing.get_type_hints(row).items()])


def place_of(row: Any) -> tuple[str, int, int | None]:
    """Owner of a row, its number among the owner's, and the number of the file that holds it.

    A worker owns its segments and games, a job its periods. A period has a file of its own (None),
    since a segment that comes late brings a new sum.
    """
    if 'segment' in row._fields:
        return f'{row.kind}-{row.worker:03d}', row.segment, row.segment // FILE_SEGMENTS
    return f'{row.kind}-job-{row.submission:04d}', int(row.time), None


class WriteFiles(beam.DoFn):
    """Writes `<table>-<owner>-<first number>` with suffix .jsonl and .parquet."""

    _reasons = Metrics.string_set(UNWRITTEN, REASONS)

    def __init__(self, directory: str, table: str, row: type):
        self._directory, self._table, self._row = directory, table, row

    def start_bundle(self) -> None:
        self._held: dict[str, list[Any]] = {}

    def process(self, row: Any) -> None:
        """Holds the row until its file is complete."""
        owner, _, file = place_of(row)
        held = self._held.setdefault(owner, [])
        if held and (file is None or file != place_of(held[0])[2]):
            self._write(held)
            held.clear()
        held.append(row)

    def finish_bundle(self) -> None:
        for held in self._held.values():
            self._write(held)

    def _write(self, rows: list[Any]) -> None:
        """Writes a file in both formats; one that cannot be written costs no worker its element."""
        try:
            self._write_both(rows)
        except Exception as error:  # a store raises what it likes
            owner, _, _ = place_of(rows[0])
            Metrics.counter(UNWRITTEN, owner).inc(len(rows))
            self._reasons.add(reason_of(error))
            logging.warning('statistics: %d rows of %s not written: %s', len(rows), owner, error)

    def _write_both(self, rows: list[Any]) -> None:
        values = [row._asdict() for row in rows]
        owner, number, _ = place_of(rows[0])
        name = f'{self._table}-{owner}-{number:08d}'
        self._put(f'{name}.jsonl', ''.join(f'{json.dumps(row)}\n' for row in values).encode())
        content = io.BytesIO()
        parquet.write_table(pa.Table.from_pylist(values, schema_of(self._row)), content)
        self._put(f'{name}.parquet', content.getvalue())

    def _put(self, name: str, content: bytes) -> None:
        path = FileSystems.join(self._directory, name)
        if is_remote(path):
            with FileSystems.create(path) as file:
                file.write(content)
        else:
            pathlib.Path(self._directory).mkdir(parents=True, exist_ok=True)
            write_atomically(pathlib.Path(path), content)


def sink_of(settings: JobSettings) -> Sink | None:
    """The sink of a job, None for none.

    Raises:
      UsageError: `--statistics_sink` names no function.
    """
    if (own := settings.sink()) is not None:
        return own
    directory = settings.statistics_dir
    if directory is None:
        return None
    return lambda table, row: beam.ParDo(WriteFiles(directory, table, row))
