"""Damage of a disk: files with one bit flipped."""

import pathlib
from collections.abc import Iterator

import numpy as np

FLIPS = 100


def flipped(content: bytes, count: int = FLIPS) -> Iterator[bytes]:
    """The content with one random bit flipped, `count` times."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        damaged = bytearray(content)
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        yield bytes(damaged)


def flips_of(file: pathlib.Path) -> Iterator[int]:
    """Flips one random bit of the file, `FLIPS` times, and restores it at the end."""
    whole = file.read_bytes()
    for number, damaged in enumerate(flipped(whole)):
        file.write_bytes(damaged)
        yield number
    file.write_bytes(whole)
