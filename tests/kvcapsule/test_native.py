"""Native decode attention against the same in plain torch, piece by piece."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capsight.kvcapsule.attention.native import (
    Source,
    Sources,
    Steps,
    build,
    decode_attention,
    missing,
    supports,
)
from capsight.kvcapsule.attention.native.decode import _run
from capsight.kvcapsule.attention.native.plain import plain_attention
from capsight.kvcapsule.codecs.quantise import quantise

pytestmark = pytest.mark.skipif(bool(missing()), reason="no C++ compiler")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def close(found: tuple[Tensor, Tensor], query: Tensor, sources: list[Source], scaling: float) -> None:
    out, lse = plain_attention(query, sources, scaling)
    assert found[0].dtype == query.dtype
    tolerance = TOLERANCE[query.dtype]
    torch.testing.assert_close(found[0], out, atol=tolerance, rtol=tolerance, equal_nan=True)
    tolerance = 1e-3 if query.dtype == torch.bfloat16 else 1e-4  # AMX: of levels times 22 bits of queries
    torch.testing.assert_close(found[1], lse, atol=tolerance, rtol=tolerance)


def source(
    counts: Tensor, kind: str, shared: bool, biased: bool, channels: int, queries: int, g: torch.Generator
) -> Source:
    """Random tokens for pieces of `counts` `[B, H]`, with tokens of nobody before and between them.

    Args:
        counts: tokens of each piece.
        kind: a dtype, or bits and what of `Steps` there is: "tokens", "groups", "both", or one field alone.
        shared: whether all heads of a row have the same tokens.
        biased: whether scores have a bias, one for each query of a KV head.
        channels: D.
        queries: C.
        g: where numbers come from.
    """
    batch, heads = counts.shape
    if shared:
        counts = counts[:, :1].expand(-1, heads).contiguous()
        starts = 3 + (torch.cumsum(counts[:, :1], 0) - counts[:, :1]).expand(-1, heads).contiguous()
        total, width = 3 + int(counts[:, 0].sum()), heads
    else:
        starts = (3 + counts.T.flatten().cumsum(0).view(heads, batch).T - counts).contiguous()
        total, width = 3 + int(counts.sum()), 1
    bias = None
    if biased:
        bias = torch.randn(batch, heads, queries, max(1, int(counts.max())), generator=g)
        bias[torch.rand(bias.shape, generator=g) < 0.3] = -torch.inf
    first = torch.arange(batch * heads).view(batch, heads) * (0 if bias is None else bias[0, 0].numel())
    given = {
        "starts": starts,
        "counts": counts,
        "bias": bias,
        "bias_starts": first if biased else None,
        "bias_stride": bias.shape[3] if biased else 0,
    }
    x = torch.randn(2, total, width, channels, generator=g)
    if not kind[0].isdigit():
        return Source(*x.to(getattr(torch, kind)), **given)
    bits, of = int(kind[0]), kind.split()[-1]
    keys, values = (quantise(each, bits, 2) for each in x)
    size, mean = torch.rand(2, -(-total // 4), heads, channels, generator=g)
    steps = Steps(bits, values.step[..., 0], values.low[..., 0], size=size, mean=mean, group=4)
    alone = {"mean": mean[:1], "size": size[:1], "key_step": keys.step[..., 0], "key_low": keys.low[..., 0]}
    if of == "tokens":
        steps = Steps(bits, *(p[..., 0] for p in (values.step, values.low, keys.step, keys.low)))
    elif of == "both":
        parts = (p[..., 0].bfloat16() for p in (values.step, values.low, keys.step, keys.low))
        steps = Steps(bits, *parts, size[:1], mean[:1])
    elif of in alone:
        steps = Steps(bits, steps.value_step, steps.value_low, **{of: alone[of]})
    return Source(keys.levels, values.levels, steps=steps, **given)


KINDS = [
    "float32",
    "bfloat16",
    "float16",
    *(f"{b} bits, {of}" for b in (8, 4) for of in ("tokens", "groups", "both")),
    *(f"{b} bits, {of}" for b in (8, 4) for of in ("mean", "size", "key_step", "key_low")),
]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, list[Source]]:
    """Queries, and sources of pieces of up to 150 tokens, some without any."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    group, count = draw(st.integers(1, 9)), draw(st.integers(1, 2))
    channels = draw(st.sampled_from([1, 5, 16, 24, 32, 33, 64, 72, 128]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    tokens = st.lists(
        st.one_of(st.just(0), st.integers(0, 150)), min_size=batch * heads, max_size=batch * heads
    )
    sources = [
        source(
            torch.tensor(draw(tokens)).view(batch, heads),
            draw(st.sampled_from(KINDS)),
            draw(st.booleans()),
            draw(st.booleans()),
            channels,
            group * count,
            g,
        )
        for _ in range(draw(st.integers(1, 3)))
    ]
    query = torch.randn(batch, heads * group, count, channels, generator=g)
    return query.to(draw(st.sampled_from(list(TOLERANCE)))), sources


@settings(max_examples=60)
@given(problems())
def test_equals_plain_attention(problem):
    query, sources = problem
    close(decode_attention(query, sources, 0.3), query, sources, 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("level", [*build.LEVELS])
def test_each_kind_of_processor(level):
    if [*build.LEVELS].index(level) < [*build.LEVELS].index(build.best_level()):
        pytest.skip("this machine has none")
    g = torch.Generator().manual_seed(0)
    for kind, dtype, (channels, each) in product(KINDS, TOLERANCE, [*product((40, 64, 96), (5,)), (192, 2)]):
        counts = torch.randint(0, 200, (2, 2), generator=g)
        sources = [source(counts, kind, False, True, channels, each, g)]
        query = torch.randn(2, 2 * each, 1, channels, generator=g).to(dtype)
        close(_run(query, Sources(tuple(sources)), 0.3, level), query, sources, 0.3)


def test_long_pieces_and_any_number_of_threads_give_the_same_bits():
    g = torch.Generator().manual_seed(0)
    sources = [source(torch.tensor([[3000, 1], [0, 700]]), "bfloat16", False, False, 64, 3, g)]
    query, threads = torch.randn(2, 6, 1, 64, generator=g), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(decode_attention(query, sources, 0.2))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))
    close(found[0], query, sources, 0.2)


@pytest.mark.parametrize("factor", [1e4, -1e4])
def test_scores_far_apart_neither_overflow_nor_count(factor):
    g = torch.Generator().manual_seed(0)
    near, far = (source(torch.tensor([[100, 5]]), "float32", False, False, 16, 2, g) for _ in range(2))
    far = Source(torch.full_like(far.keys, factor), far.values, far.starts, far.counts)
    query = torch.rand(1, 4, 1, 16, generator=g)
    for sources in ([near, far], [far, near]):
        close(decode_attention(query, sources, 1.0), query, sources, 1.0)


def test_nan_stays_with_those_that_see_it():
    g = torch.Generator().manual_seed(0)
    some = source(torch.tensor([[70, 5], [9, 0]]), "float32", False, False, 16, 1, g)
    some.values[some.starts[0, 1] + 2] = torch.nan
    some.keys[some.starts[1, 0] + 1] = torch.nan
    out, _ = decode_attention(torch.randn(2, 2, 1, 16, generator=g), [some], 1.0)
    assert torch.equal(out.isnan().all(-1).flatten(), torch.tensor([False, True, True, False]))
    assert (out[1, 1] == 0).all()


def test_compiled_graphs_have_it_as_one_operation():
    g = torch.Generator().manual_seed(0)
    sources = [source(torch.tensor([[70, 5]]), "8 bits, both", False, True, 16, 2, g)]
    query = torch.randn(1, 4, 1, 16, generator=g)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(query: Tensor) -> Tensor:
        return decode_attention(query * 2, sources, 0.5)[0] + 1

    torch.testing.assert_close(attend(query), decode_attention(query * 2, sources, 0.5)[0] + 1)


def test_only_what_it_can_do_is_asked_of_it():
    query = torch.randn(1, 2, 1, 8)
    assert supports(query)
    assert not supports(query.double())
    assert not supports(query.clone().requires_grad_())
    assert not supports(query.to("meta"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0].isdigit()])
