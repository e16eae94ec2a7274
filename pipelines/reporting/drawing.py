"""A function that draws into axes in, one picture as SVG and PNG out.

The SVG for the page takes its colours from the page's style, so it follows the reader's light or
dark theme; the files beside the page have the light theme's colours.
"""

import dataclasses
import io
import re
import textwrap
from collections.abc import Callable
from typing import Any

INK, MUTED, GRID = '#1d2733', '#5d6876', '#dfe4ea'
SERIES = ('#0067a8', '#c8500a', '#00835f', '#a8478c', '#8a6a00', '#3f3fb5', '#6b6b6b')
"""Okabe and Ito's palette, safe for colour blindness, darkened to a contrast of 4.5 on white."""
SIZE_INCHES = (4.0, 2.75)  # text is 12 pixels high in the page's columns and on a phone

_LEGEND_CHARACTERS = 46  # of a row of a legend, at the width of `SIZE_INCHES`
_LEGEND_HANDLE = 5  # characters as wide as a handle with its space
_LEGEND_INCHES = 0.19  # height of a row

_VARIABLES = {
    INK: 'ink',
    MUTED: 'muted',
    GRID: 'grid',
    **{colour: f's{index}' for index, colour in enumerate(SERIES)},
}
"""Name of the page's CSS variable for each colour."""
_COLOUR = re.compile('|'.join(_VARIABLES))
_FONT = re.compile(r'font: ([^;"]*?px) [^;"]*')
_UNREFERENCED = re.compile(r'(<g) id="[^"]*"')
_UNFIT = re.compile(r'[^\w.-]+')  # a run's files may name a game as they like
_DOTS_PER_INCH = 150
_STYLE = {
    'svg.fonttype': 'none',  # text stays text
    'text.parse_math': False,  # a dollar sign in a name is one
    'font.size': 9.5,
    'axes.edgecolor': MUTED,
    'axes.labelcolor': MUTED,
    'axes.titlecolor': INK,
    'axes.titlelocation': 'left',
    'axes.titlesize': 10.5,
    'axes.titleweight': 'bold',
    'axes.titlepad': 9,
    'axes.grid': True,
    'axes.axisbelow': True,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.spines.left': False,
    'grid.color': GRID,
    'grid.linewidth': 0.8,
    'xtick.color': MUTED,
    'ytick.color': MUTED,
    'xtick.labelcolor': MUTED,
    'ytick.labelcolor': MUTED,
    'xtick.major.size': 3,
    'ytick.major.size': 0,
    'lines.linewidth': 1.8,
    'legend.frameon': False,
    'legend.fontsize': 9,
    'legend.labelcolor': INK,
    'legend.handlelength': 1.4,
    'legend.columnspacing': 1.3,
    'legend.handletextpad': 0.5,
    'text.color': INK,
    'figure.facecolor': 'white',
    'axes.facecolor': 'none',
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawn chart.

    Attributes:
      name: of its files, without suffix.
      description: for readers who do not see it.
      inline: SVG element for the page.
      svg, png: contents of the files.
    """

    name: str
    description: str
    inline: str
    svg: bytes
    png: bytes


def draw(
    name: str,
    description: str,
    paint: Callable[[Any], None],
    inches: tuple[float, float] = SIZE_INCHES,
) -> Picture:
    """Draws `paint(axes)`.

    Args:
      name: of the files; unique in a report. Signs that a file name should not have become '-'.
      description: of what is shown, one sentence.
      paint: draws into matplotlib's axes with the colours of this module.
      inches: width and height.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    name = _UNFIT.sub('-', name)
    with matplotlib.rc_context({**_STYLE, 'svg.hashsalt': name}):
        figure = Figure(figsize=inches, layout='constrained')
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        paint(axes)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format='svg', transparent=True, metadata={'Date': None})
        figure.set_layout_engine('none')  # keeps the layout, which takes half of the time
        figure.savefig(png, format='png', dpi=_DOTS_PER_INCH)
    text = svg.getvalue()
    return Picture(name, description, _inline(text, description), text.encode(), png.getvalue())


def legend(axes: Any) -> None:
    """Names what is labelled below the plot, in as many columns as fit; the figure grows."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    wrapped = [textwrap.fill(label, _LEGEND_CHARACTERS - _LEGEND_HANDLE) for label in labels]
    lines = [line for label in wrapped for line in label.splitlines()]
    widest = max(map(len, lines)) + _LEGEND_HANDLE
    columns = max(1, min(len(labels), _LEGEND_CHARACTERS // widest))
    figure = axes.figure
    more = len(lines) / columns - 1
    figure.set_figheight(figure.get_figheight() + _LEGEND_INCHES * max(0.0, more))
    figure.legend(handles, wrapped, loc='outside lower left', ncols=columns)


def _inline(svg: str, description: str) -> str:
    """The SVG element for a page: in its colours and font, of its column's width."""
    from markupsafe import escape

    element = svg[svg.index('<svg') :]
    element = re.sub(r'<metadata>.*?</metadata>', '', element, flags=re.DOTALL)
    element = re.sub(r' (width|height)="[\d.]+pt"', '', element, count=2)
    element = _COLOUR.sub(lambda found: f'var(--{_VARIABLES[found[0]]})', element)
    element = _FONT.sub(r'font: \1 var(--font)', element)
    element = _UNREFERENCED.sub(r'\1', element)  # IDs that would repeat on the page
    label = f'<svg role="img" aria-label="{escape(description)}"'
    return element.replace('<svg', label, 1)
