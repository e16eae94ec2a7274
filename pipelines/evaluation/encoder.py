"""Encodes a video: pictures in, an MP4 or GIF file out, complete or not at all."""

import contextlib
import fractions
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Protocol

import av
import numpy as np

from infra.disk import put_new

SUFFIXES = ('.mp4', '.gif')

_GIF_TICKS = 100  # a second; the format's unit
_COLOURS = 256  # of a GIF picture
_THREADS = '2'  # bounds the memory of x264, which else has 1.5 threads for each core

Add = Callable[[np.ndarray], None]
"""Appends a picture uint8 [height, width, 3], of the size of the first one."""


class _Pictures(Protocol):
    """Turns pictures into a codec's frames."""

    def __init__(self, container: av.container.OutputContainer, rate: fractions.Fraction): ...

    def add(self, picture: np.ndarray) -> None:
        """Encodes a picture."""

    def end(self) -> None:
        """Encodes what the codec holds back."""


@contextlib.contextmanager
def encoder(
    path: pathlib.Path, temporary: pathlib.Path, rate: fractions.Fraction, new: bool = False
) -> Iterator[Add]:
    """Yields a function that appends pictures; `path` appears, or is replaced, when complete.

    Holds a few pictures in memory, whatever the length.

    Args:
      path: ends with one of `SUFFIXES`.
      temporary: path in the same directory, where the file grows; removed with an error.
      rate: pictures a second.
      new: whether to replace nothing.

    Raises:
      FileExistsError: `new`, and the file exists in the end; it is unchanged.
      OSError: the file cannot be written; `path` is unchanged.
    """
    kind, options = _KINDS[path.suffix.lower()]
    try:
        temporary.touch(exist_ok=False)  # FFmpeg reports an unwritable directory late
        with av.open(str(temporary), 'w', format=path.suffix[1:].lower(), options=options) as file:
            pictures = kind(file, rate)
            yield pictures.add
            pictures.end()
        with temporary.open('rb') as written:
            os.fsync(written.fileno())
        put_new(temporary, path) if new else temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class _Mp4:
    """H.264 with halved colour resolution, which all browsers play."""

    def __init__(self, container: av.container.OutputContainer, rate: fractions.Fraction):
        self._container = container
        settings = {'preset': 'veryfast', 'crf': '18', 'tune': 'animation', 'threads': _THREADS}
        self._stream = container.add_stream('libx264', rate=rate, options=settings)
        self._stream.pix_fmt = 'yuv420p'
        self._sized = False

    def add(self, picture: np.ndarray) -> None:
        even = picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]
        if not self._sized:
            self._stream.height, self._stream.width = even.shape[:2]
            self._sized = True
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format='rgb24')
        self._container.mux(self._stream.encode(frame))

    def end(self) -> None:
        if self._sized:
            self._container.mux(self._stream.encode())


class _Gif:
    """A GIF with the exact colours of each picture, up to 256."""

    def __init__(self, container: av.container.OutputContainer, rate: fractions.Fraction):
        self._container = container
        self._rate = rate
        self._stream = container.add_stream('gif', rate=_GIF_TICKS)
        self._stream.pix_fmt = 'pal8'
        self._stream.codec_context.time_base = fractions.Fraction(1, _GIF_TICKS)
        self._palette = _Palette()
        self._count = 0

    def add(self, picture: np.ndarray) -> None:
        if not self._count:
            self._stream.height, self._stream.width = picture.shape[:2]
        frame = av.VideoFrame.from_ndarray(self._palette.indexed(picture), format='pal8')
        frame.pts = round(self._count * _GIF_TICKS / self._rate)
        frame.time_base = fractions.Fraction(1, _GIF_TICKS)
        self._count += 1
        self._container.mux(self._stream.encode(frame))

    def end(self) -> None:
        if self._count:
            self._container.mux(self._stream.encode())


class _Palette:
    """Up to 256 colours, kept from picture to picture while they suffice."""

    def __init__(self) -> None:
        self._index = np.full(1 << 24, -1, np.int16)
        self._colours: list[int] = []
        self._order = 1  # of added colours, by their value

    def indexed(self, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The picture as indices uint8 [height, width] and colours ARGB uint8 [256, 4]."""
        red, green, blue = np.moveaxis(picture.astype(np.int32), -1, 0)
        packed = red << 16 | green << 8 | blue
        if not self._extend(packed):
            self._forget()
            if not self._extend(packed):  # more than 256: 3, 3 and 2 bits of the colours
                packed &= 0xE0E0C0
                self._extend(packed)
        colours = np.zeros((_COLOURS, 4), np.uint8)
        known = np.array(self._colours, np.int64)
        colours[:, 0] = 255
        for channel, shift in ((1, 16), (2, 8), (3, 0)):
            colours[: len(known), channel] = known >> shift & 255
        return self._index[packed].astype(np.uint8), colours

    def _extend(self, packed: np.ndarray) -> bool:
        """Adds the colours that are missing; returns whether there was room."""
        missing = np.unique(packed[self._index[packed] < 0])[:: self._order]
        if len(self._colours) + len(missing) > _COLOURS:
            return False
        first = len(self._colours)
        self._index[missing] = np.arange(first, first + len(missing))
        self._colours += missing.tolist()
        return True

    def _forget(self) -> None:
        self._index[self._colours] = -1
        self._colours = []
        # FFmpeg takes a palette that equals the first picture's for that of the picture before.
        self._order = -1


_KINDS: dict[str, tuple[type[_Pictures], dict[str, str]]] = {
    '.mp4': (_Mp4, {'movflags': '+faststart'}),  # plays before it has been loaded whole
    '.gif': (_Gif, {}),
}
