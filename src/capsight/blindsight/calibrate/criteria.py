"""What a head would lose by following a category, told in three ways; one number per head and category.

Rows that count are those of a prompt's second and later images: the first has no other images before it.

* `mass` (ours): the attention probability that the category cuts off (0..1). BlindSight
  (arXiv 2507.09071) uses a dataset once to give each head its category; its metric was not available.
* `output` (ours): how far the layer's output moves, relative to its size, through W_O.
* `distribution` (ours): how far the next-token distributions after the last image move, KL in nats;
  one forward pass per head and category.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from capsight.blindsight.calibrate.capture import LayerCall, following, shape_of, watching
from capsight.blindsight.calibrate.forward import divergence, tail_log_probabilities
from capsight.blindsight.calibrate.mass import attention_mass, missing_mass
from capsight.blindsight.categories import SPARSE, Category, MaskOptions
from capsight.blindsight.head_map import HeadMap
from capsight.errors import UnsupportedModelError
from capsight.layout import PromptLayout, RowLayout

Criterion = Callable[[Any, Mapping[str, Any], PromptLayout, MaskOptions], Tensor]
"""`(model, inputs, layout, options) -> float32 [L, 3, Hq]`, in the order of `SPARSE`."""


def mass(model: Any, inputs: Mapping[str, Any], layout: PromptLayout, options: MaskOptions) -> Tensor:
    """Attention probability cut off, mean over rows."""
    found: dict[int, Tensor] = {}

    def observe(call: LayerCall) -> Tensor:
        found[call.layer] = missing_mass(attention_mass(call, layout, options)).cpu()
        return call.attend_uniform(layout, Category.DENSE, options)

    return _collect(model, inputs, observe, found)


def output(model: Any, inputs: Mapping[str, Any], layout: PromptLayout, options: MaskOptions) -> Tensor:
    """Root-mean-square change of the attention output through W_O, over the root mean square of it."""
    rows = [later_rows(row) for row in layout.rows]
    found: dict[int, Tensor] = {}

    def observe(call: LayerCall) -> Tensor:
        dense = call.attend_uniform(layout, Category.DENSE, options)
        weight = _output_weight(call)  # [E, Hq, D]
        grams = torch.einsum("ehd,ehf->hdf", weight, weight)  # [Hq, D, D]
        whole = torch.einsum("hnd,ehd->ne", _at(dense, rows), weight).square().sum()
        moved = []
        for category in SPARSE:
            delta = _at(call.attend_uniform(layout, category, options), rows) - _at(dense, rows)  # [Hq, N, D]
            moved.append(torch.einsum("hnd,hdf,hnf->h", delta, grams, delta))
        found[call.layer] = (torch.stack(moved).clamp(min=0) / whole).sqrt().cpu()
        return dense

    return _collect(model, inputs, observe, found)


def distribution(model: Any, inputs: Mapping[str, Any], layout: PromptLayout, options: MaskOptions) -> Tensor:
    """KL divergence of the next-token distributions after the last image, head by head."""
    layers, heads = shape_of(model)
    dense = HeadMap.uniform(Category.DENSE, layers, heads, options)

    def run(head_map: HeadMap) -> Tensor:
        with watching(model, following(layout, head_map)):
            return tail_log_probabilities(model, inputs, layout)

    before = run(dense)
    found = torch.zeros(layers, len(SPARSE), heads)
    for layer in range(layers):
        for index, category in enumerate(SPARSE):
            for head in range(heads):
                found[layer, index, head] = divergence(before, run(dense.replaced({(layer, head): category})))
    return found


CRITERIA: dict[str, Criterion] = {"mass": mass, "output": output, "distribution": distribution}


def later_rows(row: RowLayout) -> Tensor:
    """Positions of the vision tokens of all images of a row but the first: int64 `[n]`."""
    spans = [torch.arange(block.start, block.end) for block in row.blocks if block.image > 0]
    return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)


def _collect(
    model: Any,
    inputs: Mapping[str, Any],
    observe: Callable[[LayerCall], Tensor],
    found: dict[int, Tensor],
) -> Tensor:
    with watching(model, observe):
        model(**inputs, use_cache=False, logits_to_keep=1)
    return torch.stack([found[layer] for layer in sorted(found)]).float()


def _at(output: Tensor, rows: list[Tensor]) -> Tensor:
    """The counted rows of all prompts of a batch, from `[B, Hq, S, D]`: float32 `[Hq, N, D]`."""
    picked = [x.index_select(1, index.to(x.device)) for x, index in zip(output, rows, strict=True)]
    return torch.cat(picked, 1).float()


def _output_weight(call: LayerCall) -> Tensor:
    """W_O of a layer by head: float32 `[E, Hq, D]`."""
    projection = getattr(call.module, "o_proj", None)
    if projection is None:
        raise UnsupportedModelError(
            f"{type(call.module).__name__} has no o_proj to weigh head outputs with; use criterion='mass'"
        )
    weight: Tensor = projection.weight.detach().float()
    return weight.view(weight.shape[0], call.query.shape[1], -1)
