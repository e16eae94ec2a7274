"""Fields of configuration dataclasses: help texts of their flags and checks of their values."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


def described(default: Any, text: str) -> Any:
    """Creates a dataclass field with its flag's help text."""
    return dataclasses.field(default=default, metadata={'help': text})


def require(config: Any, name: str, satisfied: bool, allowed: str) -> None:
    """Raises ValueError, naming the field, its value and what is allowed, unless `satisfied`."""
    if not satisfied:
        raise ValueError(f'--{name} {getattr(config, name)!r}: must be {allowed}')


def require_at_least(config: Any, least: float, *names: str) -> None:
    """Raises ValueError unless each of the named fields is at least `least`, and finite."""
    for name in names:
        value = getattr(config, name)
        require(config, name, math.isfinite(value), 'a finite number')
        require(config, name, value >= least, f'at least {least}')


def require_from_to(config: Any, least: int, most: int, *names: str) -> None:
    """Raises ValueError unless each of the named fields is from `least` to `most`."""
    for name in names:
        require(config, name, least <= getattr(config, name) <= most, f'from {least} to {most}')


def require_positive(config: Any, *names: str) -> None:
    """Raises ValueError unless each of the named fields is above 0, and finite."""
    for name in names:
        value = getattr(config, name)
        require(config, name, math.isfinite(value), 'a finite number')
        require(config, name, value > 0, 'more than 0')


def require_fraction(config: Any, *names: str) -> None:
    """Raises ValueError unless each of the named fields is from 0 to 1."""
    for name in names:
        require(config, name, 0 <= getattr(config, name) <= 1, 'from 0 to 1')


def require_choice(config: Any, name: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless the named field is one of `choices`."""
    require(config, name, getattr(config, name) in choices, f'one of {", ".join(choices)}')
