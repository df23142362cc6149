"""Draws the README's picture: exact match against bytes of the KV cache, a panel for every judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from capsight.evaluation import FULL, split_label

OURS = "joint"
DRAWN = {"joint": "#0b6e4f", "heads": "#c1666b", "evict": "#7d8ca3"}
"""Methods with a colour of their own; all others are thin grey lines."""
OTHER = "#c9ced6"
STYLE = {
    "svg.hashsalt": "capsight",  # the same figures make the same file
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

Rows = dict[str, dict[str, Any]]
Curves = dict[str, list[tuple[float, float]]]


def curves(rows: Rows) -> Curves:
    """(share of the full cache's bytes in %, exact match in %) of each method, fewest bytes first."""
    found: Curves = {}
    for label, row in rows.items():
        if label != FULL and split_label(label)[1] is not None:
            point = 100 * row["kv_bytes"] / row["kv_bytes_full"], row["exact_match"]
            found.setdefault(split_label(label)[0], []).append(point)
    return {name: sorted(set(points)) for name, points in found.items() if len(set(points)) > 1}


def draw(judges: dict[str, Rows], path: Path) -> None:
    """Draw one panel for each judge into an SVG file."""
    with rc_context(STYLE):
        figure = Figure(figsize=(2.7 * len(judges), 2.6), layout="constrained")
        for k, (name, rows) in enumerate(judges.items()):
            axes = figure.add_subplot(1, len(judges), k + 1)
            _panel(axes, name, rows)
            if k == 0:
                axes.set_ylabel("exact match, %")
        drawn = {
            text: line for a in figure.axes for line, text in zip(*a.get_legend_handles_labels(), strict=True)
        }
        figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=len(drawn), frameon=False)
        figure.savefig(path, metadata={"Date": None})


def _panel(axes: Axes, name: str, rows: Rows) -> None:
    full = rows[FULL]["exact_match"]
    axes.axhline(full, color="#444444", linewidth=0.8, linestyle=":", label="full cache")
    found = curves(rows)
    named = False
    for method in sorted(found, key=lambda m: (m in DRAWN, m == OURS)):
        x, y = zip(*found[method], strict=True)
        if method in DRAWN:
            width = 2.0 if method == OURS else 1.2
            axes.plot(x, y, color=DRAWN[method], linewidth=width, marker="o", markersize=3, label=method)
        else:
            axes.plot(x, y, color=OTHER, linewidth=0.8, label=None if named else "other methods")
            named = True
    axes.set_title(name, fontsize=9)
    axes.set_xscale("log")
    axes.set_ylim(0, 102)
    axes.set_xlabel("KV bytes, % of the full cache")
    axes.set_xticks([5, 10, 20, 40])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color="#eeeeee", linewidth=0.6)
