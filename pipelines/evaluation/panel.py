"""The panel beside a video's picture: score, frames and values of the actions in, a picture out."""

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH = 300

_Colour = tuple[int, int, int]
_BACKGROUND, _TEXT, _MUTED = (16, 18, 24), (232, 234, 240), (140, 146, 160)
_BAR, _TAKEN = (66, 118, 202), (244, 178, 62)
_MARGIN = 14
_NAME_WIDTH, _NUMBER_WIDTH = 132, 54
_ACTIONS_TOP = 100
_LARGE, _SMALL = 30, 15  # sizes of text
_ROW_HEIGHTS = (_SMALL + 4, 32)
_SHADES = 3  # of a text's edges, few enough for the palette of a GIF
_GREY_LEVELS = 255


class Panel:
    """Draws the panel of one game.

    A bar begins at the lowest value of the game so far and ends at the highest, since the values
    of a state differ little; the number beside it is the value.
    """

    def __init__(self, height: int, actions: Sequence[str]):
        """`height`: in pixels. `actions`: their names, in the order of the action set."""
        self._actions = actions
        fitting = (height - _ACTIONS_TOP - _MARGIN) // len(actions)
        self._row = int(np.clip(fitting, *_ROW_HEIGHTS))
        self._empty = np.full((height, WIDTH, 3), _BACKGROUND, np.uint8)
        self._low, self._high = np.inf, -np.inf

    def draw(
        self, score: float, frames: int, action: int | None, values: np.ndarray | None
    ) -> np.ndarray:
        """The panel uint8 [height, WIDTH, 3].

        Args:
          score: so far.
          frames: emulator frames so far.
          action: index of the action taken, None after the last one.
          values: expected returns float32 [actions], None if unknown.
        """
        canvas = self._empty.copy()
        _write(canvas, _MARGIN, 10, f'score {score:g}', _TEXT, _LARGE)
        _write(canvas, _MARGIN, 54, f'frame {frames:,}', _MUTED)
        if values is not None:
            self._low = min(self._low, float(values.min()))
            self._high = max(self._high, float(values.max()))
            _write(canvas, _MARGIN, 76, 'expected return', _MUTED)
        for index, name in enumerate(self._actions):
            value = None if values is None else float(values[index])
            self._draw_action(canvas, index, name, value, index == action)
        return canvas

    def _draw_action(
        self, canvas: np.ndarray, index: int, name: str, value: float | None, taken: bool
    ) -> None:
        top = _ACTIONS_TOP + index * self._row
        _write(canvas, _MARGIN, top, name, _TAKEN if taken else _MUTED)
        if value is None:
            return
        left, right = _MARGIN + _NAME_WIDTH, WIDTH - _MARGIN - _NUMBER_WIDTH
        share = (value - self._low) / max(self._high - self._low, 1e-6)
        end = left + 2 + round(share * (right - left - 2))
        canvas[top + 1 : top + _SMALL + 1, left:end] = _TAKEN if taken else _BAR
        _write(canvas, right + 6, top, f'{value:.2f}', _TEXT if taken else _MUTED)


def _write(
    canvas: np.ndarray, x: int, y: int, text: str, colour: _Colour, size: int = _SMALL
) -> None:
    """Writes a line of text from sprites, thirty times faster than a font does; cut at the edge."""
    for character in text:
        sprite = _sprite(character, colour, size)
        area = canvas[y : y + sprite.shape[0], x : x + sprite.shape[1]]
        area[:] = sprite[: area.shape[0], : area.shape[1]]
        x += sprite.shape[1]


@functools.cache
def _sprite(character: str, colour: _Colour, size: int) -> np.ndarray:
    """The picture of a character on the background, uint8 [height, width, 3]."""
    font = _font(size)
    image = Image.new('L', (round(font.getlength(character)), size + size // 3))
    ImageDraw.Draw(image).text((0, 0), character, _GREY_LEVELS, font)
    share = np.round(np.asarray(image) * (_SHADES / _GREY_LEVELS)) / _SHADES
    blended = share[..., None] * colour + (1.0 - share[..., None]) * _BACKGROUND
    return np.round(blended).astype(np.uint8)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
