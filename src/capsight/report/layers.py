"""Layers and heads as charts and sections: a head map, the budget of the layers, their errors."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from capsight.blindsight.categories import Category
from capsight.blindsight.head_map import HeadMap
from capsight.kvcapsule.budget import LayerNeeds
from capsight.kvcapsule.info import CapsuleInfo
from capsight.report.inputs import LayerErrors
from capsight.report.picture_file import Picture
from capsight.report.sections import Section
from capsight.report.svg import INK, MUTED, SERIES, VARIABLES, for_both, inline, new_figure

_CATEGORIES = {
    Category.DENSE: "Dense",
    Category.SINK: "Sink",
    Category.INTRA_IMAGE: "Intra-Image",
    Category.INTRA_IMAGE_SINK: "Intra-Image+Sink",
}


def head_map(heads: HeadMap) -> Section:
    """The picture of a head map with its legend."""
    counts = heads.counts()
    keys = "".join(
        f'<span class="key"><i style="background:var(--{VARIABLES[colour]})"></i>'
        f"{_CATEGORIES[category]}: {counts[category]}</span>"
        for category, colour in COLOURS.items()
    )
    return Section(
        "head-map",
        "What each attention head looks at",
        "Dense heads see everything; the others skip most of what lies in other images during prefill.",
        f"<figure>{head_map_picture(heads, 'heads')}</figure><p>{keys}</p>",
    )


def attention(pictures: Sequence[Picture]) -> Section:
    """What chosen heads attend to, beside the masks of their categories."""
    figures = ""
    for picture in pictures:
        heads = escape("; ".join(picture.heads))
        size = f'width="{picture.width}" height="{picture.height}"'
        figures += f'<figure><img src="{picture.uri}" {size} alt="Attention of {heads}">'
        figures += f"<figcaption>{heads}</figcaption></figure>"
    return Section(
        "attention",
        "Attention of chosen heads, and what their masks keep",
        "Queries down, keys across; red lines are image boundaries. Left: attention of the untouched model, "
        "brighter is more. Right: what the category lets the head see, coloured where it looks.",
        figures,
    )


def layer_budgets(info: CapsuleInfo) -> Section:
    """What each layer keeps."""
    counts = {layer.kept for layer in info.layers}
    lead = f"Of every {info.block_size} vision tokens, "
    if len(counts) == 1:
        lead += f"each of the {len(info.layers)} layers keeps {counts.pop()}."
        body = ""
    else:
        lead += f"layers keep between {min(counts)} and {max(counts)}."
        body = f"<figure>{budgets(info, 'budgets')}</figure>"
    if info.needs is not None:
        lead += (
            " Measured at calibration: squared error of rebuilt keys and values over their variance (1 is "
            "as bad as the mean), and the share of attention that goes to vision tokens."
        )
        body += f"<figure>{needs(info, info.needs, 'needs')}</figure>"
    return Section("budgets", "Layer budgets", lead, body)


def reconstruction(layer_errors: LayerErrors) -> Section:
    """How far rebuilt keys and values are from the originals."""
    return Section(
        "errors",
        "Reconstruction error by layer",
        "Norm of the difference over norm of the original, on images not used for fitting; lower is better.",
        f"<figure>{errors(layer_errors, 'errors')}</figure>",
    )


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
def needs(info: CapsuleInfo, layer_needs: LayerNeeds, name: str, phone: bool = False) -> str:
    """What rebuilt tokens are off by in each layer, beside the attention that it pays to vision tokens."""
    figure, (left, right) = new_figure(8.6, 2.8, panels=2, phone=phone)
    index = [layer.index for layer in info.layers]
    lost = layer_needs.errors_at([layer.kept for layer in info.layers], info.block_size)
    for axes, label, values, colour in (
        (left, "relative squared error", lost, SERIES[1]),
        (right, "attention to vision tokens, %", [100 * share for share in layer_needs.attention], SERIES[2]),
    ):
        axes.bar(index, values, color=colour, width=0.7)
        axes.grid(False, axis="x")
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return inline(figure, name, "Reconstruction error of each layer, and its attention to vision tokens")


@for_both
def errors(layer_errors: LayerErrors, name: str, phone: bool = False) -> str:
    """Relative error of rebuilt keys and values, by layer."""
    figure, (axes,) = new_figure(8.6, 2.8, phone=phone)
    layers = sorted(layer_errors.layers, key=lambda layer: layer.index)
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
