"""What heads would lose by following a category, told in three ways; one number per head and category.

Heads are switched alone, with the others of their key-value group, or with all of their layer; heads that
are switched together share a number.

* `mass` (ours): the attention probability that the category cuts off (0..1). BlindSight
  (arXiv 2507.09071) uses a dataset once to give each head its category; its metric was not available.
* `output` (ours): how far the layer's output moves, relative to its size, through W_O.
* `distribution` (ours): how far the next-token distributions along the dense model's own answer move, KL
  in nats; one pass of the text part per switch and category.

`mass` and `output` look at the rows of a prompt's second and later images: the first has none before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from capsight.blindsight.calibrate.answers import Answers
from capsight.blindsight.calibrate.capture import LayerCall, shape_of, watching
from capsight.blindsight.calibrate.mass import attention_mass, missing_mass
from capsight.blindsight.calibrate.samples import Prompt
from capsight.blindsight.categories import SPARSE, Category, MaskOptions
from capsight.blindsight.head_map import HeadMap
from capsight.errors import CalibrationError, UnsupportedModelError
from capsight.layout import RowLayout

Criterion = Callable[[Any, Prompt, MaskOptions, int], Tensor]
"""`(model, prompt, options, heads switched together) -> float32 [L, 3, Hq]`, in the order of `SPARSE`."""


def mass(model: Any, prompt: Prompt, options: MaskOptions, together: int = 1) -> Tensor:
    """Attention probability cut off, mean over rows; of heads switched together, the largest."""
    found: dict[int, Tensor] = {}

    def observe(call: LayerCall) -> Tensor:
        lost = missing_mass(attention_mass(call, prompt.layout, options)).cpu()  # [3, Hq]
        found[call.layer] = lost.view(len(SPARSE), -1, together).amax(-1)
        return call.attend_uniform(prompt.layout, Category.DENSE, options)

    return _collect(model, prompt, observe, found, together)


def output(model: Any, prompt: Prompt, options: MaskOptions, together: int = 1) -> Tensor:
    """Root-mean-square change of the attention output through W_O, over the root mean square of it."""
    layout = prompt.layout
    rows = [later_rows(row) for row in layout.rows]
    found: dict[int, Tensor] = {}

    def observe(call: LayerCall) -> Tensor:
        dense = call.attend_uniform(layout, Category.DENSE, options)
        weight = _output_weight(call)  # [E, Hq * D]
        before = _grouped(dense, rows, call.query.shape[1])  # [1, N, Hq * D]
        whole = (before[0] @ weight.T).square().sum()
        apart = weight.unflatten(1, (-1, together * call.query.shape[-1]))  # [E, G, g * D]
        grams = torch.einsum("egd,egf->gdf", apart, apart)  # [G, g * D, g * D]
        moved = []
        for category in SPARSE:
            after = call.attend_uniform(layout, category, options)
            delta = _grouped(after, rows, together) - _grouped(dense, rows, together)  # [G, N, g * D]
            moved.append(((delta @ grams) * delta).sum((1, 2)))
        found[call.layer] = (torch.stack(moved).clamp(min=0) / whole).sqrt().cpu()
        return dense

    return _collect(model, prompt, observe, found, together)


def distribution(model: Any, prompt: Prompt, options: MaskOptions, together: int = 1) -> Tensor:
    """KL divergence of the next-token distributions along the dense model's answers."""
    layers, heads = shape_of(model)
    dense = HeadMap.uniform(Category.DENSE, layers, heads, options)
    answers = Answers(model, prompt)
    found = torch.zeros(layers, len(SPARSE), heads)
    for layer in range(layers):
        for index, category in enumerate(SPARSE):
            for first in range(0, heads, together):
                switched = range(first, first + together)
                changed = dense.replaced({(layer, head): category for head in switched})
                found[layer, index, first : first + together] = answers.kl(changed).mean()
    return found


CRITERIA: dict[str, Criterion] = {"mass": mass, "output": output, "distribution": distribution}


def later_rows(row: RowLayout) -> Tensor:
    """Positions of the vision tokens of all images of a row but the first: int64 `[n]`."""
    spans = [torch.arange(block.start, block.end) for block in row.blocks if block.image > 0]
    return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)


def _collect(
    model: Any,
    prompt: Prompt,
    observe: Callable[[LayerCall], Tensor],
    found: dict[int, Tensor],
    together: int,
) -> Tensor:
    """Run the model; what was found per layer and switch `[3, G]` as `[L, 3, Hq]`."""
    with watching(model, observe):
        model(**prompt.inputs, use_cache=False, logits_to_keep=1)
    return torch.stack([found[layer] for layer in sorted(found)]).float().repeat_interleave(together, -1)


def _grouped(output: Tensor, rows: list[Tensor], together: int) -> Tensor:
    """The counted rows of all prompts of a batch, from `[B, Hq, S, D]`: float32 `[G, N, g * D]`."""
    picked = [x.index_select(1, index.to(x.device)) for x, index in zip(output, rows, strict=True)]
    joined = torch.cat(picked, 1).float()  # [Hq, N, D]
    return joined.unflatten(0, (-1, together)).transpose(1, 2).flatten(2)


def _output_weight(call: LayerCall) -> Tensor:
    """W_O of a layer: float32 `[E, Hq * D]`."""
    projection = getattr(call.module, "o_proj", None)
    if projection is None:
        raise UnsupportedModelError(
            f"{type(call.module).__name__} has no o_proj to weigh head outputs with; use criterion='mass' "
            "and tolerance=None"
        )
    if projection.weight.device.type == "meta":
        raise CalibrationError(
            "the weights of this model are offloaded while heads are judged; use criterion='distribution' or "
            "'mass'"
        )
    weight: Tensor = projection.weight.detach().float()
    return weight
