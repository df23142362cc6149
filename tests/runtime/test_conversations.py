"""What a conversation needs lies on its cache: copies, files, contexts, rows and wrappers change nothing."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import capsight
from capsight.cache_argument import CACHE
from capsight.errors import CapsightError, LayoutError, ModelMismatchError, OptionError
from capsight.kvcapsule.cache import conversation
from tiny import CACHES, FAMILIES, clip, in_turn

from .conftest import few, fitted
from .test_enable import assert_same, greedy, mixed_batch

VIDEOS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"]


def one(vlm, seeds=(1, 2), text="what is it"):
    return vlm.inputs([([vlm.picture(seed) for seed in seeds], text)])


def through_torch(cache):
    torch.save(cache, held := io.BytesIO())
    held.seek(0)
    return torch.load(held, weights_only=False)


@in_turn("way", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), copy.copy])
def test_a_copy_goes_on_in_another_context_after_another_conversation(vlm, way):
    inputs = mixed_batch(vlm)
    full = greedy(vlm.model.generate, **inputs)
    capsule = fitted(vlm.name, 1.0)
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        other = way(fast.encapsulate(**inputs))
        fast.generate(**one(vlm, (7,)), max_new_tokens=1)
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        with pytest.raises(LayoutError, match="other images"):
            fast.generate(past_key_values=other, **changed_pixels(inputs))
        edited = inputs | {"input_ids": inputs["input_ids"].clone()}
        edited["input_ids"][0, inputs["attention_mask"][0].argmax() + 1] += 1
        with pytest.raises(LayoutError, match="another prompt"):
            fast.generate(past_key_values=other, **edited)
        assert_same(greedy(fast.generate, past_key_values=other, **inputs), full)


@pytest.mark.parametrize("way", [lambda cache: pickle.loads(pickle.dumps(cache)), through_torch])
@in_turn("codec,decode", [("joint", "latent"), ("heads", "latent"), ("adaptive", "materialise")], CACHES)
def test_a_pickled_cache_goes_on_from_an_answer(vlm, codec, decode, way):
    """Buffers that tokens are written into are views of one another, which pickle forgets."""
    inputs = mixed_batch(vlm)
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 0.4, codec), decode=decode) as fast:
        cache = fast.encapsulate(**inputs)
        answer = greedy(fast.generate, past_key_values=cache, **inputs).sequences
        later = {"input_ids": torch.cat([answer, answer[:, -4:-2]], 1)}
        later["attention_mask"] = (later["input_ids"] != vlm.token_id("pad")).long()
        other = way(cache)
        expected = greedy(fast.generate, past_key_values=cache, **later)
        assert_same(greedy(fast.generate, past_key_values=other, **later), expected)


@in_turn("codec", ["joint", "heads", "adaptive", "evict"], CACHES)
def test_a_copy_has_tokens_of_its_own_and_the_same_codecs(vlm, codec):
    capsule = fitted(vlm.name, 0.4, codec) if codec == "joint" else fitted(vlm.name, 0.4).with_codec(codec)
    a, b = one(vlm), one(vlm, text="what else is there to be seen in these")
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        expected = [greedy(fast.generate, past_key_values=fast.encapsulate(**x), **x) for x in (a, b)]
        cache = fast.encapsulate(**a)
        for way in (copy.copy, copy.deepcopy):
            other = way(cache)
            assert_same(greedy(fast.generate, past_key_values=other, **a), expected[0])
            pairs = zip(cache.capsule_layers.values(), other.capsule_layers.values(), strict=True)
            assert all(x.codec is y.codec for x, y in pairs)
        assert_same(greedy(fast.generate, past_key_values=cache, **b), expected[1])


@in_turn("codec", ["joint", "heads", "adaptive", "evict"], CACHES)
def test_a_copy_of_the_model_goes_on_and_another_model_is_refused(vlm, codec):
    capsule = fitted(vlm.name, 0.4, codec) if codec == "joint" else fitted(vlm.name, 0.4).with_codec(codec)
    inputs, model = one(vlm), copy.deepcopy(vlm.model)
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        cache = fast.encapsulate(**inputs)
        expected = greedy(fast.generate, past_key_values=copy.deepcopy(cache), **inputs)
    with capsight.enable(model, capsule=capsule) as fast:
        assert_same(greedy(fast.generate, past_key_values=copy.deepcopy(cache), **inputs), expected)
        tokens = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        assert_same(greedy(model.generate, **{CACHE: copy.deepcopy(cache)}, **tokens), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    with (
        capsight.enable(model) as fast,
        pytest.raises(ModelMismatchError, match="another model"),
    ):
        fast.generate(past_key_values=cache, **inputs)


def changed_pixels(inputs):
    return inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}


@pytest.mark.parametrize("codec", ["heads", "adaptive"])
@pytest.mark.parametrize("name", VIDEOS)
def test_a_question_after_a_long_clip_is_where_one_prefill_puts_it(name, codec):
    vlm = FAMILIES[name]()
    inputs = vlm.video_inputs([([clip(1, 16)], "what is it"), ([clip(2, 16)], "and this one here")])
    full = greedy(vlm.model.generate, **inputs)
    with capsight.enable(vlm.model, capsule=fitted(name, 1.0, codec)) as fast:
        cache = copy.deepcopy(fast.encapsulate(**inputs))
        fast.generate(**one(vlm, (7,)), max_new_tokens=1)
    with capsight.enable(vlm.model, capsule=fitted(name, 1.0, codec)) as fast:
        assert_same(greedy(fast.generate, past_key_values=cache, **inputs), full)


@few
def test_an_edited_answer_is_refused_and_the_real_one_goes_on(vlm):
    inputs = mixed_batch(vlm)
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 0.4)) as fast:
        tokens = fast.generate(**inputs, max_new_tokens=5, do_sample=False)
        more = torch.tensor([[5, 6, 7]]).expand(len(tokens), -1)
        mask = inputs["attention_mask"]
        turn = {
            "input_ids": torch.cat([tokens, more], 1),
            "attention_mask": torch.cat(
                [mask, mask.new_ones(len(tokens), tokens.shape[1] + 3 - mask.shape[1])], 1
            ),
        }
        wrong = turn | {"input_ids": turn["input_ids"].clone()}
        wrong["input_ids"][1, inputs["input_ids"].shape[1] + 1] += 1
        cache = fast.cache
        with pytest.raises(LayoutError, match="row 1"):
            fast.generate(past_key_values=cache, **wrong)
        fast.generate(past_key_values=cache, **turn, max_new_tokens=2)
        assert fast.prompt_ids.shape == turn["input_ids"].shape


@pytest.mark.parametrize("wrap", ["peft", "compile", "accelerate"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_wrapped_models_keep_conversations_apart(name, wrap):
    vlm = FAMILIES[name]()
    model = wrapped(copy.deepcopy(vlm.model), wrap)
    a, b = one(vlm), one(vlm, (3,), "and what is this")
    full = greedy(vlm.model.generate, **a)
    with capsight.enable(model, capsule=fitted(name, 1.0)) as fast:
        cache = fast.encapsulate(**a)
        fast.generate(**b, max_new_tokens=3)
        assert_same(greedy(fast.generate, past_key_values=cache, **a), full)


def wrapped(model, how):
    if how == "compile":
        return torch.compile(model)
    if how == "accelerate":
        accelerate = pytest.importorskip("accelerate")
        return accelerate.cpu_offload(model, execution_device="cpu") and model
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=True)
    return peft.get_peft_model(model, config)


@in_turn("codec", ["heads", "evict"])
def test_what_hides_tokens_is_refused_under_another_attention(vlm, codec):
    inputs = one(vlm)
    capsule = fitted(vlm.name, 0.4, "heads").with_codec(codec)
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        cache = fast.encapsulate(**inputs)
    fresh = capsule.cache(inputs)
    tokens = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    vlm.model.model.rope_deltas = None  # MiniCPM-V 4.7 trips over those of an earlier batch
    for given, prompt in ((cache, tokens), (fresh, inputs), (copy.deepcopy(cache), tokens)):
        with pytest.raises(CapsightError, match=r"enable|set_attn"):
            vlm.model.generate(**prompt, past_key_values=given, max_new_tokens=3)
    loop = capsule.cache(inputs, vlm.config)
    with torch.no_grad():
        vlm.model(**inputs, past_key_values=loop)
    with torch.no_grad(), pytest.raises(CapsightError, match=r"enable|set_attn"):
        vlm.model(input_ids=inputs["input_ids"][:, :1], past_key_values=loop)


@in_turn("codec", ["adaptive", "heads", "evict"])
def test_one_attention_for_good_needs_no_context(vlm, codec):
    model = copy.deepcopy(vlm.model)
    inputs = mixed_batch(vlm)
    before = greedy(model.generate, **inputs)
    capsule = fitted(vlm.name, 0.4, "heads").with_codec(codec)
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        expected = greedy(fast.generate, **inputs)
    model.set_attn_implementation("capsight")
    for cache in (capsule.cache(inputs), capsule.cache(inputs, model.config)):
        assert_same(greedy(model.generate, past_key_values=cache, **inputs), expected)
    assert_same(greedy(model.generate, **inputs), before)


@few
def test_no_cache_is_refused(vlm):
    inputs = one(vlm)
    config = copy.deepcopy(vlm.model.generation_config)
    config.use_cache = False
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 0.4)) as fast:
        for options in ({"use_cache": False}, {"generation_config": config}):
            with pytest.raises(OptionError, match="use_cache"):
                fast.generate(**inputs, **options)


def test_each_image_is_looked_at_once(qwen, monkeypatch):
    seen = []
    real = conversation.pixels_fingerprint
    monkeypatch.setattr(conversation, "pixels_fingerprint", lambda pixels: seen.append(1) or real(pixels))
    inputs = mixed_batch(qwen)
    with capsight.enable(qwen.model, capsule=fitted("qwen2_5_vl", 0.4)) as fast:
        fast.generate(**inputs, max_new_tokens=2)
        assert len(seen) == len(inputs["image_grid_thw"])
        assert len([image for row in fast.cache.conversation.images for image in row]) == len(seen)
        fast.encapsulate(**inputs)
        assert len(seen) == 2 * len(inputs["image_grid_thw"])


def test_a_model_that_was_told_to_cache_nothing_caches_all_the_same(qwen):
    inputs = one(qwen)
    model = copy.deepcopy(qwen.model)
    full = greedy(model.generate, **inputs)
    model.generation_config.use_cache = False
    with capsight.enable(model, capsule=fitted("qwen2_5_vl", 1.0)) as fast:
        assert_same(greedy(fast.generate, **inputs), full)
        assert fast.cache.get_seq_length() == full.sequences.shape[1] - 1
