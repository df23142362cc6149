"""Attention over part of the keys, its normaliser, and sums of parts, against plain softmax attention."""

import pytest
import torch

from capsight.partial_attention import added_up, has_kernel, partial_attention

D = 8
GRAD = pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 1e-4), (torch.float64, 1e-10)]


def qkv(tokens, dtype=torch.float32):
    return torch.randn(3, 2, 2, tokens, D, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def plain(query, keys, values, mask, scaling):
    scores = (scaling * query @ keys.mT).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@GRAD
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_logs_of_normalisers_have_the_precision_of_float32(dtype, tolerance, grad):
    query, keys, values = qkv(300, dtype)
    out, lse = partial_attention(query[:, :, :4].requires_grad_(grad), keys, values, None, 0.4)
    assert (out.dtype, lse.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
    scores = 0.4 * query[:, :, :4].detach().double() @ keys.double().mT
    assert (lse.detach() - scores.logsumexp(-1)).abs().max() <= tolerance


@GRAD
@pytest.mark.parametrize("tokens", [1, 7, 600])
def test_causal_is_a_triangular_mask(tokens, grad):
    query, keys, values = qkv(tokens)
    found = partial_attention(query.requires_grad_(grad), keys, values, None, 0.4, causal=True)
    expected = plain(query, keys, values, torch.ones(tokens, tokens, dtype=torch.bool).tril(), 0.4)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5


@GRAD
@pytest.mark.parametrize("cut", [1, 50, 99])
def test_parts_add_up(cut, grad):
    query, keys, values = qkv(100)
    query.requires_grad_(grad)
    mask = torch.rand(100, 100, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[:, -1] = True
    parts = [slice(None, cut), slice(cut, None)]
    first, second = (partial_attention(query, keys[:, :, p], values[:, :, p], mask[:, p], 0.4) for p in parts)
    expected, _ = plain(query, keys, values, mask, 0.4)
    seen = mask[:, :cut].any(-1)  # the rest of the first part has seen nothing
    found = added_up(first, second)
    assert (found - expected)[:, :, seen].abs().max() <= 1e-5
    nothing = torch.zeros_like(first[0]), torch.full_like(first[1], -torch.inf)
    assert torch.equal(added_up(nothing, second), second[0])


def test_gradients_need_all_scores():
    query, keys, _ = qkv(4)
    assert has_kernel(query, keys)
    keys.requires_grad_()
    assert not has_kernel(query, keys)
    with torch.no_grad():
        assert has_kernel(query, keys)
