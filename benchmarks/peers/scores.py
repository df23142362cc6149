"""Scores of tokens by which published methods evict: `[H, S]` of one layer, the higher the more important.

Each is written from its paper's definition with the constants of kvpress 0.5.5, the form in which users have
it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, cosine_similarity, normalize, pad

from peers.tokens import Tokens

SINKS = 4
"""First tokens of a prompt that no statistics are made of."""
SKETCH = 48
"""Columns of the random sketch of leverage scores."""
CHUNK = 256
"""Tokens that see each other in the non-causal attention of Compactor."""


def keydiff(tokens: Tokens, retained: float) -> Tensor:
    """KeyDiff, https://arxiv.org/abs/2504.15364: how unlike a key is to the mean direction of all keys."""
    mean = normalize(tokens.key, dim=-1).mean(1, keepdim=True)
    return -cosine_similarity(tokens.key, mean, dim=-1)


def leverage(tokens: Tokens, retained: float) -> Tensor:
    """Approximate leverage of keys before RoPE, https://arxiv.org/abs/2507.08143, by a Gaussian sketch."""
    return _standard(_leverage(tokens.plain_key))


def compactor(tokens: Tokens, retained: float) -> Tensor:
    """Compactor, https://arxiv.org/abs/2507.08143: leverage, and attention that is not causal, in chunks.

    The first 8 tokens and the last 4 are always kept; leverage weighs as much as is dropped.
    """
    first, last = 8, 4
    inner = slice(first, tokens.key.shape[1] - last)
    unusual = _standard(_leverage(tokens.plain_key[:, inner]))
    query, key = tokens.query[:, inner], tokens.by_query_head(tokens.key)[:, inner]
    extra = -query.shape[1] % CHUNK
    chunks = [pad(x, (0, 0, 0, extra)).unflatten(1, (-1, CHUNK)) for x in (query, key)]
    seen = (chunks[0] @ chunks[1].mT).softmax(-1).sum(-2).flatten(1)[:, : query.shape[1]]
    seen = tokens.by_key_head(seen) * tokens.value[:, inner].norm(dim=-1)
    scores = (1 - retained) * unusual + _standard(avg_pool1d(seen, 3, 1, 1))
    return pad(scores, (first, last), value=float(scores.max()))


def expected_attention(tokens: Tokens, retained: float) -> Tensor:
    """Expected attention of queries to come, https://arxiv.org/abs/2510.00636, times the value's norm.

    Queries to come are normal, with the mean and covariance of those before RoPE, turned ahead.
    """
    key, size = tokens.by_query_head(tokens.key[:, SINKS:]), tokens.key.shape[-1]
    query = tokens.plain_query[:, SINKS:]
    mean = query.mean(1)  # [Hq, D]
    spread = query - mean[:, None]
    covariance = spread.mT @ spread / query.shape[1]
    covariance = tokens.ahead(tokens.ahead(covariance).mT)
    scores = (key @ tokens.ahead(mean)[..., None])[..., 0] / math.sqrt(size)
    scores = scores + ((key @ covariance) * key).sum(-1) / size / 2
    scores = tokens.by_key_head(scores.softmax(-1)) * tokens.value[:, SINKS:].norm(dim=-1)
    return pad(scores, (SINKS, 0), value=float(scores.max()) + 1)


def capkv(tokens: Tokens, retained: float, tau: float = 5.0) -> Tensor:
    """CapKV, https://arxiv.org/abs/2604.25975: leverage of values, weighted by the mean query's interest."""
    key, value = (tokens.by_query_head(x[:, SINKS:]) for x in (tokens.key, tokens.value))
    anchor = tokens.ahead(tokens.plain_query[:, SINKS:].mean(1))  # [Hq, D]
    interest = tau * cosine_similarity(key, anchor[:, None], dim=-1)
    weights = (interest - interest.amax(-1, keepdim=True)).exp()
    scaled = value * (weights + 1e-6).sqrt()[..., None]
    capacity = torch.eye(value.shape[-1]) + scaled.mT @ scaled
    solved = torch.linalg.solve(capacity, value.mT)  # [Hq, D, S]
    scores = tokens.by_key_head(weights * (value.mT * solved).sum(1))
    return pad(scores, (SINKS, 0), value=float(scores.max()) + 1)


def _leverage(keys: Tensor) -> Tensor:
    """Diagonal of X (X^T X + jitter)^-1 X^T for centred, sketched keys `[H, S, D]`: `[H, S]`."""
    heads, _, size = keys.shape
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(1, heads, size, SKETCH, generator=generator)[0] / math.sqrt(SKETCH)
    x = (keys - keys.mean(1, keepdim=True)) @ sketch
    gram = x.mT @ x + 1e-2 * torch.eye(SKETCH)
    return (x * torch.linalg.solve(gram, x.mT).mT).sum(-1).clamp_min(0)


def _standard(scores: Tensor) -> Tensor:
    return (scores - scores.mean()) / scores.std().clamp_min(1e-6)
