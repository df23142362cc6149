"""Measures of how badly a token is predicted, which decide what `adaptive` keeps.

Each is what the codec calls whitening: packed lower triangles `[2, H, D (D + 1) / 2]` of keys and values,
bfloat16. Times a token's error it gives the numbers whose squares are added up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from capsight.kvcapsule.codecs import AdaptiveCodec
from capsight.kvcapsule.codecs.kriging import with_nugget
from capsight.kvcapsule.codecs.learnt import KEY_WEIGHT
from capsight.kvcapsule.codecs.moments import LayerMoments
from capsight.kvcapsule.codecs.whitening import whitening

Measure = Callable[[LayerMoments, Tensor, Tensor], Tensor]
"""From moments, queries' second moment `[H, D, D]` and outputs' `[H, D, D]` (`output_moments`)."""


def output_moments(model: Any) -> list[Tensor]:
    """What the output projection makes of values: the sum of W_O^T W_O over the query heads of a KV head.

    Returns:
        float32 `[H, D, D]` of each layer.
    """
    text = model.config.get_text_config(decoder=True)
    found = []
    for layer in model.get_decoder().layers:
        weight = layer.self_attn.o_proj.weight.detach().float()  # [width, Hq * D]
        heads = weight.T.unflatten(
            0, (text.num_key_value_heads, -1, layer.self_attn.head_dim)
        )  # [H, G, D, W]
        found.append((heads @ heads.mT).sum(1))
    return found


def white(key_weight: float, value_weight: float = 1.0) -> Measure:
    """Mahalanobis distance, keys and values weighing so much."""

    def measure(moments: LayerMoments, queries: Tensor, outputs: Tensor) -> Tensor:
        kinds = (moments.keys, key_weight), (moments.values, value_weight)
        return torch.stack([max(w, 1e-6) * whitening(kind.channel_covariance()) for kind, w in kinds])

    return measure


def scaled(moments: LayerMoments, queries: Tensor, outputs: Tensor) -> Tensor:
    """Squared error of every head's keys and values, each in units of their variance."""
    kinds = []
    for kind in (moments.keys, moments.values):
        covariance = kind.channel_covariance()  # [H, D, D]
        variance = covariance.diagonal(dim1=1, dim2=2).mean(1)
        kinds.append(_packed_root(torch.eye(covariance.shape[-1]) / variance[:, None, None]))
    return torch.stack(kinds)


def values_by_output(moments: LayerMoments, queries: Tensor, outputs: Tensor) -> Tensor:
    """Keys as `scaled`; values by what W_O makes of their error, in units of what it makes of the head."""
    spread = _variance(moments, outputs)[:, None, None] / outputs.shape[-1]
    return torch.stack([scaled(moments, queries, outputs)[0], _packed_root(outputs / spread)])


def by_attention(moments: LayerMoments, queries: Tensor, outputs: Tensor) -> Tensor:
    """Error of logits, by the queries' second moment, times what values make of it; error of the output."""
    spread = _variance(moments, outputs)[:, None, None] / outputs.shape[-1]
    return torch.stack([_packed_root(queries * spread), _packed_root(outputs)])


def measured(codec: AdaptiveCodec, whitening: Tensor) -> AdaptiveCodec:
    """The codec with another measure."""
    return AdaptiveCodec(codec.packed, codec.mean, whitening.bfloat16(), codec.block_size, codec.kept)


def _variance(moments: LayerMoments, outputs: Tensor) -> Tensor:
    """Squared output of a head's values about their mean: `[H]`."""
    return (outputs.double() * moments.values.channel_covariance()).sum((1, 2))


def _packed_root(square: Tensor) -> Tensor:
    """The packed lower triangle W with W^T W = `square` `[H, D, D]`, up to the ridge of `whitening`."""
    inverse = torch.linalg.inv(with_nugget(square.double(), 1e-3))
    low = torch.linalg.inv(torch.linalg.cholesky(inverse))
    rows, cols = torch.tril_indices(*square.shape[-2:])
    return low[..., rows, cols]


MEASURES: dict[str, Measure] = {
    "adaptive, values alone": white(0.0),
    f"adaptive, keys {2 * KEY_WEIGHT:g}": white(2 * KEY_WEIGHT),
    f"adaptive, keys {KEY_WEIGHT / 2:g}": white(KEY_WEIGHT / 2),
    "adaptive, scaled": scaled,
    "adaptive, values by output": values_by_output,
    "adaptive, by attention": by_attention,
}
"""By name of the variant; `adaptive` itself is `white(KEY_WEIGHT)`."""
