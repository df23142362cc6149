"""Variants of the `heads` codec: what stands out, who shares what is kept, and rebuilding the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from capsight.kvcapsule.codecs import HeadsCodec, Payload, RaggedPayload
from capsight.kvcapsule.codecs.kriging import greedy_selection, prediction_weights
from capsight.kvcapsule.plan import Run

Scores = Callable[[HeadsCodec, Tensor, Tensor], Tensor]
"""From a codec, keys and values `[M, H, N, D]` to `[M, H, N]`."""

Scope = Literal["prompt", "head", "block", "head of a block"]
"""What has r tokens of each head of each block on average."""

TABLES: dict[str, dict[str, str]] = {
    "Who shares what `heads` keeps": {
        "the prompt's blocks and heads (`heads`)": "heads",
        "the blocks of a head": "heads, by head",
        "the heads of a block": "heads, by block",
        "nobody: r of every head of every block": "heads, unshared",
        "r of every block, the same of all heads (`evict`)": "evict",
    },
    "How far a token stands out": {
        "from the mean and from what others predict (`heads`)": "heads",
        "from the mean alone": "heads, from the mean",
        "from what others predict alone": "heads, from others",
        "from what those chosen before predict": "heads, one after another",
    },
    "What becomes of what `heads` does not keep": {
        "evicted (`heads`)": "heads",
        "rebuilt from what is kept": "heads rebuilt",
    },
}
"""Tables: label of a row -> name of a variant. The first row is what the others are compared with."""


class HeadsVariant(HeadsCodec):
    """`heads` with other scores, or shared out by others."""

    scored: Scores | None = None
    scope: Scope = "prompt"

    def scores(self, keys: Tensor, values: Tensor) -> Tensor:
        """The variant's own."""
        return super().scores(keys, values) if self.scored is None else self.scored(self, keys, values)

    def best(self, scores: Tensor, blocks: Sequence[int]) -> Tensor:
        """As `heads` does it, among those that share."""
        if self.scope == "prompt":
            return super().best(scores, blocks)
        many, heads, size = scores.shape
        if self.scope == "head":
            alone = [super(HeadsVariant, self).best(scores[:, h, None], blocks) for h in range(heads)]
            return torch.cat(alone, 1)
        if self.scope == "block":
            return super().best(scores, [1] * many)
        return super().best(scores.reshape(-1, 1, size), [1] * many * heads).view(scores.shape)


class HeadsRebuilt(HeadsCodec):
    """Keeps what `heads` keeps, and predicts the rest of each head from it.

    For accuracy alone: capsules hold what is rebuilt, so their bytes are not those of the codec.
    """

    def encode_runs(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> RaggedPayload:
        """Keep, rebuild, and store all."""
        keep = super().encode_runs(keys, values, runs).mask(self.block_size)
        made = keys.clone(), values.clone()
        covariance = self.covariance()
        for block, head in torch.cartesian_prod(
            torch.arange(len(keys)), torch.arange(keys.shape[1])
        ).tolist():
            kept = keep[block, head].nonzero()[:, 0]
            weights = prediction_weights(covariance, kept[None])[0]  # [G, N, r]
            for kind, (x, own) in enumerate(zip((keys, values), made, strict=True)):
                mean, real = self.mean[kind, head], x[block, head]
                found = weights[kind * (len(weights) - 1)] @ (real[kept].float() - mean) + mean
                own[block, head] = torch.where(keep[block, head][:, None], real, found.to(real.dtype))
        return RaggedPayload.pack(*made, torch.ones_like(keep))

    def bias(self, payload: Payload) -> Tensor | None:
        """Nothing is missing."""
        return None


def from_mean(codec: HeadsCodec, keys: Tensor, values: Tensor) -> Tensor:
    """Geometric mean of the squared distances from the mean."""
    key, value = codec.whitened(keys, values).square().sum(-1)
    return (key * value).sqrt()


def from_others(codec: HeadsCodec, keys: Tensor, values: Tensor) -> Tensor:
    """Geometric mean of the squared distances from what all others predict."""
    precision = torch.linalg.inv(codec.covariance())
    others = precision / precision.diagonal(dim1=-2, dim2=-1)[..., None]
    key, value = (others[:, None, None] @ codec.whitened(keys, values)).square().sum(-1)
    return (key * value).sqrt()


def one_after_another(codec: HeadsCodec, keys: Tensor, values: Tensor) -> Tensor:
    """Residual energy of each token when it is chosen, as `adaptive` chooses, but of one head."""
    features = list(codec.whitened(keys, values).flatten(1, 2))  # [M * H, N, D] each
    if len(codec.packed) == 1:
        features = [torch.cat(features, 2)]
    gram = torch.stack([x @ x.mT for x in features], 1)  # [M * H, G, N, N]
    size = gram.shape[-1]
    order = greedy_selection(codec.covariance()[None], gram[None], size).order[0]  # [M * H, N]
    energy = _energies(codec.covariance(), features, order).cummin(1).values
    scores = torch.zeros_like(energy).scatter(1, order, energy)
    return scores.view(keys.shape[:3])


def _energies(covariance: Tensor, features: Sequence[Tensor], order: Tensor) -> Tensor:
    """Squared distance of each token from what those before it in `order` predict: `[B, N]`."""
    found = torch.zeros(order.shape)
    for c, x in zip(covariance, features, strict=True):
        # Sorted, C = L L^T; what the tokens before do not predict of one is its row of L^-1 x times L_nn.
        rows = c[order]  # [B, N, N]
        factor = torch.linalg.cholesky(rows.gather(2, order[:, None].expand_as(rows)))
        sorted_x = x.gather(1, order[..., None].expand_as(x))
        white = torch.linalg.solve_triangular(factor, sorted_x, upper=False)
        found += (white * factor.diagonal(dim1=1, dim2=2)[..., None]).square().sum(2)
    return found


def variants(plain: Sequence[HeadsCodec]) -> Iterator[tuple[str, list[HeadsCodec]]]:
    """Every variant by name, as codecs of the layers whose `heads` codecs are given."""

    def made(kind: type[HeadsCodec]) -> list[HeadsCodec]:
        return [kind(c.packed, c.mean, c.whitening, c.block_size, c.kept) for c in plain]

    def varied(scored: Scores | None = None, scope: Scope = "prompt") -> list[HeadsCodec]:
        found = made(HeadsVariant)
        for codec in found:
            assert isinstance(codec, HeadsVariant)
            codec.scored, codec.scope = scored, scope
        return found

    yield "heads", list(plain)
    yield "heads, by head", varied(scope="head")
    yield "heads, by block", varied(scope="block")
    yield "heads, unshared", varied(scope="head of a block")
    yield "heads, from the mean", varied(from_mean)
    yield "heads, from others", varied(from_others)
    yield "heads, one after another", varied(one_after_another)
    yield "heads rebuilt", made(HeadsRebuilt)
