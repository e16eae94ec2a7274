"""What client and shard say to each other: JSON headers, tensors as bytes, and the errors.

A message is a Flight chunk: its metadata is a JSON object (the header), its record batch, when
there is one, a single uint8 column with a tensor's bytes (the body). In shared memory the header
travels alone. A stream opens with `connect`; each later request has `operation` and `sequence`,
and gets one reply with the same `sequence` or an `error`.
"""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa

PROTOCOL_VERSION = 2
SCHEMA = pa.schema([('bytes', pa.uint8())])
WIRE_TYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}

# Reasons for which a shard refuses a gradient.
STALE = 'stale'
INVALID = 'invalid'


class ParameterServerError(Exception):
    """The parameter server could not do what was asked."""


class ParameterServerUnavailable(ParameterServerError):
    """A shard did not answer in time.

    Attributes:
      address: the shard's `host:port`.
      remedy: what to do about it.
    """

    def __init__(self, address: str, problem: str, remedy: str) -> None:
        super().__init__(f'parameter shard {address}: {problem}; {remedy}')
        self.address = address
        self.remedy = remedy


class NotInitialisedError(ParameterServerUnavailable):
    """A shard has no parameters: nobody called `initialise`, or it restarted without a state."""


class LayoutMismatchError(ParameterServerError):
    """Client and shard do not agree on the variables, or on how many shards there are."""


class RequestRefusedError(ParameterServerError):
    """The shard could not do this request; asking again would not help."""


ERRORS: dict[str, type[ParameterServerError]] = {
    'layout': LayoutMismatchError,
    'refused': RequestRefusedError,
}
UNINITIALISED = 'uninitialised'


def encode_header(header: dict[str, Any]) -> pa.Buffer:
    """Returns a header as Flight metadata."""
    return pa.py_buffer(json.dumps(header).encode())


def decode_header(metadata: pa.Buffer | None) -> dict[str, Any]:
    """Returns the header of a Flight chunk.

    Raises:
      ValueError: the chunk has no header, or it is not a JSON object.
    """
    if metadata is None:
        raise ValueError('a message came without a header')
    header = json.loads(metadata.to_pybytes())
    if not isinstance(header, dict):
        raise ValueError(f'a header must be a JSON object, got {header!r}')
    return header


def encode_body(array: np.ndarray) -> pa.RecordBatch:
    """Returns a contiguous array as a record batch that shares its memory."""
    octets = array.view(np.uint8)
    column = pa.Array.from_buffers(pa.uint8(), octets.size, [None, pa.py_buffer(octets)])
    return pa.RecordBatch.from_arrays([column], schema=SCHEMA)


def decode_octets(batch: pa.RecordBatch) -> np.ndarray:
    """Returns a read-only view of a record batch's bytes, uint8 [n]."""
    column = batch.column(0)
    return np.frombuffer(column.buffers()[1], np.uint8, len(column), column.offset)


def decode_body(batch: pa.RecordBatch, wire_dtype: str) -> np.ndarray:
    """Returns a read-only view of a record batch's bytes as elements.

    Raises:
      ValueError: the bytes do not make whole elements.
    """
    return decode_octets(batch).view(WIRE_TYPES[wire_dtype])


def convert(source: np.ndarray, out: np.ndarray) -> None:
    """Copies between float32 and bfloat16 arrays, rounding to nearest even."""
    if source.dtype == WIRE_TYPES['bfloat16'] and out.dtype == np.float32:
        # A bfloat16 is the upper half of a float32; a shift is ten times faster than a cast.
        np.left_shift(source.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, source, casting='same_kind')
