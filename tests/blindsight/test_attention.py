"""Segments and flex against the reference, and all-Dense against plain attention."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from blindsight.layouts import CATEGORIES, layouts, options, prompt
from capsight.blindsight import BaseRule, Category, MaskOptions, sparse_attention
from capsight.blindsight.attention import flex, segments
from capsight.blindsight.attention import segment_plan as planning
from capsight.blindsight.attention.flex_plan import TILE, flex_plan
from capsight.blindsight.attention.segment_plan import segment_plan
from capsight.blindsight.attention.work import Work
from capsight.blindsight.spans import whole
from capsight.errors import LayoutError, OptionError
from capsight.layout import PromptLayout

RULES = st.builds(BaseRule, st.none() | st.integers(1, 20), st.booleans())
MIXED = (Category.DENSE, Category.INTRA_IMAGE_SINK, Category.SINK, Category.INTRA_IMAGE)
D = 8


def qkv(batch, heads, kv_heads, queries, keys, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(batch, h, n, D, generator=generator).to(dtype) for h, n in shapes]


def check(layout, categories, chosen, rule, implementation, prefix=0, kv_heads=2, forget=0, grad=False):
    forget = min(forget, prefix)
    keys = layout.length - forget
    q, k, v = qkv(layout.batch_size, len(categories), kv_heads, layout.length - prefix, keys)
    given = {"options": chosen, "rule": rule, "prefix": prefix}
    q.requires_grad_(grad)
    expected = sparse_attention(q, k, v, layout, categories, implementation="reference", **given)
    found = sparse_attention(q, k, v, layout, categories, implementation=implementation, **given)
    assert expected.isfinite().all()
    assert (found - expected).abs().max() <= 1e-4
    assert found.requires_grad == grad


@settings(max_examples=60)
@given(layouts(), st.lists(st.sampled_from(CATEGORIES), min_size=4, max_size=4), options(), RULES, st.data())
def test_segments_equal_the_reference(layout, categories, chosen, rule, data):
    prefix = data.draw(st.integers(0, layout.length - 1))
    check(layout, categories, chosen, rule, "segments", prefix, forget=data.draw(st.integers(0, prefix)))


@settings(max_examples=60)
@given(layouts(), st.lists(st.sampled_from(CATEGORIES), min_size=4, max_size=4), options(), RULES, st.data())
def test_calls_without_a_mask_for_keys_that_all_see(layout, categories, chosen, rule, data):
    """Sizes from which a segment is cut in two are thousands of tokens; here they are small."""
    cut = {"SEEN": st.integers(1, 5), "MASKED": st.sampled_from([4, 40]), "SMALL": st.sampled_from([2, 9])}
    sizes = {name: data.draw(size, name) for name, size in cut.items()}
    prefix = data.draw(st.integers(0, layout.length - 1))
    forget, grad = data.draw(st.integers(0, prefix)), data.draw(st.booleans())
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(planning, name, size)
        patch.setattr(segments, "segment_plan", segment_plan.__wrapped__)  # remembered ones have other sizes
        check(layout, categories, chosen, rule, "segments", prefix, forget=forget, grad=grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("categories", [MIXED, [Category.DENSE], [Category.INTRA_IMAGE_SINK] * 2])
@pytest.mark.parametrize("prefix", [0, 4100])
def test_half_precision_stays_what_it_is(dtype, categories, prefix):
    """Long enough for heads cut into parts, and for keys that all rows of a segment see."""
    layout = PromptLayout((prompt(1500, 1500, 900, tail=250),))
    heads = len(categories)
    q, k, v = qkv(1, heads, 1, layout.length - prefix, layout.length)
    given = {"layout": layout, "categories": categories, "prefix": prefix}
    exact = sparse_attention(q, k, v, implementation="reference", **given)
    found = sparse_attention(*(x.to(dtype) for x in (q, k, v)), implementation="segments", **given)
    assert found.dtype == dtype
    assert (found.float() - exact).abs().max() < 0.03


def test_a_question_after_long_context_has_a_mask_for_itself_only():
    row = prompt(1500, 1500, tail=200)
    work = Work(row, Category.INTRA_IMAGE_SINK, MaskOptions(), BaseRule(), whole(row))
    question = segment_plan(work, torch.device("cpu")).segments[-3]
    first = row.length - 202  # with the delimiter before it, and one token between
    assert (question.rows, question.seen) == (slice(first, row.length), (0, first))
    assert question.own == (first, row.length)
    assert question.mask.shape == (202, 202)


@pytest.mark.slow
@settings(max_examples=25)
@given(layouts(), st.lists(st.sampled_from(CATEGORIES), min_size=4, max_size=4), options(), RULES, st.data())
def test_flex_equals_the_reference(layout, categories, chosen, rule, data):
    prefix = data.draw(st.integers(0, layout.length - 1))
    check(layout, categories, chosen, rule, "flex", prefix, forget=data.draw(st.integers(0, prefix)))


def long_layout():
    """Two rows of many tiles: images larger and smaller than a tile, aligned and packed."""
    first = prompt(300, 64, 400, 65, 10, text=20, tail=90, pad=5)
    second = prompt(500, 200, between=40, text=64)
    return PromptLayout((first, second.extended(first.length - second.length)))


@pytest.mark.slow
@pytest.mark.parametrize("rule", [BaseRule(), BaseRule(150), BaseRule(None, True), BaseRule(150, True)])
@pytest.mark.parametrize("implementation", ["segments", "flex"])
@pytest.mark.parametrize("prefix", [0, 413])
def test_long_prompts_equal_the_reference(rule, implementation, prefix):
    check(long_layout(), MIXED, MaskOptions(own_window=20), rule, implementation, prefix)


@pytest.mark.slow
def test_flex_in_bfloat16_is_as_near_as_plain_attention():
    layout = long_layout()
    q, k, v = qkv(2, 4, 4, layout.length, layout.length, dtype=torch.bfloat16)
    exact = sparse_attention(*(x.float() for x in (q, k, v)), layout, MIXED, implementation="reference")
    found = sparse_attention(q, k, v, layout, MIXED, implementation="flex")
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().max() < 0.03


@settings(max_examples=30)
@given(layouts(), st.integers(0, 2))
def test_all_dense_is_plain_causal_attention(layout, extra):
    layout = layout.extended(extra)
    q, k, v = qkv(layout.batch_size, 4, 4, layout.length, layout.length)
    found = sparse_attention(q, k, v, layout, [Category.DENSE] * 4)
    for index, row in enumerate(layout.rows):
        real = slice(row.pad_left, None)
        mine = (x[index : index + 1, :, real] for x in (q, k, v))
        plain = scaled_dot_product_attention(*mine, is_causal=True)
        assert torch.equal(found[index, :, real], plain[0])
        assert not found[index, :, : row.pad_left].any()


@settings(max_examples=20)
@given(layouts(most_rows=2), options(), st.data())
def test_a_prefill_in_chunks_is_the_prefill_in_one(layout, chosen, data):
    q, k, v = qkv(layout.batch_size, 4, 2, layout.length, layout.length)
    whole_run = sparse_attention(q, k, v, layout, MIXED, options=chosen)
    cut = data.draw(st.integers(1, layout.length))
    first = sparse_attention(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], layout, MIXED, options=chosen)
    parts = [first]
    if cut < layout.length:
        parts.append(sparse_attention(q[:, :, cut:], k, v, layout, MIXED, options=chosen))
    assert torch.allclose(torch.cat(parts, 2), whole_run, atol=1e-5)


def test_a_head_alone_is_as_in_company():
    layout = PromptLayout((prompt(12, 9, 20),))
    q, k, v = qkv(1, 4, 2, layout.length, layout.length)
    together = sparse_attention(q, k, v, layout, MIXED)
    for head, category in enumerate(MIXED):
        kv = head // 2
        alone = sparse_attention(
            q[:, head : head + 1], k[:, kv : kv + 1], v[:, kv : kv + 1], layout, [category]
        )
        assert torch.allclose(alone[:, 0], together[:, head], atol=1e-6)


def test_what_a_head_cannot_see_does_not_matter():
    layout = PromptLayout((prompt(8, 8, 8),))
    q, k, v = qkv(1, 1, 1, layout.length, layout.length)
    block, other = layout.rows[0].blocks[2], layout.rows[0].blocks[1]
    changed = v.clone()
    changed[:, :, other.start + 1 : other.end] += 100
    for category in (Category.SINK, Category.INTRA_IMAGE, Category.INTRA_IMAGE_SINK):
        before, after = (sparse_attention(q, k, x, layout, [category]) for x in (v, changed))
        assert torch.equal(before[:, :, block.start : block.end], after[:, :, block.start : block.end])
        assert not torch.allclose(before[:, :, -1], after[:, :, -1])


def test_scaling_is_used():
    layout = PromptLayout((prompt(8, 8),))
    q, k, v = qkv(1, 1, 1, layout.length, layout.length)
    twice = sparse_attention(2 * q, k, v, layout, [Category.SINK])
    scaled = sparse_attention(q, k, v, layout, [Category.SINK], scaling=2 / math.sqrt(D))
    assert torch.allclose(twice, scaled, atol=1e-6)


def test_segments_make_few_calls_and_no_large_mask():
    row = prompt(*[64] * 32, between=0)
    work = Work(row, Category.INTRA_IMAGE_SINK, MaskOptions(), BaseRule(), whole(row))
    plan = segment_plan(work, torch.device("cpu"))
    masks = sum(s.mask.numel() for s in plan.segments if s.mask is not None)
    assert len(plan.segments) <= 14
    assert masks < row.length**2 / 3


def test_flex_computes_few_tiles():
    row = prompt(*[1024] * 16, between=0)
    work = Work(row, Category.INTRA_IMAGE_SINK, MaskOptions(), BaseRule(), whole(row))
    dense = (row.length // TILE) ** 2 / 2
    assert flex_plan(work, torch.device("cpu")).tiles() < 0.13 * dense


def test_flex_that_cannot_compile_raises(monkeypatch):
    monkeypatch.setattr(flex, "missing", lambda device, dtype: "no compiler")
    layout = PromptLayout((prompt(8, 8),))
    q, k, v = qkv(1, 1, 1, layout.length, layout.length)
    with pytest.raises(flex.FlexUnavailableError, match="segments"):
        sparse_attention(q, k, v, layout, [Category.SINK], implementation="flex")


def test_flex_does_not_compile_without_end(monkeypatch):
    monkeypatch.setattr(flex, "COMPILE_LIMIT", 0)
    layout = PromptLayout((prompt(8, 8),))
    q, k, v = (torch.randn(1, 1, layout.length, 20, dtype=torch.float16) for _ in range(3))
    with pytest.raises(flex.FlexUnavailableError, match="compiled 0 times"):
        sparse_attention(q, k, v, layout, [Category.SINK], implementation="flex")


def test_wrong_calls():
    layout = PromptLayout((prompt(8, 8),))
    q, k, v = qkv(1, 4, 2, layout.length, layout.length)
    with pytest.raises(OptionError, match="categories"):
        sparse_attention(q, k, v, layout, MIXED[:3])
    with pytest.raises(OptionError, match="implementation"):
        sparse_attention(q, k, v, layout, MIXED, implementation="fast")
    with pytest.raises(OptionError, match="belong together"):
        sparse_attention(q[:, :3], k, v, layout, MIXED[:3])
    with pytest.raises(LayoutError, match=r"layout.extended\(2\)"):
        sparse_attention(q, k, v, PromptLayout((layout.rows[0].prefix(layout.length - 2),)), MIXED)
    with pytest.raises(LayoutError, match="rows"):
        sparse_attention(q, k, v, layout.repeat(2), MIXED)
    with pytest.raises(OptionError, match="positions"):
        sparse_attention(q[:, :, :5], k, v, layout, MIXED, prefix=2)
