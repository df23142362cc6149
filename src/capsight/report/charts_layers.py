"""Charts over layers: the head map, layer budgets, reconstruction error."""

from __future__ import annotations

from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from capsight.blindsight.categories import Category
from capsight.blindsight.head_map import HeadMap
from capsight.kvcapsule.budget import LayerNeeds
from capsight.kvcapsule.info import CapsuleInfo
from capsight.report.inputs import LayerErrors
from capsight.report.svg import INK, MUTED, SERIES, for_both, inline, new_figure

COLOURS: dict[Category, str] = {
    Category.DENSE: MUTED,
    Category.SINK: SERIES[5],
    Category.INTRA_IMAGE: SERIES[2],
    Category.INTRA_IMAGE_SINK: SERIES[0],
}
"""Of the categories in the head map's picture."""


@for_both
def head_map_picture(head_map: HeadMap, name: str, phone: bool = False) -> str:
    """Layers down, heads across, each in the colour of its category."""
    layers, heads = head_map.num_layers, head_map.num_heads
    cell = min(0.3, (2.5 if phone else 7.0) / heads)
    figure, (axes,) = new_figure(1.0 + cell * heads, 0.8 + cell * layers, phone=phone)
    for layer, categories in enumerate(head_map.categories):
        for head, category in enumerate(categories):
            axes.add_patch(Rectangle((head - 0.45, layer - 0.45), 0.9, 0.9, color=COLOURS[category]))
    axes.grid(False)
    axes.set_xlim(-0.6, heads - 0.4)
    axes.set_ylim(layers - 0.4, -0.6)
    axes.set_aspect("equal")
    axes.set_xticks(range(0, heads, max(heads // 8, 1)))
    axes.set_yticks(range(0, layers, max(layers // 12, 1)))
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    return inline(figure, name, "The category of every attention head, by layer")


@for_both
def budgets(info: CapsuleInfo, name: str, phone: bool = False) -> str:
    """Percent of each block that a layer keeps."""
    figure, (axes,) = new_figure(8.6, 2.8, phone=phone)
    shares = [100 * layer.kept / info.block_size for layer in info.layers]
    axes.bar([layer.index for layer in info.layers], shares, color=SERIES[0], width=0.7)
    axes.grid(False, axis="x")
    axes.set_xlabel("layer")
    axes.set_ylabel("retained, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return inline(figure, name, "Retained fraction of each layer")


@for_both
def needs(info: CapsuleInfo, found: LayerNeeds, name: str, phone: bool = False) -> str:
    """What rebuilt tokens are off by in each layer, beside the attention that it pays to vision tokens."""
    figure, (left, right) = new_figure(8.6, 2.8, panels=2, phone=phone)
    index = [layer.index for layer in info.layers]
    lost = found.errors_at([layer.kept for layer in info.layers], info.block_size)
    for axes, label, values, colour in (
        (left, "relative squared error", lost, SERIES[1]),
        (right, "attention to vision tokens, %", [100 * share for share in found.attention], SERIES[2]),
    ):
        axes.bar(index, values, color=colour, width=0.7)
        axes.grid(False, axis="x")
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return inline(figure, name, "Reconstruction error of each layer, and its attention to vision tokens")


@for_both
def errors(found: LayerErrors, name: str, phone: bool = False) -> str:
    """Relative error of rebuilt keys and values, by layer."""
    figure, (axes,) = new_figure(8.6, 2.8, phone=phone)
    layers = sorted(found.layers, key=lambda layer: layer.index)
    lines = ("keys", [layer.keys for layer in layers]), ("values", [layer.values for layer in layers])
    for colour, marker, (label, values) in zip(SERIES, "os", lines, strict=False):
        axes.plot(
            [layer.index for layer in layers], values, label=label, color=colour, marker=marker, markersize=5
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return inline(figure, name, "Relative reconstruction error of keys and values, by layer")
