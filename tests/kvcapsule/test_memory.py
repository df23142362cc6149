"""What the cache keeps in memory, and for how long."""

from __future__ import annotations

import copy

import torch

from capsight.layout import PromptLayout
from kvcapsule.conftest import row
from kvcapsule.test_cache import D, H, cache_for, feed


def test_layers_share_one_scratch_buffer_and_prefill_is_not_copied():
    layout = PromptLayout((row(20, 0, (2, 18)),))
    cache, new = cache_for(layout), torch.randn(2, 1, H, 20, D)
    keys, _ = cache.update(new[0], new[1], 0)
    assert keys.data_ptr() == new[0].data_ptr()
    cache.update(new[0], new[1], 1)
    step = new[:, :, :, :1]
    first, second = cache.update(step[0], step[1], 0)[0], cache.update(step[0], step[1], 1)[0]
    assert first.data_ptr() == second.data_ptr()


def test_inference_mode_and_gradients_may_be_mixed():
    layout = PromptLayout((row(20, 0, (2, 18)),))
    cache, new = cache_for(layout), torch.randn(2, 1, H, 20, D, requires_grad=True)
    assert feed(cache, new)[0].requires_grad
    step = torch.randn(2, 1, H, 1, D)
    with torch.inference_mode():
        feed(cache, step)
    with torch.no_grad():
        feed(cache, step)
    assert feed(cache, new[:, :, :, :1])[0].shape[3] == 23


def test_stored_tensors_hold_no_more_memory_than_is_counted():
    layout = PromptLayout((row(40, 3, (4, 30)),))
    cache = cache_for(layout)
    feed(cache, torch.randn(2, 1, H, 40, D))
    feed(cache, torch.randn(2, 1, H, 1, D))
    for layer in cache.capsule_layers.values():
        parts = [layer._packed, *layer.payload.tensors.values()]
        held = sum(part.untyped_storage().nbytes() for part in parts)
        assert layer.nbytes == held + layer._tail.nbytes  # the room that the tail grows into is not counted


def test_a_deep_copy_goes_its_own_way():
    layout = PromptLayout((row(20, 0, (2, 18)),))
    cache = cache_for(layout)
    feed(cache, torch.randn(2, 1, H, 20, D))
    fork = copy.deepcopy(cache)
    feed(cache, torch.randn(2, 1, H, 3, D))
    assert (cache.get_seq_length(), fork.get_seq_length()) == (23, 20)
