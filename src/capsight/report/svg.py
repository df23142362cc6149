"""Matplotlib figures as inline SVG that follows the page: its fonts, and colours for light and dark."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import wraps
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1b1f24", "#59636e", "#d8dee4"
SERIES = ("#0550ae", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#9a6700", "#0e7c86", "#6e7781")
"""Colours on light ground; the page's style has a counterpart of each for dark ground."""

VARIABLES: dict[str, str] = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    **{colour: f"s{index}" for index, colour in enumerate(SERIES)},
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")


PHONE = 3.55
"""Inches that a chart is wide on a phone, where one made for a desk would be too small to read."""


def for_both(draw: Callable[..., str]) -> Callable[..., str]:
    """A chart drawn twice, for wide and for narrow screens; the page shows the one that fits.

    Args:
        draw: makes the chart as SVG; takes its name last, and `phone`.
    """

    @wraps(draw)
    def drawn(*args: Any) -> str:
        *given, name = args
        wide, narrow = draw(*given, name), draw(*given, f"{name}-phone", phone=True)
        return f'<div class="desk">{wide}</div><div class="phone">{narrow}</div>'

    return drawn


def new_figure(
    width: float, height: float, panels: int = 1, phone: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of `panels` axes, in inches, styled for the page; side by side, or on a phone in a column."""
    size = (min(width, PHONE), height * panels) if phone else (width, height)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    grid = (panels, 1) if phone else (1, panels)
    axes = list(figure.subplots(*grid, squeeze=False).ravel())
    for panel in axes:
        panel.patch.set_visible(False)
        for side, spine in panel.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(GRID)
        panel.tick_params(colors=MUTED, labelsize=9, length=3)
        panel.grid(True, color=GRID, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.xaxis.label.set_color(MUTED)
        panel.yaxis.label.set_color(MUTED)
        panel.title.set_color(INK)
    return figure, axes


def legend(figure: Figure, axes: Axes, phone: bool = False) -> None:
    """A legend to the right of the panels, or on a phone below them."""
    handles, labels = axes.get_legend_handles_labels()
    place: dict[str, Any] = {"loc": "outside right upper"}
    if phone:
        place = {"loc": "outside lower center", "ncols": 2}
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + 0.2 * math.ceil(len(labels) / 2))
    figure.legend(handles, labels, frameon=False, fontsize=9, labelcolor=INK, **place)


def inline(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element.

    Args:
        figure: what `new_figure` gave.
        name: unique on the page; ids inside the SVG begin with it.
        description: for those who cannot see the picture.
    """
    text = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", svg, count=1)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    width = figure.get_figwidth() * 96
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}" style="max-width:{width:.0f}px"', 1)
