"""Calls that are odd but right, and those that are wrong: the model's own settings, arguments, dtypes."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import capsight
from capsight.errors import CapsightError, LayoutError, ModelMismatchError, OptionError
from tiny import CACHES, in_turn

from .conftest import few, fitted
from .test_enable import assert_same, greedy, mixed_batch

TOKENS = ("input_ids", "attention_mask")


def test_settings_of_the_models_own_generation_config(qwen):
    inputs, model = mixed_batch(qwen), copy.deepcopy(qwen.model)
    full = greedy(model.generate, **inputs)
    capsule = fitted("qwen2_5_vl", 1.0)
    settings = {"cache_implementation": "static", "num_beams": 2, "prompt_lookup_num_tokens": 2}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
        with capsight.enable(model, capsule=capsule) as fast:
            cache = fast.encapsulate(**inputs)
            assert cache.layout.batch_size == len(inputs["input_ids"])
            if name == "prompt_lookup_num_tokens":
                with pytest.raises(OptionError, match=name):
                    fast.generate(past_key_values=cache, **inputs)
            else:
                ask = {"num_beams": 1} if name == "num_beams" else {}
                for given in ({}, {"past_key_values": cache}):
                    assert_same(greedy(fast.generate, **given, **inputs, **ask), full)
        setattr(model.generation_config, name, None)


@few
def test_what_is_missing_or_no_cache_is_said(vlm):
    inputs = vlm.inputs([([vlm.picture(1)], "compare them")])
    embedded = vlm.model.get_input_embeddings()(inputs["input_ids"]).detach()
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 1.0)) as fast:
        cache = fast.encapsulate(**inputs)
        expected = greedy(fast.generate, past_key_values=copy.deepcopy(cache), **inputs)
        nothing = inputs | {"attention_mask": None, "pixel_values": None}
        assert_same(greedy(fast.generate, past_key_values=copy.deepcopy(cache), **nothing), expected)
        for given in ({}, {"past_key_values": cache}):
            for call in (fast.generate, fast.encapsulate):
                with pytest.raises(LayoutError, match="input_ids"):
                    call(inputs_embeds=embedded, **given)
        for wrong in ("cache", ((1, 2),)):
            with pytest.raises(OptionError, match="takes a cache"):
                fast.generate(past_key_values=wrong, **inputs)
        with pytest.raises(OptionError, match="two names"):
            fast.generate(past_key_values=cache, cache=copy.deepcopy(cache), **inputs)
        for option in ({"max_new_tokens": 3}, {"num_beams": 2}, {"labels": inputs["input_ids"]}):
            with pytest.raises(OptionError, match=f"{next(iter(option))} is no part"):
                fast.encapsulate(**inputs, **option)


@in_turn("codec", ["heads", "adaptive", "joint"], CACHES)
def test_a_cache_of_another_dtype_is_refused(vlm, codec):
    inputs, capsule = vlm.inputs([([vlm.picture(1)], "compare them")]), fitted(vlm.name, 0.4, codec)
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        cache = fast.encapsulate(**inputs)
    other = copy.deepcopy(vlm.model).bfloat16()
    with capsight.enable(other, capsule=capsule) as fast, pytest.raises(ModelMismatchError, match="bfloat16"):
        fast.generate(past_key_values=cache, **{name: inputs[name] for name in TOKENS})


@few
def test_a_cache_made_for_another_prompt_reads_the_one_it_is_given(vlm):
    inputs, capsule = mixed_batch(vlm), fitted(vlm.name, 1.0)
    full = greedy(vlm.model.generate, **inputs)
    other = vlm.inputs([([vlm.picture(5)], "another")])
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        ours = greedy(fast.generate, past_key_values=capsule.cache(other, vlm.config), **inputs)
        assert_same(ours, full)


def test_another_attention_inside_the_context_is_refused(qwen):
    inputs, model = mixed_batch(qwen), copy.deepcopy(qwen.model)
    with capsight.enable(model, capsule=fitted("qwen2_5_vl", 1.0)) as fast:
        model.set_attn_implementation("eager")
        with pytest.raises(CapsightError, match="set_attn_implementation"):
            fast.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("chosen", ["eager", "sdpa"])
def test_another_attention_that_was_chosen_inside_stays(qwen, chosen):
    model = copy.deepcopy(qwen.model)
    model.set_attn_implementation("sdpa" if chosen == "eager" else "eager")
    with capsight.enable(model, capsule=fitted("qwen2_5_vl", 0.4)):
        model.set_attn_implementation(chosen)
    assert model.config.get_text_config()._attn_implementation == chosen


def test_patches_that_are_missing_are_counted(qwen):
    inputs = qwen.inputs([([qwen.picture(1)], "compare them")])
    with capsight.enable(qwen.model, capsule=fitted("qwen2_5_vl", 0.4)) as fast:
        for pixels in (inputs["pixel_values"][:-1], torch.cat([inputs["pixel_values"]] * 2)):
            with pytest.raises(LayoutError, match="patches, image_grid_thw speaks of"):
                fast.generate(**inputs | {"pixel_values": pixels}, max_new_tokens=1)


def test_a_model_can_be_pickled_while_it_is_enabled(qwen):
    model, inputs, held = type(qwen.model)(qwen.model.config).eval(), mixed_batch(qwen), io.BytesIO()
    model.load_state_dict(qwen.model.state_dict())  # that one may hold transformers' hooks
    full = greedy(model.generate, **inputs)
    with capsight.enable(model, capsule=fitted("qwen2_5_vl", 0.4)):
        torch.save(model, held)
    held.seek(0)
    assert_same(greedy(torch.load(held, weights_only=False).generate, **inputs), full)
