"""Layouts, blocks and codecs that the tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.codecs import CODECS, LayerCodec
from capsight.kvcapsule.moments import LayerMoments
from capsight.layout import PromptLayout, RowLayout, VisionBlock
from tiny import FAMILIES, TinyVLM

BLOCK = 16  # tokens in a block of the tiny models' capsules


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


@pytest.fixture(params=list(FAMILIES))
def vlm(request: pytest.FixtureRequest) -> TinyVLM:
    return FAMILIES[request.param]()


@pytest.fixture
def qwen() -> TinyVLM:
    return FAMILIES["qwen2_5_vl"]()


def fitted(tiny: TinyVLM, retained: float = 0.4, **options: Any) -> KVCapsule:
    samples = [tiny.inputs([([tiny.picture(seed)], "hi")]) for seed in (90, 91)]
    arguments = {"codec": "adaptive", "block_size": BLOCK, "progress": False, "budget": "uniform", **options}
    return KVCapsule.fit(tiny.model, tiny.processor, samples, retained, **arguments)
