"""The protocol between client and shard: operations, fields of headers, errors.

Messages are those of `channel.py`. With shared memory a message has a header only. The first
message of a stream names the session, the layout and the shard, or asks for the `health`. Each
later request has an `operation` and a `sequence`. Each receives one reply with the same `sequence`,
and with an `error` if it fails.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from infra.sealed import LARGEST_COUNT

PROTOCOL_VERSION = 5

# Reasons for rejecting a gradient.
STALE = 'stale'
INVALID = 'invalid'

LARGEST_NORM = 1e15
"""Largest norm of a gradient. Its square is finite in float32, and so are the sums of some 10^8
such squares that optimizers keep."""

WORKER_KINDS = ('actor', 'learner', 'bundle')
"""Kinds of workers that enlist."""

HEALTH = 'health'
"""Operation of a first message that asks for the report of a shard (see health.py)."""


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
