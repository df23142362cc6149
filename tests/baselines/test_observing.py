"""The cache that is shown queries, fed with random keys and values."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config

from capsight.baselines import SnapKV, VLCache
from capsight.errors import CapsightError
from capsight.layout import PromptLayout
from kvcapsule.conftest import row

N, H, D, LAYERS = 8, 2, 4, 2
CONFIG = Qwen2Config(num_hidden_layers=LAYERS)
ONE = PromptLayout((row(20, 2, (3, 12)), row(20, 0, (4, 6))))
TWO = PromptLayout((row(40, 2, (3, 12), (25, 35)), row(40, 0, (4, 6), (22, 40))))


def feed(cache, new, show=True):
    """One forward pass: every layer is given the new tokens, then shown as many queries."""
    for layer in range(LAYERS):
        keys, _ = cache.update(new[0], new[1], layer)
        if show:
            cache.observe(layer, torch.randn(len(keys), 2 * H, new.shape[3], D), keys, None, 0.5)


def kept(cache):
    """Kept tokens of each run and head, by layer."""
    return [layer.payload.tensors["counts"] for layer in cache.observing_layers.values()]


@pytest.mark.parametrize("kind", [SnapKV, VLCache])
def test_each_turn_decides_on_its_own_images(kind):
    new = torch.randn(2, 2, H, 40, D)
    cache = kind(0.5, N).cache(ONE, CONFIG)
    cache.honours_key_bias = True
    feed(cache, new[:, :, :, :20])
    assert sum(int(c.sum()) for c in kept(cache)) == LAYERS * H * 4
    before = [layer.payload for layer in cache.observing_layers.values()]
    cache.extend_layout(TWO)
    feed(cache, new[:, :, :, 20:])
    assert [len(c) for c in kept(cache)] == [4, 4]
    assert sum(int(c.sum()) for c in kept(cache)) == 4 * LAYERS * H * 4
    for layer, old in zip(cache.observing_layers.values(), before, strict=True):
        assert not layer.pending
        first = layer.payload.select(torch.arange(len(old.tensors["counts"])))
        assert all(torch.equal(first.tensors[name], x) for name, x in old.tensors.items())


def test_bias_hides_what_each_head_evicted():
    cache = SnapKV(0.5, N).cache(ONE, CONFIG)
    cache.honours_key_bias = True
    feed(cache, torch.randn(2, 2, H, 20, D))
    keys, _ = cache.update(*torch.randn(2, 2, H, 1, D), 0)
    bias = cache.key_bias(0)
    assert bias.shape == (2, H, 1, 21)
    assert (bias < 0).sum((2, 3)).tolist() == [[4, 4], [0, 0]]
    hidden = bias[:, :, 0] < 0
    assert keys[hidden].eq(0).all()
    assert hidden[0, :, 3:11].sum() == 8


def test_queries_may_not_be_left_out_but_reset_starts_over():
    cache, new = SnapKV(0.5, N).cache(ONE, CONFIG), torch.randn(2, 2, H, 20, D)
    feed(cache, new, show=False)
    with pytest.raises(CapsightError, match="has not seen"):
        feed(cache, new[:, :, :, :1])
    cache.reset()
    assert cache.nbytes == 0
    feed(cache, new)
    assert [c.tolist() for c in kept(cache)] == [[[4, 4]]] * LAYERS
