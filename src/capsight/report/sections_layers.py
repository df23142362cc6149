"""Sections on layers and heads: the head map, pictures of attention, what layers keep and lose."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from capsight.blindsight.categories import Category
from capsight.blindsight.head_map import HeadMap
from capsight.kvcapsule.info import CapsuleInfo
from capsight.report import charts_layers
from capsight.report.inputs import LayerErrors
from capsight.report.picture_file import Picture
from capsight.report.sections import Section
from capsight.report.svg import VARIABLES

_CATEGORIES = {
    Category.DENSE: "Dense",
    Category.SINK: "Sink",
    Category.INTRA_IMAGE: "Intra-Image",
    Category.INTRA_IMAGE_SINK: "Intra-Image+Sink",
}


def head_map(found: HeadMap) -> Section:
    """The picture of a head map with its legend."""
    counts = found.counts()
    keys = "".join(
        f'<span class="key"><i style="background:var(--{VARIABLES[colour]})"></i>'
        f"{_CATEGORIES[category]}: {counts[category]}</span>"
        for category, colour in charts_layers.COLOURS.items()
    )
    return Section(
        "head-map",
        "What each attention head looks at",
        "Dense heads see everything; the others skip most of what lies in other images during prefill.",
        f"<figure>{charts_layers.head_map_picture(found, 'heads')}</figure><p>{keys}</p>",
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
    kept = {layer.kept for layer in info.layers}
    lead = f"Of every {info.block_size} vision tokens, "
    if len(kept) == 1:
        lead += f"each of the {len(info.layers)} layers keeps {kept.pop()}."
        body = ""
    else:
        lead += f"layers keep between {min(kept)} and {max(kept)}."
        body = f"<figure>{charts_layers.budgets(info, 'budgets')}</figure>"
    if info.needs is not None:
        lead += (
            " Measured at calibration: squared error of rebuilt keys and values over their variance (1 is "
            "as bad as the mean), and the share of attention that goes to vision tokens."
        )
        body += f"<figure>{charts_layers.needs(info, info.needs, 'needs')}</figure>"
    return Section("budgets", "Layer budgets", lead, body)


def reconstruction(found: LayerErrors) -> Section:
    """How far rebuilt keys and values are from the originals."""
    return Section(
        "errors",
        "Reconstruction error by layer",
        "Norm of the difference over norm of the original, on images not used for fitting; lower is better.",
        f"<figure>{charts_layers.errors(found, 'errors')}</figure>",
    )
