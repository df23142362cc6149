"""Attention over latents, natively, against attention over the keys and values that they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capsight.kvcapsule.attention.joint import (
    LatentTokens,
    LayerBasis,
    joint_attention,
    plain_joint_attention,
)
from capsight.kvcapsule.attention.native import missing
from capsight.kvcapsule.codecs.rotary import Rotary


@st.composite
def problems(draw: st.DrawFn):
    """Rows of images of any size and of text, under rotations of any kind."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    batch, heads, group, queries = draw(
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 2))
    )
    rank, size = draw(st.sampled_from([16, 32, 80])), draw(st.sampled_from([4, 20, 32, 144]))
    pairs = draw(st.integers(1, size // 2))
    rotary = Rotary(
        torch.rand(pairs, generator=g).double(),
        torch.randint(0, draw(st.sampled_from([1, 3])), (pairs,), generator=g),
        draw(st.booleans()),
        draw(st.sampled_from([1.0, 1.3])),
    )
    positions, counts, start = [], [], 0
    for _ in range(batch):
        shapes = draw(
            st.lists(st.tuples(st.integers(1, 2), st.integers(1, 12), st.integers(1, 12)), max_size=3)
        )
        before = len(positions)
        for frames, height, width in shapes:
            axes = torch.meshgrid(*map(torch.arange, (frames, height, width)), indexing="ij")
            positions.append(torch.stack(axes).flatten(1) + start)
            start += draw(st.integers(1, 40))
        counts.append(sum(x.shape[1] for x in positions[before:]))
    thw = torch.cat([torch.zeros(3, 0, dtype=torch.int64), *positions], 1)
    ends = torch.tensor(counts).cumsum(0)
    tokens = LatentTokens(ends - torch.tensor(counts), torch.tensor(counts), thw, rotary)
    axes = torch.randn(2, heads, size, rank, generator=g) / rank**0.5
    mean = torch.randn(2, heads, size, generator=g)
    basis = LayerBasis(axes[0], mean[0], axes[1].bfloat16(), mean[1])
    query = torch.randn(batch, heads * group, queries, size, generator=g)
    return query, torch.randn(thw.shape[1], rank, generator=g), tokens, basis


@pytest.mark.skipif(bool(missing()), reason="no C++ compiler")
@settings(max_examples=60, deadline=None)
@given(problems())
def test_nothing_has_to_be_rebuilt(problem):
    query, latents, tokens, basis = problem
    found = joint_attention(query, latents, tokens, basis, 0.2)
    expected = plain_joint_attention(query.double(), latents.double(), tokens, basis, 0.2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_what_is_rebuilt_is_turned_as_the_codec_does(problem):
    query, latents, tokens, basis = problem
    rotary, group = tokens.turning, query.shape[1] // len(basis.key_mean)
    keys = (latents @ basis.key_axes.mT) + basis.key_mean[:, None]
    keys = rotary.turn(keys, *rotary.tables(tokens.positions)).repeat_interleave(group, 0)
    _, lse = plain_joint_attention(query, latents, tokens, basis, 0.2)
    for row, (start, count) in enumerate(zip(tokens.starts, tokens.counts, strict=True)):
        scores = 0.2 * query[row] @ keys[:, start : start + count].mT
        torch.testing.assert_close(lse[row], scores.logsumexp(-1), atol=1e-3, rtol=1e-4)
