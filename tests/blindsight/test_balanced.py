"""Causal attention cut into parts against the one call that it replaces."""

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from capsight.blindsight.attention import balanced

SIZES = st.integers(1, 3)


def plain(query, key, value, scaling):
    k, v = (x.repeat_interleave(query.shape[1], 0).unflatten(0, query.shape[:2]) for x in (key, value))
    return scaled_dot_product_attention(query, k, v, is_causal=True, scale=scaling)


def qkv(kv_heads, each, count):
    generator = torch.Generator().manual_seed(count)
    query = torch.randn(kv_heads, each, count, 8, generator=generator)
    return query, *torch.randn(2, kv_heads, count, 8, generator=generator)


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the queries of calls over part of the keys."""
    shapes, original = [], balanced.partial_attention

    def noting(query, *rest, **options):
        shapes.append(tuple(query.shape))
        return original(query, *rest, **options)

    monkeypatch.setattr(balanced, "partial_attention", noting)
    return shapes


@settings(max_examples=60)
@given(SIZES, SIZES, st.integers(4, 70), st.integers(1, 4), st.booleans())
def test_parts_add_up_to_the_whole(kv_heads, each, count, parts, grad):
    query, key, value = qkv(kv_heads, each, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balanced, "LONG", 4)
        patch.setattr(balanced, "parts_of", lambda heads, threads: parts)
        found = balanced.causal(query.requires_grad_(grad), key, value, 0.3)
    assert found.requires_grad == grad
    assert (found - plain(query, key, value, 0.3)).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_what_it_is(dtype, monkeypatch):
    monkeypatch.setattr(balanced, "LONG", 4)
    monkeypatch.setattr(balanced, "parts_of", lambda heads, threads: 3)
    exact = qkv(2, 2, 50)
    found = balanced.causal(*(x.to(dtype) for x in exact), 0.3)
    assert found.dtype == dtype
    assert (found.float() - plain(*exact, 0.3)).abs().max() < 0.03


def test_heads_are_cut_where_threads_would_wait(calls, monkeypatch):
    monkeypatch.setattr(balanced, "LONG", 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        balanced.causal(*qkv(2, 1, 65), 0.3)
        assert not calls
        balanced.causal(*qkv(1, 3, 63), 0.3)
        assert not calls
        balanced.causal(*qkv(1, 3, 65), 0.3)
        assert calls == [(3, 2, 32, 8), (1, 1, 96, 8)]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("heads", "threads", "parts"),
    [(1, 1, 1), (7, 1, 1), (2, 2, 1), (1, 2, 2), (3, 2, 2), (9, 2, 1), (4, 16, 4), (1, 64, 4), (28, 14, 1)],
)
def test_parts_follow_the_last_thread(heads, threads, parts):
    assert balanced.parts_of(heads, threads) == parts


@example(27, 30)  # the last thread has exactly its share and a tenth
@given(st.integers(1, 40), st.integers(1, 32))
def test_what_is_left_whole_keeps_all_threads_busy(heads, threads):
    """Told the long way: rows in order, each with its own cost, an equal number for each thread."""
    rows = 2 * threads
    costs = [Fraction(2 * row + 1, rows * rows) for row in range(rows)] * heads
    size = len(costs) // threads
    last = max(sum(costs[i * size : (i + 1) * size]) for i in range(threads))
    late = last * threads / heads > Fraction(11, 10)
    assert (balanced.parts_of(heads, threads) > 1) == late
