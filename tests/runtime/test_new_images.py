"""A later turn brings images: earlier capsules stay, and what comes after equals the full cache."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.cache_utils import DynamicCache

import capsight
from capsight.errors import CapsightError, LayoutError, OptionError
from capsight.layout import build_layout
from tiny import CACHES, COMPLETE, FAMILIES, clip, in_turn

from .conftest import few, fitted
from .test_enable import assert_same, greedy

VIDEOS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"]


def conversation(vlm, rows, turns):
    """Processor outputs of `turns` user turns of two images each, for rows with pictures of their own."""
    texts, pictures = [], []
    for row in range(rows):
        own = [vlm.picture(10 * row + i) for i in range(2 * turns)]
        said = [vlm.prompt(own[2 * t : 2 * t + 2], f"turn {t}") for t in range(turns)]
        texts.append("yes<|im_end|>\n".join(said))
        pictures.append(own)
    return vlm.process(texts, pictures)


@in_turn("rows,codec", [(1, "heads"), (2, "adaptive"), (2, "heads"), (1, "adaptive")])
def test_new_images_on_the_same_cache(vlm, rows, codec):
    if vlm.name == "gemma3" and Version(transformers.__version__) < COMPLETE:
        pytest.skip("its masks are others in a later turn than in one prefill, without capsight, too")
    one, two = conversation(vlm, rows, 1), conversation(vlm, rows, 2)
    full = greedy(vlm.model.generate, **two)
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 1.0, codec)) as fast:
        for encapsulated in (False, True):
            fast.encapsulate(**one)
            fast.generate(past_key_values=fast.cache, **one, max_new_tokens=1)
            held = sum(len(x.placement.runs) for x in fast.cache.capsule_layers.values())
            if encapsulated:
                fast.encapsulate(past_key_values=fast.cache, **two)
                assert fast.cache.get_seq_length() == build_layout(two, vlm.config).last_vision_end
            assert_same(greedy(fast.generate, past_key_values=fast.cache, **two), full)
            assert sum(len(x.placement.runs) for x in fast.cache.capsule_layers.values()) > held


def test_new_images_on_fewer_tokens_and_on_a_stock_cache(qwen):
    one, two = conversation(qwen, 1, 1), conversation(qwen, 1, 2)
    full = greedy(qwen.model.generate, **two)
    with capsight.enable(qwen.model) as fast:
        fast.generate(past_key_values=DynamicCache(config=qwen.config), **one, max_new_tokens=1)
        assert_same(greedy(fast.generate, past_key_values=fast.cache, **two), full)
    with capsight.enable(qwen.model, capsule=fitted("qwen2_5_vl", 0.4)) as fast:
        fast.generate(**one, max_new_tokens=1)
        ours = greedy(fast.generate, past_key_values=fast.cache, **two)
        assert fast.cache.nbytes < fast.cache.nbytes_full
        assert not torch.equal(ours.logits[0], full.logits[0])


def test_new_images_need_pixels_and_the_old_ones_must_be_the_same(vlm):
    one, two = conversation(vlm, 1, 1), conversation(vlm, 1, 2)
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 0.4)) as fast:
        cache = fast.encapsulate(**one)
        tokens = {k: v for k, v in two.items() if k in ("input_ids", "attention_mask")}
        with pytest.raises(OptionError, match="no pixels"):
            fast.generate(past_key_values=cache, **tokens)
        with pytest.raises(LayoutError, match="other images"):
            fast.generate(past_key_values=cache, **two | {"pixel_values": two["pixel_values"].flip(-1)})
        fast.generate(past_key_values=cache, **two, max_new_tokens=1)


@pytest.mark.parametrize("name", VIDEOS)
def test_a_clip_in_a_later_turn(name):
    vlm = FAMILIES[name]()
    clips = [clip(seed, 16) for seed in range(2)]
    first = vlm.template.format(images=vlm.video_placeholder, text="what")
    both = first + "yes<|im_end|>\n" + vlm.template.format(images=vlm.video_placeholder, text="and this")
    one = vlm.processor(text=[first], videos=clips[:1], padding=True, return_tensors="pt")
    two = vlm.processor(text=[both], videos=clips, padding=True, return_tensors="pt")
    full = greedy(vlm.model.generate, **two)
    with capsight.enable(vlm.model, capsule=fitted(name, 1.0)) as fast:
        cache = fast.encapsulate(**one)
        assert_same(greedy(fast.generate, past_key_values=cache, **two), full)


@in_turn("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}], CACHES)
def test_beams_and_several_sequences_over_images_that_are_capsules(vlm, options):
    inputs = conversation(vlm, 2, 1)
    options = {"do_sample": False} | options
    if "num_beams" in options:
        full = vlm.model.generate(**inputs, **options, max_new_tokens=4)
    else:  # transformers 5.17 gives rows that it repeats other rows' pictures
        full = vlm.model.generate(**inputs, do_sample=False, max_new_tokens=4).repeat_interleave(2, 0)
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 1.0)) as fast:
        cache = fast.encapsulate(**inputs)
        assert torch.equal(fast.generate(past_key_values=cache, **inputs, **options, max_new_tokens=4), full)


@few
def test_ask_crop_ask(vlm):
    inputs = conversation(vlm, 2, 1)
    full = greedy(vlm.model.generate, **inputs)
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 1.0)) as fast:
        cache = fast.encapsulate(**inputs)
        images = cache.get_seq_length()
        for new in (90, 5):
            assert_same(greedy(fast.generate, past_key_values=cache, **inputs), full)
            cache.crop(images)
            fast.generate(past_key_values=cache, **inputs, max_new_tokens=new)
            cache.crop(images)
        assert_same(greedy(fast.generate, past_key_values=cache, **inputs), full)


@in_turn("kind,plain", [(KeyboardInterrupt, False), (RuntimeError, True), (RuntimeError, False)])
def test_a_turn_that_is_broken_off_leaves_the_cache_as_it_was(vlm, kind, plain):
    inputs = conversation(vlm, 2, 1)
    full = greedy(vlm.model.generate, **inputs)
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 1.0)) as fast:
        cache = fast.encapsulate(**inputs)
        images, calls = cache.get_seq_length(), []

        def stop(*_):
            calls.append(0)
            if len(calls) == 3:
                raise kind

        layer = vlm.model.get_decoder().layers[1]
        part = getattr(layer, "mlp", None) or layer.feed_forward
        hook = part.register_forward_pre_hook(stop)
        tokens = {k: v for k, v in inputs.items() if "ids" in k or k == "attention_mask"}
        call = partial(type(vlm.model).generate, vlm.model) if plain else fast.generate
        with pytest.raises(kind):
            call(past_key_values=cache, **tokens, max_new_tokens=6, min_new_tokens=6)
        hook.remove()
        if plain and not cache.get_seq_length():
            return  # recurrent states cannot go back to that length: the cache is empty, and says so
        if plain:
            assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 1
            cache.crop(images)
        assert cache.get_seq_length() == images
        assert_same(greedy(fast.generate, past_key_values=cache, **inputs), full)


def test_what_is_no_number_is_said(vlm):
    inputs = conversation(vlm, 1, 1)
    broken = inputs | {"pixel_values": inputs["pixel_values"].clone()}
    broken["pixel_values"].view(-1)[7] = float("nan")
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 0.4)) as fast:
        for call in (fast.generate, fast.encapsulate):
            with pytest.raises(OptionError, match="NaN"):
                call(**broken)
        attention = vlm.model.get_decoder().layers[1].self_attn
        weight = (attention.v_proj or attention.k_proj).weight  # Gemma 4: values are keys
        kept = weight.data[0, 0].clone()
        weight.data[0, 0] = float("nan")
        try:
            for call in (fast.generate, fast.encapsulate):
                with pytest.raises(CapsightError, match="NaN"):
                    call(**inputs)
        finally:
            weight.data[0, 0] = kept
