"""JSON objects from outside: text in, a checked object out.

Every JSON file is parsed here, so that a damaged one raises ValueError with one line, never another
error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Two fields: damage to one name leaves the other, so a damaged sealed object never passes for an
# unsealed one of an earlier version.
_KIND, _CHECKSUM = 'seal', 'checksum'
_SHA256 = 'sha256'

LARGEST_COUNT = 2**53
"""Largest count accepted from outside. It is exact as a float, and four times it (frames of agent
steps) fits in an int64."""


def parse_object(content: str | bytes) -> dict[str, Any]:
    """Parses a JSON object whose numbers are finite and whose texts are valid Unicode.

    Raises:
      ValueError: `content` is not such an object; the message is one line without the content.
    """
    try:
        value = json.loads(content)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise ValueError('no JSON of ours (nested too deeply)') from None
    except ValueError as error:  # its arguments may hold all of the content
        raise ValueError(f'no JSON of ours ({error})') from None
    if not isinstance(value, dict):
        raise ValueError('no JSON of ours (not an object)')
    return value


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values`, which must be JSON types, with their checksum."""
    return {**values, _KIND: _SHA256, _CHECKSUM: _digest(values)}


def unseal(sealed: Mapping[str, Any]) -> dict[str, Any]:
    """Checks and removes the seal; returns an unsealed object of an earlier version unchanged.

    Raises:
      ValueError: the values do not match the checksum.
    """
    values = {name: value for name, value in sealed.items() if name not in (_KIND, _CHECKSUM)}
    if len(values) == len(sealed):
        return values
    if sealed.get(_KIND) != _SHA256 or sealed.get(_CHECKSUM) != _digest(values):
        raise ValueError('its content is not what was written (checksum)')
    return values


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(text.encode()).hexdigest()
