"""Attention over latents, natively, against attention over the keys and values that they stand for."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capsight.kvcapsule.attention import joint
from capsight.kvcapsule.attention.joint import JointTokens
from capsight.kvcapsule.attention.joint_plain import plain_joint_attention
from capsight.kvcapsule.attention.latents import LatentTokens, LayerBasis, PackedLatents
from capsight.kvcapsule.attention.native import Source, Sources, build, missing
from capsight.kvcapsule.attention.native.plain import plain_attention
from capsight.kvcapsule.codecs.levels import POINTS, Levels, pack, unpack
from capsight.kvcapsule.codecs.rotary import Rotary


@st.composite
def problems(draw: st.DrawFn):
    """Rows of images of any size and of text, under rotations of any kind."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    batch, heads, group, queries = draw(
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 2))
    )
    few = st.tuples(*[st.integers(0, 2)] * 3).filter(any)
    groups = draw(few | st.sampled_from([(3, 4, 6), (9, 0, 11), (0, 18, 1), (20, 1, 0)]))  # opened in parts
    levels, size = Levels(*(32 * n for n in groups)), draw(st.sampled_from([4, 20, 32, 144]))
    rank = levels.rank
    pairs = draw(st.integers(1, size // 2))
    rotary = Rotary(
        torch.rand(pairs, generator=g).double() * draw(st.sampled_from([1.0, 0.03, 1e-3])),
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
    axes = torch.randint(-127, 128, (2, heads, size, rank), generator=g, dtype=torch.int8)
    steps = torch.rand(2, rank, generator=g) / rank**0.5 / 36
    mean = torch.randn(2, heads, size, generator=g)
    basis = LayerBasis(axes[0], steps[0], mean[0], axes[1], steps[1], mean[1])
    query = torch.randn(batch, heads * group, queries, size, generator=g)
    return query, pack(torch.randn(thw.shape[1], rank, generator=g), levels), levels, tokens, basis


def as_read(packed, levels: Levels, basis: LayerBasis, level: str) -> tuple[torch.Tensor, LayerBasis, float]:
    """Latents, float64, and the basis as native code of a level takes them, and how close it comes."""
    opened = unpack(*packed, levels, torch.float32)
    if level == "AVX512BF16":
        return opened.bfloat16().double(), basis, 5e-2
    if level == "AMX":  # which also rounds probabilities, and queries seen through the axes
        keys = (basis.key_axes * basis.key_steps).bfloat16()
        basis = replace(basis, key_axes=keys, key_steps=torch.ones_like(basis.key_steps))
        return opened.bfloat16().double(), basis, 5e-2
    return opened.double(), basis, 1e-4


@pytest.mark.skipif(bool(missing()), reason="no C++ compiler")
@pytest.mark.parametrize("level", [*build.LEVELS])
def test_nothing_has_to_be_rebuilt(level):
    if [*build.LEVELS].index(level) < [*build.LEVELS].index(build.best_level()):
        pytest.skip("this machine has less")

    @settings(max_examples=60)
    @given(problems())
    def check(problem):
        query, packed, levels, tokens, basis = problem
        latents = PackedLatents(*packed, levels.counts, POINTS)
        found = JointTokens(latents, tokens, basis).attend(query, Sources(()), 0.2)
        opened, basis, close = as_read(packed, levels, basis, level)
        expected = plain_joint_attention(query.double(), opened, tokens, basis, 0.2)
        torch.testing.assert_close(found[0].double(), expected[0], atol=close, rtol=close)
        torch.testing.assert_close(found[1].double(), expected[1], atol=close, rtol=1e-4)

    with mock.patch.object(joint, "library", return_value=build.library(level)):
        check()


@pytest.mark.skipif(bool(missing()), reason="no C++ compiler")
def test_what_was_planned_for_other_places_is_not_taken():
    g = torch.Generator().manual_seed(0)
    levels, heads, size = Levels(32, 32, 64), 2, 32
    axes = torch.randint(-127, 128, (2, heads, size, levels.rank), generator=g, dtype=torch.int8)
    steps = torch.full((levels.rank,), levels.rank**-0.5 / 73)
    mean = torch.randn(2, heads, size, generator=g)
    basis = LayerBasis(axes[0], steps, mean[0], axes[1], steps, mean[1])
    turns = torch.arange(3).repeat_interleave(torch.tensor([4, 6, 6]))
    speeds = 1e4 ** -(torch.arange(16).double() / 16)
    rotaries = [Rotary(fastest * speeds, turns, False, 1.0) for fastest in (1e-3, 1.0)]
    grid = torch.stack(torch.meshgrid(*map(torch.arange, (2, 6, 9)), indexing="ij")).flatten(1)
    packed = pack(torch.randn(grid.shape[1], levels.rank, generator=g), levels)
    query = 4 * torch.randn(1, 4, 1, size, generator=g)
    counts = torch.tensor([grid.shape[1]])
    spots = [grid**power * apart for apart in range(1, 11) for power in (1, 2)]
    layouts = [LatentTokens(counts * 0, counts, *of) for of in product(spots, rotaries)]
    layouts += [replace(of, positions=of.positions.flip(1).contiguous()) for of in layouts]
    here = [*build.LEVELS][[*build.LEVELS].index(build.best_level()) :]
    for level in (*here, *reversed(here)):  # each has plans of its own
        opened, read, close = as_read(packed, levels, basis, level)
        for tokens in layouts[:3] if level != here[0] else layouts * 2:  # more than a thread keeps plans for
            found = JointTokens(PackedLatents(*packed, levels.counts, POINTS), tokens, basis)
            expected = plain_joint_attention(query.double(), opened, tokens, read, 0.2)[0]
            for _ in range(2):
                with mock.patch.object(joint, "library", return_value=build.library(level)):
                    out = found.attend(query, Sources(()), 0.2)[0]
                torch.testing.assert_close(out.double(), expected, atol=close, rtol=close)


@pytest.mark.skipif(bool(missing()), reason="no C++ compiler")
@settings(max_examples=30)
@given(problems(), st.integers(0, 200), st.sampled_from([torch.float32, torch.bfloat16]))
def test_exact_tokens_are_attended_to_in_the_same_call(problem, most, dtype):
    query, packed, levels, tokens, basis = problem
    query, g = query.to(dtype), torch.Generator().manual_seed(most)
    batch, heads = len(tokens.counts), len(basis.key_mean)
    counts = torch.randint(0, most + 1, (batch, 1), generator=g).expand(-1, heads).contiguous()
    starts = (counts.cumsum(0) - counts).contiguous()
    size = int(counts[:, 0].sum()), heads, query.shape[3]
    exact = Source(*torch.randn(2, *size, generator=g).to(dtype), starts, counts)
    latents = PackedLatents(*packed, levels.counts, POINTS)
    out, lse = JointTokens(latents, tokens, basis).attend(query, Sources((exact,)), 0.2)
    assert out.dtype == dtype
    opened, basis, close = as_read(packed, levels, basis, build.best_level())
    far, far_lse = plain_joint_attention(query.double(), opened, tokens, basis, 0.2)
    near, near_lse = plain_attention(query.double(), [exact], 0.2)
    total = torch.logaddexp(far_lse, near_lse.double())
    shares = [(x - total).exp().nan_to_num(0)[..., None] for x in (far_lse, near_lse)]
    torch.testing.assert_close(lse.double(), total, atol=close, rtol=1e-4)
    expected = (far * shares[0] + near * shares[1]).to(dtype)
    tolerance = close if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(bool(missing()), reason="no C++ compiler")
@pytest.mark.parametrize("base", [1e8, 1e4, 10])
@pytest.mark.parametrize("pairs", [12, 64])
@pytest.mark.parametrize("shape", [(1, 40, 50), (5, 20, 30)])
@pytest.mark.parametrize("queries", [7, 20])
def test_places_of_large_images_and_of_films(base, pairs, shape, queries):
    g, size, levels = torch.Generator().manual_seed(0), 2 * pairs + 8, Levels(32, 0, 32)
    axes = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    places = torch.stack(axes).flatten(1)
    thw, count = torch.cat((places, 60 + places[:, :99]), 1), places.shape[1] + 99
    rotary = Rotary(base ** -torch.linspace(0, 1, pairs).double(), torch.arange(pairs) % 3, False, 1.0)
    tokens = LatentTokens(torch.tensor([0]), torch.tensor([count]), thw, rotary)
    own = torch.randint(-127, 128, (2, 2, size, levels.rank), generator=g, dtype=torch.int8)
    steps, mean = torch.full((levels.rank,), 1 / 600), torch.randn(2, 2, size, generator=g)
    basis = LayerBasis(own[0], steps, mean[0], own[1], steps, mean[1])
    packed = pack(torch.randn(count, levels.rank, generator=g), levels)
    query = torch.randn(1, 2 * queries, 1, size, generator=g)
    found = JointTokens(PackedLatents(*packed, levels.counts, POINTS), tokens, basis).attend(
        query, Sources(()), 0.2
    )
    opened, basis, close = as_read(packed, levels, basis, build.best_level())
    expected = plain_joint_attention(query.double(), opened, tokens, basis, 0.2)
    torch.testing.assert_close(found[0].double(), expected[0], atol=close, rtol=close)
    torch.testing.assert_close(found[1].double(), expected[1], atol=close, rtol=1e-4)


@pytest.mark.skipif(bool(missing()), reason="no C++ compiler")
@pytest.mark.parametrize("images", [True, False])
def test_bfloat16_costs_no_more_than_a_cache_in_bfloat16(images):
    level = "AVX512BF16"
    if [*build.LEVELS].index(level) < [*build.LEVELS].index(build.best_level()):
        pytest.skip("this machine has less")
    g, heads, size, levels = torch.Generator().manual_seed(0), 2, 64, Levels(160, 160, 320)
    thw = torch.stack(torch.meshgrid(*map(torch.arange, (3, 16, 20)), indexing="ij")).flatten(1)
    if not images:
        thw = torch.arange(thw.shape[1]).expand(3, -1)
    rotary = Rotary(1e4 ** -torch.linspace(0, 1, 32).double(), torch.arange(32) % 3 * images, False, 1.0)
    count = torch.tensor([thw.shape[1]])
    tokens = LatentTokens(torch.tensor([0]), count, thw, rotary)
    own = torch.randint(-127, 128, (2, heads, size, levels.rank), generator=g, dtype=torch.int8)
    steps, mean = torch.full((levels.rank,), levels.rank**-0.5 / 73), torch.randn(2, heads, size, generator=g)
    basis = LayerBasis(own[0], steps, mean[0], own[1], steps, mean[1])
    packed = pack(torch.randn(int(count), levels.rank, generator=g), levels)
    query = torch.randn(1, heads * 4, 1, size, generator=g)
    with mock.patch.object(joint, "library", return_value=build.library(level)):
        latents = JointTokens(PackedLatents(*packed, levels.counts, POINTS), tokens, basis)
        found = latents.attend(query, Sources(()), 0.3)
    opened = unpack(*packed, levels, torch.float32).double()
    exact = plain_joint_attention(query.double(), opened, tokens, basis, 0.3)
    keys, values = (
        (opened * steps) @ of_kind.double().mT + middle[:, None]
        for of_kind, middle in zip(own, mean, strict=True)
    )
    keys = rotary.turn(keys, *rotary.tables(thw))
    keys, values = (x.bfloat16().double().repeat_interleave(4, 0) for x in (keys, values))
    scores = 0.3 * query[0].bfloat16().double() @ keys.mT
    cached = scores.softmax(-1) @ values, scores.logsumexp(-1)
    for ours, theirs, right in zip(found, cached, exact, strict=True):
        assert (ours - right).square().mean() < 1.5 * (theirs - right).square().mean()


@settings(max_examples=30)
@given(problems())
def test_what_is_rebuilt_is_turned_as_the_codec_does(problem):
    query, packed, levels, tokens, basis = problem
    latents = unpack(*packed, levels, torch.float32)
    rotary, group = tokens.turning, query.shape[1] // len(basis.key_mean)
    keys = (latents * basis.key_steps) @ basis.key_axes.float().mT + basis.key_mean[:, None]
    keys = rotary.turn(keys, *rotary.tables(tokens.positions)).repeat_interleave(group, 0)
    _, lse = plain_joint_attention(query, latents, tokens, basis, 0.2)
    for row, (start, count) in enumerate(zip(tokens.starts, tokens.counts, strict=True)):
        scores = 0.2 * query[row] @ keys[:, start : start + count].mT
        torch.testing.assert_close(lse[row], scores.logsumexp(-1), atol=1e-3, rtol=1e-4)
