"""Expected prefill FLOPs: a multiplication and an addition are two; softmax and norms are not counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from capsight.blindsight.categories import Category, MaskOptions
from capsight.blindsight.flops import visible_pairs
from capsight.blindsight.head_map import HeadMap
from capsight.blindsight.rule import BaseRule
from capsight.errors import OptionError
from capsight.layout import PromptLayout
from capsight.planning.images import ImageGrids
from capsight.planning.shape import ModelShape

HeadCounts = tuple[Mapping[Category, float], ...]
"""Per layer: how many query heads each category has; not whole where a share stands for a head map."""


def dense_heads(shape: ModelShape) -> HeadCounts:
    """All heads dense: the model as it is."""
    return tuple({Category.DENSE: float(layer.query_heads)} for layer in shape.layers)


def shared_heads(shape: ModelShape, dense_share: float) -> HeadCounts:
    """A head map not yet made: so large a share of every layer's heads dense, the rest Intra-Image+Sink.

    Raises:
        OptionError: the share is not in 0..1.
    """
    if not 0 <= dense_share <= 1:
        raise OptionError(f"the dense share is a fraction in 0..1, not {dense_share}")
    return tuple(
        {
            Category.DENSE: dense_share * layer.query_heads,
            Category.INTRA_IMAGE_SINK: (1 - dense_share) * layer.query_heads,
        }
        for layer in shape.layers
    )


def mapped_heads(shape: ModelShape, head_map: HeadMap) -> HeadCounts:
    """The heads of a head map.

    Raises:
        ModelMismatchError: it is of another shape than the model.
    """
    head_map.check(len(shape.layers), shape.layers[0].query_heads)
    return tuple(
        {category: float(count) for category, count in Counter(layer).items()}
        for layer in head_map.categories
    )


def attention_flops(
    shape: ModelShape, config: Any, layout: PromptLayout, heads: HeadCounts, options: MaskOptions
) -> int:
    """FLOPs of attention of the language model over the prompt.

    `4 * D` for every pair of query and key that a head's mask leaves (scores and weighted values):
    over all layers and categories, `4 * D * heads * pairs`. Causal, sliding-window and two-way image
    rules are the model's own. A recurrent state of n numbers takes `6 * n` for every token: it is read,
    written and asked.
    """
    known: dict[tuple[Category, int | None], int] = {}
    total = 0.0
    for layer, counts in zip(shape.layers, heads, strict=True):
        if not layer.kv_heads:
            total += 6 * layer.recurrent * layout.batch_size * layout.length
            continue
        for category, count in counts.items():
            key = category, layer.window
            if count and key not in known:
                known[key] = visible_pairs(layout, category, options, BaseRule.of(config, layer.window))
            total += 4 * layer.head_dim * count * known.get(key, 0)
    return round(total)


def linear_flops(shape: ModelShape, layout: PromptLayout) -> int:
    """FLOPs of all linear layers of the language model: `2 * (tokens * linear + rows * vocabulary)`.

    Logits are computed for the last token of each row, as `generate` does.
    """
    return 2 * (layout.batch_size * layout.length * shape.linear + layout.batch_size * shape.vocabulary)


def vision_flops(shape: ModelShape, images: Sequence[ImageGrids]) -> int:
    """FLOPs of the vision tower over all images, see `VisionShape.flops`."""
    blocks: Iterable[tuple[int, int]] = (grid for grids in images for grid in grids)
    return sum(shape.vision.flops(grid) for grid in blocks)
