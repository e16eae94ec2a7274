"""The protocol between client and shard: JSON headers, tensors as bytes, and errors.

A message is a Flight chunk. Its metadata is a JSON object, the header. Its record batch, if it has
one, is a single uint8 column with a tensor's bytes, the body. With shared memory a message has only
the header. The first message of a stream names the session, the layout and the shard. Each later
request has an `operation` and a `sequence`. Each receives one reply with the same `sequence`, and
with an `error` if it fails.
"""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa

from infra.sealed import LARGEST_COUNT

PROTOCOL_VERSION = 3
SCHEMA = pa.schema([('bytes', pa.uint8())])
WIRE_TYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}

# Reasons for rejecting a gradient.
STALE = 'stale'
INVALID = 'invalid'

LARGEST_NORM = 1e15
"""Largest norm of a gradient. Its square is finite in float32, and so are the sums of some 10^8
such squares that optimizers keep."""

WORKER_KINDS = ('actor', 'learner', 'bundle')
"""Kinds of workers that enlist."""

LARGEST_REPLY_BYTES = 1 << 26
"""Largest header of a reply. The reply to `save` lists all clients and workers, up to 5 MB."""

_LARGEST_REQUEST_BYTES = 1 << 20  # the layout of a network is the largest part, some kB


class ParameterServerError(Exception):
    """The parameter server could not carry out a request."""


class ParameterServerUnavailable(ParameterServerError):
    """A shard did not reply in time.

    Attributes:
      address: the shard's `host:port`.
      remedy: what the user can do.
    """

    def __init__(self, address: str, problem: str, remedy: str) -> None:
        super().__init__(f'parameter shard {address}: {problem}; {remedy}')
        self.address = address
        self.remedy = remedy


class NotInitialisedError(ParameterServerUnavailable):
    """A shard has no parameters: no client initialised it, or it restarted without a state."""


class LayoutMismatchError(ParameterServerError):
    """Client and shard have different variables, numbers of shards or protocol versions."""


class RequestRefusedError(ParameterServerError):
    """The shard refuses the request; a repetition would fail too."""


ERRORS: dict[str, type[ParameterServerError]] = {
    'layout': LayoutMismatchError,
    'refused': RequestRefusedError,
}
UNINITIALISED = 'uninitialised'


def is_applicable(gradient: np.ndarray) -> bool:
    """Whether a gradient, float32 [n], is finite and its norm at most `LARGEST_NORM`."""
    return bool(np.dot(gradient, gradient) <= LARGEST_NORM**2)  # false for NaN too


def encode_header(header: dict[str, Any]) -> pa.Buffer:
    """Returns a header as Flight metadata."""
    return pa.py_buffer(json.dumps(header).encode())


def decode_header(
    metadata: pa.Buffer | None, largest: int = _LARGEST_REQUEST_BYTES
) -> dict[str, Any]:
    """Returns the header of a Flight chunk, of at most `largest` bytes.

    Raises:
      ValueError: the chunk has no header, or the header is too large or not a JSON object.
    """
    if metadata is None:
        raise ValueError('a message came without a header')
    if metadata.size > largest:
        raise ValueError(f'a header of {metadata.size} bytes; {largest} are allowed')
    header = json.loads(metadata.to_pybytes())
    if not isinstance(header, dict):
        raise ValueError(f'a header must be a JSON object, got {header!r}')
    return header


def count_of(header: dict[str, Any], name: str) -> int:
    """Returns the field `name`, an integer >= 0.

    Raises:
      ValueError: the field is missing, not an integer, or outside 0 .. `LARGEST_COUNT`.
    """
    value = header.get(name)
    if type(value) is not int or not 0 <= value <= LARGEST_COUNT:
        raise ValueError(f'{name} of a message must be a count, got {value!r:.40}')
    return value


def text_of(header: dict[str, Any], name: str, longest: int) -> str:
    """Returns the field `name`, a string of at most `longest` characters.

    Raises:
      ValueError: the field is missing, not a string, or too long.
    """
    value = header.get(name)
    if not isinstance(value, str) or len(value) > longest:
        raise ValueError(f'{name} of a message must be at most {longest} characters of text')
    return value


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
      ValueError: the number of bytes is not a multiple of the element's size.
    """
    return decode_octets(batch).view(WIRE_TYPES[wire_dtype])


def convert(source: np.ndarray, out: np.ndarray) -> None:
    """Copies between float32 and bfloat16 arrays, rounding to nearest even."""
    if source.dtype == WIRE_TYPES['bfloat16'] and out.dtype == np.float32:
        # A bfloat16 is the upper half of a float32; a shift is ten times faster than a cast.
        np.left_shift(source.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, source, casting='same_kind')