def test_scores_of_a_few_tokens_in_levels(kind):
    """They are in the hundreds, and one counts."""
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        channels, each = (64, 128)[seed % 2], 2 + seed % 7
        sources = [source(torch.tensor([[1 + seed % 11]]), kind, False, False, channels, each, g)]
        query = torch.randn(1, each, 1, channels, generator=g).bfloat16()
        close(decode_attention(query, sources, 0.3), query, sources, 0.3)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("channels", [64, 128])
def test_outlier_channels_cost_less_than_levels_do(bits, channels):
    """A channel of keys and queries far above the others, as in many models: AMX has coarse steps then."""
    g = torch.Generator().manual_seed(0)
    counts = torch.tensor([[300, 100]])
    made = source(counts, f"{bits} bits, both", False, False, channels, 7, g)
    made.steps.size[..., 3] *= 50
    query = torch.randn(1, 14, 1, channels, generator=g).bfloat16()
    query[..., 3] *= 10
    _, found = decode_attention(query, [made], 0.02)
    _, lse = plain_attention(query, [made], 0.02)
    _, others = plain_attention(query, [replace(made, keys=_a_level_off(made.keys, bits, g))], 0.02)
    assert (found - lse).abs().mean() < (others - lse).abs().mean() / 4


def _a_level_off(levels: Tensor, bits: int, g: torch.Generator) -> Tensor:
    """Levels that are rounded the other way now and then: what quantising them loses."""
    more = torch.rand(levels.shape, generator=g) < 0.5
    if bits == 8:
        return torch.where(more & (levels < 255), levels + 1, levels)
    return torch.where(more & (levels < 240) & (levels % 16 < 15), levels + 17, levels)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_none_are_passed_on(kind, wrong):
    g = torch.Generator().manual_seed(0)
    made = source(torch.tensor([[90, 20]]), kind, False, False, 64, 5, g)
    query = torch.randn(1, 10, 1, 64, generator=g).bfloat16()
    query[0, 2, 0, 7] = wrong
    out, lse = decode_attention(query, [made], 0.3)
    fine = torch.tensor([head != 2 for head in range(10)])
    assert out[0, fine].isfinite().all()
    assert not out[0, 2].isfinite().any()
    assert not lse[0, 2].isfinite().any()
