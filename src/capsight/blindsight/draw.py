"""Pictures, as PNG: a head map, and the attention of chosen heads beside their masks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from capsight.blindsight.calibrate.capture import LayerCall, shape_of, watching
from capsight.blindsight.categories import Category, MaskOptions
from capsight.blindsight.head_map import HeadMap
from capsight.blindsight.rule import BaseRule
from capsight.blindsight.spans import intervals, whole
from capsight.errors import CapsuleFileError, OptionError
from capsight.files import replace_file
from capsight.layout import RowLayout, build_layout

COLOURS: dict[Category, str] = {
    Category.DENSE: "#4d4d4d",
    Category.SINK: "#f2c14e",
    Category.INTRA_IMAGE: "#5fad56",
    Category.INTRA_IMAGE_SINK: "#4d9de0",
}
SIDE = 400
"""Pixels of an attention picture; longer prompts are pooled to this."""

ATTENTION_TITLE = "capsight attention"
"""Title in the text of an attention picture's file; its Description names the heads."""

CHUNK = 64
"""Queries whose scores are held at a time."""


def draw_head_map(head_map: HeadMap, path: str | os.PathLike[str]) -> Path:
    """Draw layers (down) x heads (across), each in the colour of its category.

    Args:
        head_map: the map.
        path: of the PNG.

    Raises:
        CapsuleFileError: it cannot be written.
    """
    order = list(Category)
    numbers = [[order.index(category) for category in layer] for layer in head_map.categories]
    figure = Figure(figsize=(2 + 0.28 * head_map.num_heads, 1.6 + 0.24 * head_map.num_layers))
    axes = figure.subplots()
    axes.imshow(
        numbers, cmap=ListedColormap([COLOURS[c] for c in order]), vmin=-0.5, vmax=3.5, aspect="equal"
    )
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(0, head_map.num_heads, max(head_map.num_heads // 8, 1)))
    axes.set_yticks(range(0, head_map.num_layers, max(head_map.num_layers // 12, 1)))
    counts = head_map.counts()
    handles = [Patch(color=COLOURS[c], label=f"{c.value} ({counts[c]})") for c in order]
    figure.legend(handles=handles, loc="upper center", ncols=2, fontsize="small", frameon=False)
    return _save(figure, path)


def draw_attention(
    model: Any,
    inputs: Mapping[str, Any],
    heads: Sequence[tuple[int, int]],
    head_map: HeadMap,
    path: str | os.PathLike[str],
) -> Path:
    """Draw what chosen heads of the untouched model attend to, beside what their category lets them see.

    Args:
        model: a transformers vision-language model.
        inputs: processor outputs of one prompt.
        heads: (layer, query head) pairs.
        head_map: for the categories and options.
        path: of the PNG.

    Raises:
        OptionError: there is more than one prompt, or a head does not exist.
        CapsuleFileError: the picture cannot be written.
    """
    layout = build_layout(inputs, model.config)
    layers, width = shape_of(model)
    head_map.check(layers, width)
    if layout.batch_size != 1 or not heads:
        raise OptionError("draw_attention takes one prompt and at least one (layer, head)")
    wrong = [pair for pair in heads if not (0 <= pair[0] < layers and 0 <= pair[1] < width)]
    if wrong:
        raise OptionError(f"there are no heads {wrong} in a model of {layers} layers of {width} heads")
    row = layout.rows[0]
    pictures: dict[tuple[int, int], tuple[Tensor, BaseRule]] = {}

    def observe(call: LayerCall) -> Tensor:
        for layer, head in heads:
            if layer == call.layer:
                pictures[layer, head] = _attention(call, head, row), call.rule
        return call.attend_uniform(layout, Category.DENSE, head_map.options)

    with watching(model, observe):
        model(**inputs, use_cache=False, logits_to_keep=1)
    figure = Figure(figsize=(8, 4 * len(heads)), layout="constrained")
    axes = figure.subplots(len(heads), 2, squeeze=False)
    titles = []
    for (left, right), (layer, head) in zip(axes, heads, strict=True):
        category = head_map.categories[layer][head]
        picture, rule = pictures[layer, head]
        left.imshow(picture.clamp(min=1e-6).log10(), cmap="magma", vmin=-5, vmax=0)
        left.set_title(f"layer {layer}, head {head}: attention (log)")
        mask = _mask(row, category, head_map.options, rule)
        right.imshow(mask, cmap=_mask_colours(category), vmin=0, vmax=1)
        right.set_title(f"mask: {category.value}")
        titles.append(f"layer {layer}, head {head} ({category.value})")
        for panel in (left, right):
            _boundaries(panel, row)
    return _save(figure, path, {"Title": ATTENTION_TITLE, "Description": "; ".join(titles)})


def _pool(row: RowLayout) -> tuple[Tensor, int]:
    """The pixel of each token, int64 `[S]`, and how many pixels there are."""
    side = min(SIDE, row.length)
    return torch.arange(row.length) * side // row.length, side


def _attention(call: LayerCall, head: int, row: RowLayout) -> Tensor:
    """Attention of one head, in pixels: the mean over queries, the sum over keys. `[P, P]`."""
    pixel, side = _pool(row)
    visible = intervals(row, Category.DENSE, MaskOptions(), call.rule, whole(row))
    key = call.key[0, head * call.key.shape[1] // call.query.shape[1]].float().cpu()  # [S, D]
    picture = torch.zeros(side, side)
    for start in range(row.pad_left, row.length, CHUNK):
        rows = torch.arange(start, min(start + CHUNK, row.length))
        scores = call.query[0, head, rows].float().cpu() @ key.T * call.scaling  # [n, S]
        weights = scores.masked_fill(~visible.seen(rows, torch.arange(row.length)), -torch.inf).softmax(-1)
        pooled = torch.zeros(len(rows), side).index_add_(1, pixel, weights)
        picture.index_add_(0, pixel[rows], pooled)
    return picture / pixel.bincount(minlength=side)[:, None]


def _mask(row: RowLayout, category: Category, options: MaskOptions, rule: BaseRule) -> Tensor:
    """The mask in pixels, mean over both sides: `[P, P]`."""
    pixel, side = _pool(row)
    visible = intervals(row, category, options, rule, whole(row))
    picture = torch.zeros(side, side)
    for start in range(0, row.length, CHUNK):
        rows = torch.arange(start, min(start + CHUNK, row.length))
        seen = visible.seen(rows, torch.arange(row.length)).float()  # [n, S]
        picture.index_add_(0, pixel[rows], torch.zeros(len(rows), side).index_add_(1, pixel, seen))
    size = pixel.bincount(minlength=side).float()
    return picture / (size[:, None] * size)


def _mask_colours(category: Category) -> Colormap:
    return LinearSegmentedColormap.from_list(category.value, ["white", COLOURS[category]])


def _boundaries(panel: Axes, row: RowLayout) -> None:
    _, side = _pool(row)
    for block in row.blocks:
        for position in (block.start, block.end):
            at = position * side / row.length - 0.5
            panel.axhline(at, color="#d1495b", linewidth=0.5)
            panel.axvline(at, color="#d1495b", linewidth=0.5)
    panel.set_xticks([])
    panel.set_yticks([])


def _save(figure: Figure, path: str | os.PathLike[str], text: dict[str, str] | None = None) -> Path:
    target = Path(path)
    try:
        data = BytesIO()
        FigureCanvasAgg(figure).print_png(data, metadata=text)
        replace_file(target.resolve(), data.getvalue())
    except OSError as error:
        raise CapsuleFileError(f"cannot write {target}: {error.strerror or error}") from error
    return target
