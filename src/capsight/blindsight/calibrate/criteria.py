"""What heads would lose by following a category, measured in three ways; one number per head and category.

Heads are switched alone, with the others of their key-value group, or with all of their layer; heads that
are switched together share a number.

* `mass` (ours): the attention probability that the category cuts off (0..1). BlindSight
  (arXiv 2507.09071) uses a dataset once to give each head its category; its metric was not available.
* `output` (ours): how far the layer's output moves, relative to its size, through W_O.
* `distribution` (ours): how far the next-token distributions along the dense model's own answer move, KL
  in nats; some passes back (`first_order`), and one forward for each switch that moves much.

`mass` and `output` look at the rows of a prompt's second and later images: the first has none before it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from capsight.blindsight.calibrate.answers import Answers
from capsight.blindsight.calibrate.capture import LayerCall, shape_of, watching
from capsight.blindsight.calibrate.first_order import first_order
from capsight.blindsight.calibrate.samples import Prompt
from capsight.blindsight.categories import SPARSE, Category, MaskOptions
from capsight.blindsight.head_map import HeadMap
from capsight.blindsight.masks import TokenTable, token_table
from capsight.blindsight.spans import Intervals, intervals, whole
from capsight.errors import CalibrationError, UnsupportedModelError
from capsight.layout import PromptLayout, RowLayout

SMALL = 0.2
"""First order is trusted as long as no logit moves by more than this against the likeliest token's."""

Criterion = Callable[[Any, Prompt, MaskOptions, int], Tensor]
"""`(model, prompt, options, heads switched together) -> float32 [L, 3, Hq]`, in the order of `SPARSE`."""


def mass(model: Any, prompt: Prompt, options: MaskOptions, together: int = 1) -> Tensor:
    """Attention probability cut off, mean over rows; of heads switched together, the largest."""
    losses: dict[int, Tensor] = {}

    def observe(call: LayerCall) -> Tensor:
        lost = missing_mass(attention_mass(call, prompt.layout, options)).cpu()  # [3, Hq]
        losses[call.layer] = lost.view(len(SPARSE), -1, together).amax(-1)
        return call.attend_uniform(prompt.layout, Category.DENSE, options)

    return _collect(model, prompt, observe, losses, together)


def output(model: Any, prompt: Prompt, options: MaskOptions, together: int = 1) -> Tensor:
    """Root-mean-square change of the attention output through W_O, over the root mean square of it."""
    layout = prompt.layout
    rows = [later_rows(row) for row in layout.rows]
    losses: dict[int, Tensor] = {}

    def observe(call: LayerCall) -> Tensor:
        dense = call.attend_uniform(layout, Category.DENSE, options)
        weight = _output_weight(call)  # [E, Hq * D]
        before = _grouped(dense, rows, call.query.shape[1])  # [1, N, Hq * D]
        total = (before[0] @ weight.T).square().sum()
        apart = weight.unflatten(1, (-1, together * call.query.shape[-1]))  # [E, G, g * D]
        grams = torch.einsum("egd,egf->gdf", apart, apart)  # [G, g * D, g * D]
        moved = []
        for category in SPARSE:
            after = call.attend_uniform(layout, category, options)
            delta = _grouped(after, rows, together) - _grouped(dense, rows, together)  # [G, N, g * D]
            moved.append(((delta @ grams) * delta).sum((1, 2)))
        losses[call.layer] = (torch.stack(moved).clamp(min=0) / total).sqrt().cpu()
        return dense

    return _collect(model, prompt, observe, losses, together)


def distribution(model: Any, prompt: Prompt, options: MaskOptions, together: int = 1) -> Tensor:
    """KL divergence of the next-token distributions along the dense model's answers.

    To first order; switches that move a logit by more than `SMALL` are measured, each by a pass of its own,
    and all of them are where the model gives no gradients.
    """
    layers, heads = shape_of(model)
    answers = Answers(model, prompt)
    try:
        losses, moved = first_order(model, answers, options, together)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"heads are switched one by one, which takes long, for want of gradients: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        losses = torch.zeros(layers, len(SPARSE), heads // together)
        moved = torch.full_like(losses, torch.inf)
    dense = HeadMap.uniform(Category.DENSE, layers, heads, options)
    for layer, index, group in (moved > SMALL).nonzero().tolist():
        switched = range(group * together, (group + 1) * together)
        changed = dense.replaced({(layer, head): SPARSE[index] for head in switched})
        losses[layer, index, group] = answers.kl(changed).mean()
    return losses.repeat_interleave(together, -1)


