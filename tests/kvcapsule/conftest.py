"""Layouts, blocks and codecs that the tests share."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.codecs import CODECS, LayerCodec, Payload, RaggedPayload
from capsight.kvcapsule.codecs.learnt import LearntCodec
from capsight.kvcapsule.codecs.moments import LayerMoments
from capsight.kvcapsule.plan import Run
from capsight.layout import PromptLayout, RowLayout, VisionBlock
from tiny import CACHES, FAMILIES, KINDS, TinyVLM

BLOCK = 16  # tokens in a block of the tiny models' capsules
few = pytest.mark.parametrize("vlm", CACHES, indirect=True)
"""Run with one family of each kind of cache; `tests/checking` runs the same with every family."""


def blocks(
    count: int, heads: int, size: int, head_dim: int, seed: int = 0, offset: float = 1.0
) -> torch.Tensor:
    """Random blocks [M, H, N, D] that are smooth along the tokens, with noise and channel offsets."""
    g = torch.Generator().manual_seed(seed)
    walk = torch.randn(count, heads, size, head_dim, generator=g).cumsum(2) / size**0.5
    noise = torch.randn(count, heads, size, head_dim, generator=g)
    return walk + 0.2 * noise + offset * torch.randn(1, heads, 1, head_dim, generator=g)


def moments(heads: int, size: int, head_dim: int, seed: int = 0) -> LayerMoments:
    sums = LayerMoments(heads, size, head_dim)
    sums.update(blocks(24, heads, size, head_dim, seed), blocks(24, heads, size, head_dim, seed + 1))
    return sums


def codec(
    name: str, kept: int, heads: int = 2, size: int = 8, head_dim: int = 4, **options: Any
) -> LayerCodec:
    return CODECS[name].fit(moments(heads, size, head_dim), kept, **options)


def precision(fitted: LearntCodec) -> torch.Tensor:
    """What Mahalanobis distances are taken with, of keys and values: float64 [2, H, D, D]."""
    kinds, heads, size = fitted.mean.shape
    low = torch.zeros(kinds, heads, size, size, dtype=torch.float64)
    rows, cols = torch.tril_indices(size, size)
    low[:, :, rows, cols] = fitted.whitening.double()
    return low.mT @ low


def runs(*sizes: int) -> list[Run]:
    """Runs of so many blocks in each row."""
    return [Run(row, 100 * start) for row, size in enumerate(sizes) for start in range(size)]


def entries(payload: Payload) -> list[list[tuple[list[int], torch.Tensor, torch.Tensor]]]:
    """Positions, keys and values that each head of each block keeps: [M][H]."""
    assert isinstance(payload, RaggedPayload)
    keys, values, kept, counts = (payload.tensors[name] for name in ("keys", "values", "kept", "counts"))
    found: list[list[Any]] = [[None] * counts.shape[1] for _ in range(len(counts))]
    start = 0
    for head in range(counts.shape[1]):
        for block in range(len(counts)):
            own = slice(start, start := start + int(counts[block, head]))
            found[block][head] = kept[own].tolist(), keys[own], values[own]
    assert start == len(keys) == len(values) == len(kept)
    return found


def equal(a: Payload, b: Payload) -> bool:
    """Whether two payloads are the same, bit for bit."""
    same = type(a) is type(b) and a.tensors.keys() == b.tensors.keys()
    return same and all(
        x.dtype == b.tensors[name].dtype and torch.equal(x, b.tensors[name]) for name, x in a.tensors.items()
    )


def row(length: int, pad: int, *spans: tuple[int, int]) -> RowLayout:
    found = tuple(VisionBlock(a, b, "image", (1, 1, b - a), i) for i, (a, b) in enumerate(spans))
    return RowLayout(length, pad, found)


@st.composite
def layouts(draw: st.DrawFn, max_rows: int = 3) -> PromptLayout:
    """Random batches: padding, text, images of many lengths, also side by side, also none."""
    rows = []
    for _ in range(draw(st.integers(1, max_rows))):
        at, spans = draw(st.integers(0, 6)), []
        pad = at
        for _ in range(draw(st.integers(0, 3))):
            at += draw(st.integers(0, 4))
            spans.append((at, at + draw(st.integers(1, 30))))
            at = spans[-1][1]
        rows.append((pad, spans, at))
    length = max(at for *_, at in rows) + draw(st.integers(1, 4))
    return PromptLayout(tuple(row(length, pad, *spans) for pad, spans, _ in rows))


@pytest.fixture(params=KINDS)
def vlm(request: pytest.FixtureRequest) -> TinyVLM:
    return FAMILIES[request.param]()


@pytest.fixture
def qwen() -> TinyVLM:
    return FAMILIES["qwen2_5_vl"]()


_FITTED: dict[Any, KVCapsule] = {}


def fitted(tiny: TinyVLM, retained: float | None = 0.4, **options: Any) -> KVCapsule:
    """A copy of a capsule that is fitted once for all tests."""
    key = tiny.model, repr(retained), repr(options)  # True is no 1.0
    if key not in _FITTED:
        samples = [tiny.inputs([([tiny.picture(seed)], "hi")]) for seed in (90, 91)]
        given = {"codec": "adaptive", "block_size": BLOCK, "progress": False, "budget": "uniform", **options}
        _FITTED[key] = KVCapsule.fit(tiny.model, tiny.processor, samples, retained, **given)
    return deepcopy(_FITTED[key])
