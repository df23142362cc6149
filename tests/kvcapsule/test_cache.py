"""`CapsuleCache` fed with random keys and values, against a plain dense simulation of what it promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, Qwen2Config

from capsight.errors import CapsightError, LayoutError, ModelMismatchError
from capsight.kvcapsule import CapsuleCache, CapsulePlan
from capsight.layout import PromptLayout
from kvcapsule.conftest import codec, layouts, row

N, H, D = 8, 2, 4
CONFIG = Qwen2Config(num_hidden_layers=2)
NAMES = ["adaptive", "static", "evict", "heads"]
CODECS = {name: {kept: codec(name, kept) for kept in (3, 8)} for name in NAMES}


def cache_for(layout: PromptLayout, name: str = "adaptive", kept: int = 3) -> CapsuleCache:
    cache = CapsuleCache(dict.fromkeys((0, 1), CODECS[name][kept]), layout, CONFIG)
    cache.honours_key_bias = True
    return cache


class Plain:
    """One dense array per layer; a block is replaced by its decoded capsule once it is complete."""

    def __init__(self, layout: PromptLayout, name: str, kept: int) -> None:
        self.plan, self.codec, self.done = CapsulePlan.from_layout(layout, N), CODECS[name][kept], set()
        self.kv = torch.zeros(2, layout.batch_size, H, 0, D)
        self.hidden = torch.zeros(layout.batch_size, H, 0, dtype=torch.bool)

    def update(self, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.kv = torch.cat([self.kv, new], 3)
        self.hidden = torch.nn.functional.pad(self.hidden, (0, new.shape[3]))
        returned = self.kv.clone(), self.hidden.clone()
        for row_index in range(len(self.kv[0])):  # what a row completes at once is encoded together
            complete = self.plan.complete(self.kv.shape[3])
            starts = [run.start for run in complete if run.row == row_index and run[:2] not in self.done]
            if not starts:
                continue
            self.done |= {(row_index, start) for start in starts}
            places = [(slice(None), row_index, slice(None), slice(at, at + N)) for at in starts]
            payload = self.codec.encode(*torch.stack([self.kv[place] for place in places], 1))
            decoded, bias = torch.stack(self.codec.decode(payload)), self.codec.bias(payload)
            for block, place in enumerate(places):
                self.kv[place] = decoded[:, block]
                if bias is not None:
                    self.hidden[place[1:]] = bias[block] < 0
        return returned


def feed(cache: CapsuleCache, new: torch.Tensor) -> list[torch.Tensor]:
    """One forward pass: both layers get the same new tokens; what the layers return, copied at once."""
    found = [torch.stack(cache.update(new[0], new[1], layer)).clone() for layer in (0, 1)]
    assert torch.equal(found[0], found[1])
    return found


def real(layout: PromptLayout, length: int) -> torch.Tensor:
    return torch.arange(length) >= torch.tensor([[r.pad_left] for r in layout.rows])  # [B, S]


@settings(max_examples=80)
@given(layouts(), st.sampled_from(NAMES), st.sampled_from([3, 8]), st.data())
def test_what_update_returns(layout, name, kept, data):
    cuts = data.draw(st.lists(st.integers(1, layout.length), max_size=4))
    edges = sorted({0, *cuts, layout.length}) + [layout.length + i for i in (1, 2, 5, 6)]
    cache, plain = cache_for(layout, name, kept), Plain(layout, name, kept)
    torch.manual_seed(len(edges))
    for start, end in itertools.pairwise(edges):
        new = torch.randn(2, layout.batch_size, H, end - start, D)
        assert cache.get_mask_sizes(end - start, 0) == (end, 0)
        expected, hidden = plain.update(new)
        found = feed(cache, new)[0]
        seen = real(layout, end)[None, :, None, :, None]
        torch.testing.assert_close(found * seen, expected * seen, atol=1e-5, rtol=1e-5)
        assert torch.isfinite(found).all()
        assert cache.get_seq_length() == end
        bias = cache.key_bias(1)
        if bias is None:
            assert not hidden.any()
        else:
            assert torch.equal((bias[:, :, 0] < 0).expand_as(hidden), hidden)
            assert bias.min() in (0, torch.finfo(torch.float32).min)
        # independent count of what has to be stored
        runs = len(plain.done)
        tokens = int(real(layout, end).sum())
        positions = {"static": 0, "heads": H * (kept + 1)}.get(name, kept)
        capsule = 2 * kept * H * D * 4 + positions
        stored = 2 * (runs * capsule + (tokens - runs * N) * 2 * H * D * 4)
        assert sum(cache.layer_nbytes) == stored
        assert cache.nbytes_full == 2 * tokens * 2 * H * D * 4
        assert 0 <= cache.nbytes - stored <= 16 * (tokens + runs)


@settings(max_examples=30)
@given(layouts(), st.sampled_from(["adaptive", "heads"]), st.data())
def test_moving_rows_equals_feeding_the_moved_rows(layout, name, data):
    rows = data.draw(st.lists(st.integers(0, layout.batch_size - 1), min_size=1, max_size=4))
    first, more = torch.randn(2, layout.batch_size, H, layout.length, D), torch.randn(2, len(rows), H, 1, D)
    step = torch.randn(2, layout.batch_size, H, 1, D)
    moved, fresh = cache_for(layout, name), cache_for(layout.select(rows), name)
    for new in (first, step):
        feed(moved, new)
        feed(fresh, new[:, rows])
    moved.reorder_cache(torch.tensor(rows))
    assert torch.equal(feed(moved, more)[0], feed(fresh, more)[0])
    assert moved.nbytes == fresh.nbytes
    assert moved.layout == fresh.layout


def test_repeat_interleave_and_select_indices():
    layout = PromptLayout((row(20, 0, (2, 18)), row(20, 5, (6, 10))))
    cache = cache_for(layout)
    new = torch.randn(2, 2, H, 20, D)
    feed(cache, new)
    one = cache.nbytes
    cache.batch_repeat_interleave(3)
    assert cache.layout.batch_size == 6
    assert cache.nbytes == 3 * one
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert cache.nbytes == one
    cache.batch_select_indices(torch.tensor([False, True]))
    assert feed(cache, new[:, 1:, :, :1])[0].shape == (2, 1, H, 21, D)


def test_generate_may_expand_the_batch_before_prefill():
    layout = PromptLayout((row(20, 0, (2, 18)), row(20, 5, (6, 20))))
    cache, expanded = cache_for(layout), cache_for(layout.repeat(3))
    new = torch.randn(2, 2, H, 20, D).repeat_interleave(3, 1)
    for step in (new, new[:, :, :, :1]):
        assert torch.equal(feed(cache, step)[0], feed(expanded, step)[0])
    with pytest.raises(CapsightError, match="6 rows"):
        feed(cache, new[:, :2, :, :1])
    with pytest.raises(LayoutError, match="batch of 3"):
        feed(cache_for(layout), new[:, :3])


def test_crop_works_on_exact_tokens_and_refuses_to_cut_capsules():
    layout = PromptLayout((row(20, 0, (2, 10)), row(20, 3, (4, 7))))
    new, steps = torch.randn(2, 2, H, 20, D), torch.randn(2, 2, H, 4, D)
    cache, plain = cache_for(layout), cache_for(layout)
    feed(cache, new)
    for i in range(4):
        feed(cache, steps[:, :, :, i : i + 1])
    cache.crop(0)
    cache.crop(99)
    assert cache.get_seq_length() == 24
    cache.crop(-1)
    assert cache.get_seq_length() == 23
    cache.crop(21)
    assert cache.get_seq_length() == 21
    for bad in (-12, 9, 1):
        with pytest.raises(CapsightError, match="cannot crop"):
            cache.crop(bad)
        assert cache.get_seq_length() == 21
    cache.crop(-11)  # to the end of the capsule
    feed(plain, new[:, :, :, :10])
    assert cache.nbytes == plain.nbytes
    assert torch.equal(feed(cache, steps)[0], feed(plain, steps)[0])


def test_reset_starts_over_also_after_beams():
    layout = PromptLayout((row(20, 0, (2, 18)),))
    cache, new = cache_for(layout), torch.randn(2, 1, H, 20, D)
    feed(cache, new.repeat_interleave(3, 1))
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes, cache.nbytes_full) == (0, 0, 0)
    assert cache.layout == layout
    assert torch.equal(feed(cache, new)[0], new)


@pytest.mark.parametrize("name", ["adaptive", "heads"])
def test_a_later_turn_may_bring_images(name):
    one = PromptLayout((row(20, 2, (3, 12)), row(20, 0, (4, 6))))
    two = PromptLayout((row(40, 2, (3, 12), (25, 35)), row(40, 0, (4, 6), (22, 40))))
    new = torch.randn(2, 2, H, 40, D)
    cache, plain = cache_for(one, name), Plain(two, name, 3)
    feed(cache, new[:, :, :, :20])
    plain.update(new[:, :, :, :20])
    cache.extend_layout(two)
    for a, b in ((20, 30), (30, 40)):
        plain_kv, _ = plain.update(new[:, :, :, a:b])
        found = feed(cache, new[:, :, :, a:b])[0]
        seen = real(two, b)[None, :, None, :, None]
        torch.testing.assert_close(found * seen, plain_kv * seen, atol=1e-5, rtol=1e-5)
    assert len(cache.capsule_layers[0].placement.runs) == 4
    for bad in (
        PromptLayout((row(40, 2, (5, 14)), row(40, 0))),  # another first image
        PromptLayout((row(40, 1, (3, 12), (25, 35)), row(40, 0, (4, 6), (22, 40)))),  # other padding
        two.select([0, 1, 0]),
    ):
        with pytest.raises(LayoutError):
            cache.extend_layout(bad)


@pytest.mark.parametrize("name", ["evict", "heads"])
def test_what_rebuilds_nothing_needs_attention_that_hides_evicted_tokens(name):
    layout = PromptLayout((row(20, 0, (2, 18)),))
    cache, new = cache_for(layout, name), torch.randn(2, 1, H, 20, D)
    cache.honours_key_bias = False
    feed(cache, new)
    with pytest.raises(CapsightError, match=rf"{name} codec keeps part .*capsight\.enable"):
        feed(cache, new[:, :, :, :1])  # the second layer's update finds that no attention has asked
    cache = cache_for(layout, name, 8)  # nothing is evicted
    cache.honours_key_bias = False
    feed(cache, new)
    feed(cache, new[:, :, :, :1])


def test_codecs_must_match_the_full_attention_layers():
    layout = PromptLayout((row(20, 0, (2, 18)),))
    with pytest.raises(ModelMismatchError, match="layers"):
        CapsuleCache({0: CODECS["static"][3]}, layout, CONFIG)
    gemma = Gemma3TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    cache = CapsuleCache({1: CODECS["static"][3]}, layout, gemma)
    assert list(cache.capsule_layers) == [1]
    assert cache.is_sliding == [True, False]