CRITERIA: dict[str, Criterion] = {"mass": mass, "output": output, "distribution": distribution}


def later_rows(row: RowLayout) -> Tensor:
    """Positions of the vision tokens of all images of a row but the first: int64 `[n]`."""
    spans = [torch.arange(block.start, block.end) for block in row.blocks if block.image > 0]
    return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)


def _collect(
    model: Any,
    prompt: Prompt,
    observe: Callable[[LayerCall], Tensor],
    losses: dict[int, Tensor],
    together: int,
) -> Tensor:
    """Run the model; losses per layer and switch `[3, G]` as `[L, 3, Hq]`."""
    with watching(model, observe):
        model(**prompt.inputs, use_cache=False, logits_to_keep=1)
    return torch.stack([losses[layer] for layer in sorted(losses)]).float().repeat_interleave(together, -1)


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


TEXT, SINKS, NEAR, FAR, OTHER = range(5)
"""Bins: text; sinks of other images; own sinks and window; the rest of the own image; other images."""

SCORES_AT_ONCE = 1 << 24
"""Attention scores held at any time; the chunk of queries follows from it."""


def attention_mass(call: LayerCall, layout: PromptLayout, options: MaskOptions) -> Tensor:
    """Mean attention probability that the rows of later images put on each bin.

    Args:
        call: of one layer; queries and keys of whole prompts.
        layout: of the batch; the first image of each row is not counted.
        options: which tokens are sinks, and the window.

    Returns:
        float32 `[Hq, 5]`; each row sums to 1, or is NaN if no row has two images.
    """
    total = call.query.new_zeros(call.query.shape[1], 5, dtype=torch.float32)
    count = 0
    for index, row in enumerate(layout.rows):
        visible = intervals(row, Category.DENSE, options, call.rule, whole(row))
        table = token_table(row, options)
        step = max(1, SCORES_AT_ONCE // (call.query.shape[1] * row.length))
        for block in (block for block in row.blocks if block.image > 0):
            for start in range(block.start, block.end, step):
                rows = torch.arange(start, min(start + step, block.end))
                total += _chunk(call, index, rows, visible, _bins(row, table, block.image, rows, options))
                count += len(rows)
    return total / count if count else total + torch.nan


def missing_mass(mass: Tensor) -> Tensor:
    """What each sparse category cuts off of `[Hq, 5]`: `[3, Hq]`, in the order of `SPARSE`."""
    lost = {
        Category.SINK: mass[:, FAR] + mass[:, OTHER],
        Category.INTRA_IMAGE: mass[:, SINKS] + mass[:, OTHER],
        Category.INTRA_IMAGE_SINK: mass[:, OTHER],
    }
    return torch.stack([lost[category] for category in SPARSE])


def _bins(row: RowLayout, table: TokenTable, image: int, rows: Tensor, options: MaskOptions) -> Tensor:
    """The bin of every key for queries `rows` of one image: int64 `[n, S]`."""
    own_image = table.image == image  # [S]
    bins = torch.where(own_image, FAR, torch.where(table.is_sink, SINKS, OTHER))
    bins = torch.where(table.image < 0, TEXT, bins)  # [S]
    distance = (rows[:, None] - torch.arange(row.length)).abs()  # [n, S]
    return torch.where(own_image & (table.is_sink | (distance < options.own_window)), NEAR, bins)


def _chunk(call: LayerCall, index: int, rows: Tensor, visible: Intervals, bins: Tensor) -> Tensor:
    """Summed probabilities of some queries of prompt `index` by bin: float32 `[Hq, 5]`."""
    device = call.query.device
    key = call.key[index].float()  # [Hkv, S, D]
    query = call.query[index].index_select(1, rows.to(device)).float()  # [Hq, n, D]
    hq, n, d = query.shape
    scores = (query.view(key.shape[0], -1, d) @ key.mT).view(hq, n, -1) * call.scaling  # [Hq, n, S]
    seen = visible.seen(rows, torch.arange(key.shape[1]))  # [n, S]
    probability = scores.masked_fill_(~seen.to(device), -torch.inf).softmax(-1)
    bins = bins.to(device)
    return torch.stack([(probability * (bins == b)).sum((1, 2)) for b in range(5)], 1)
