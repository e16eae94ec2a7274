"""Tensors on the network: float32 vectors in, bytes out, and back.

`--wire` names one encoding of gradients and one of parameters. What an accepted gradient loses in
its encoding is added to the client's next one (error feedback; Seide et al. 2014), so that every
part of it arrives, if late. A worker that ends takes what is left with it.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import ml_dtypes
import numpy as np

_BFLOAT16_TYPE = np.dtype(ml_dtypes.bfloat16)
_LEAST = np.finfo(np.float32).tiny


class Encoding(Protocol):
    """How a vector float32 [n] becomes bytes."""

    def most_bytes(self, n: int) -> int:
        """Size of the longest encoding of n values."""

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Encodes finite values float32 [n]; returns a contiguous array of any type."""

    def decode(self, body: np.ndarray, out: np.ndarray) -> None:
        """Writes what the bytes `body` uint8 [size] hold to `out` float32 [n].

        Raises:
          ValueError: they are no encoding of n values.
        """


class Float32:
    """Values as they are: 4 bytes each."""

    def most_bytes(self, n: int) -> int:
        return 4 * n

    def encode(self, values: np.ndarray) -> np.ndarray:
        return values

    def decode(self, body: np.ndarray, out: np.ndarray) -> None:
        _require_size(body, 4 * out.size)
        np.copyto(out, body.view(np.float32))


class BFloat16:
    """The upper half of each float32, rounded to nearest even: 2 bytes each."""

    def most_bytes(self, n: int) -> int:
        return 2 * n

    def encode(self, values: np.ndarray) -> np.ndarray:
        return values.astype(_BFLOAT16_TYPE)

    def decode(self, body: np.ndarray, out: np.ndarray) -> None:
        _require_size(body, 2 * out.size)
        # A shift is ten times faster than a cast.
        np.left_shift(body.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)


class Int8:
    """Whole numbers from -127 to 127 and a scale for each block of 1,024: some 1.004 bytes each.

    Each block has its own scale, since the gradients of layers differ in size (block-wise
    quantization; Dettmers et al. 2022).
    """

    _BLOCK = 1024

    def most_bytes(self, n: int) -> int:
        return n + 4 * self._blocks(n)

    def encode(self, values: np.ndarray) -> np.ndarray:
        blocks, n = self._blocks(values.size), values.size
        body = np.empty(self.most_bytes(n), np.uint8)
        scales = body[: 4 * blocks].view(np.float32)
        starts = np.arange(0, n, self._BLOCK)
        np.multiply(np.maximum.reduceat(np.abs(values), starts), 1 / 127, out=scales)
        scales[scales < _LEAST] = 0  # the inverse of a smaller one is infinite
        per_unit = np.divide(1, scales, where=scales > 0, out=np.zeros_like(scales))
        np.rint(
            values * self._each(per_unit, n), out=body[4 * blocks :].view(np.int8), casting='unsafe'
        )
        return body

    def decode(self, body: np.ndarray, out: np.ndarray) -> None:
        _require_size(body, self.most_bytes(out.size))
        blocks = self._blocks(out.size)
        scales = body[: 4 * blocks].view(np.float32)
        np.multiply(body[4 * blocks :].view(np.int8), self._each(scales, out.size), out=out)

    def _blocks(self, n: int) -> int:
        return -(-n // self._BLOCK)

    def _each(self, of_blocks: np.ndarray, n: int) -> np.ndarray:
        """Repeats a block's number for each of its values, float32 [n]."""
        return np.repeat(of_blocks, self._BLOCK)[:n]


class TopK:
    """About a hundredth of the values, the largest, and their places: 0.08 bytes for each of all.

    The least size that is sent is estimated from a sample (Lin et al. 2018, "Deep Gradient
    Compression"). If more than 4 % of the values reach it, the largest of them are sent.
    """

    _FRACTION, _MOST_FRACTION = 0.01, 0.04
    _SAMPLE = 16_384

    def most_bytes(self, n: int) -> int:
        return 8 * self._most(n)

    def encode(self, values: np.ndarray) -> np.ndarray:
        sizes = np.abs(values)
        places = np.flatnonzero(sizes >= self._least(sizes)).astype(np.uint32)
        if not places.size:  # a message without a body would be one without a gradient
            places = np.array([sizes.argmax()], np.uint32)
        if (most := self._most(values.size)) < places.size:
            largest = np.argpartition(sizes[places], places.size - most)[-most:]
            places = np.sort(places[largest])
        return np.concatenate([places, values[places].view(np.uint32)])

    def decode(self, body: np.ndarray, out: np.ndarray) -> None:
        most = self.most_bytes(out.size)
        if body.size % 8 or body.size > most:
            raise ValueError(
                f'a top-k body of {body.size} bytes instead of a multiple of 8 up to {most}'
            )
        places, values = np.split(body.view(np.uint32), 2)
        if places.size and places.max() >= out.size:
            raise ValueError(f'place {places.max()} of {out.size} values')
        out.fill(0)
        out[places] = values.view(np.float32)

    def _most(self, n: int) -> int:
        return max(1, int(n * self._MOST_FRACTION))

    def _least(self, sizes: np.ndarray) -> np.float32:
        """The size that a value must have to be sent; above 0, since a zero says nothing."""
        # An odd step sees each unit of a layer, whose width is even.
        sample = sizes[:: sizes.size // self._SAMPLE | 1]
        rank = min(sample.size - 1, int(sample.size * (1 - self._FRACTION)))
        return np.maximum(np.partition(sample, rank)[rank], _LEAST)


def _require_size(body: np.ndarray, size: int) -> None:
    if body.size != size:
        raise ValueError(f'a body of {body.size} bytes instead of {size}')


@dataclasses.dataclass(frozen=True)
class Wire:
    """The encodings of a client's tensors on the network.

    Attributes:
      gradients: of what the client sends.
      parameters: of what it receives; `FLOAT32` or `BFLOAT16`.
    """

    gradients: Encoding
    parameters: Encoding


FLOAT32 = Float32()
BFLOAT16 = BFloat16()
WIRES = {
    'float32': Wire(FLOAT32, FLOAT32),
    'bfloat16': Wire(BFLOAT16, BFLOAT16),
    'int8': Wire(Int8(), BFLOAT16),
    'top_k': Wire(TopK(), BFLOAT16),
}


class Feedback:
    """Encodes the gradients of one stream; adds to each what accepted ones before it have lost.

    Without this, SGD with encoded gradients need not converge; with it, it does, at the rate of SGD
    with whole ones (Karimireddy et al. 2019). That proof does not cover the optimizers here: a
    value that arrives once in T pushes, T times as large, makes Adam's step for it some sqrt(T)
    times smaller.

    Attributes:
      arrived: what the last encoded gradient is once decoded, float32 [n].
    """

    def __init__(self, encoding: Encoding, n: int) -> None:
        self._encoding = encoding
        self._lost = np.zeros(n, np.float32)
        self._lost_if_accepted = np.zeros(n, np.float32)
        self.arrived = np.empty(n, np.float32)

    def encode(self, gradient: np.ndarray) -> np.ndarray:
        """Encodes a gradient float32 [n] with what earlier ones have lost."""
        if self._encoding is FLOAT32:
            self.arrived = gradient
            return gradient
        due = np.add(gradient, self._lost, out=self._lost_if_accepted)
        body = self._encoding.encode(due)
        self._encoding.decode(body.view(np.uint8), self.arrived)
        np.subtract(due, self.arrived, out=self._lost_if_accepted)
        return body

    def accepted(self) -> None:
        """The last encoded gradient was applied: only what it lost is still due."""
        self._lost, self._lost_if_accepted = self._lost_if_accepted, self._lost
