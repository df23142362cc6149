from __future__ import annotations

import itertools

import pytest
import torch

import capsight
from capsight import KVCapsule
from capsight.errors import ModelMismatchError, OptionError, UnsupportedModelError
from capsight.layout import build_layout
from tiny import CACHES, FAMILIES, in_turn

from .conftest import fitted

both_codecs = pytest.mark.parametrize("codec", ["heads", "adaptive"])


def mixed_batch(vlm):
    """Two images, one image, and in the third row none."""
    return vlm.inputs(
        [
            ([vlm.picture(1), vlm.picture(2, vlm.other_size)], "compare them"),
            ([vlm.picture(3)], "what is it"),
            ([], "hello there"),
        ]
    )


@pytest.mark.parametrize("wrong", ["reference", 5, KVCapsule])
def test_names_in_the_place_of_things_are_refused(qwen, wrong):
    for options in ({"capsule": wrong}, {"head_map": wrong}):
        with pytest.raises(OptionError, match="takes a"), capsight.enable(qwen.model, **options):
            pass
    for model in (None, wrong, torch.nn.Linear(2, 2)):
        with pytest.raises(UnsupportedModelError, match="transformers"), capsight.enable(model):
            pass


def greedy(generate, **inputs):
    return generate(
        **inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )


def assert_same(ours, theirs):
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert (a - b).abs().max() <= 1e-4


@in_turn("codec", ["heads", "adaptive"], CACHES)
def test_all_retained_is_the_full_cache(vlm, codec):
    inputs = mixed_batch(vlm)
    full = greedy(vlm.model.generate, **inputs)
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 1.0, codec)) as fast:
        ours = greedy(fast.generate, **inputs)
    assert_same(ours, full)


@in_turn("codec", ["adaptive", "heads"], CACHES)
def test_encapsulated_images_then_question(vlm, codec):
    inputs = mixed_batch(vlm)
    full = greedy(vlm.model.generate, **inputs)
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 1.0, codec)) as fast:
        cache = fast.encapsulate(**inputs)
        assert cache.get_seq_length() == build_layout(inputs, vlm.config).last_vision_end
        ours = greedy(fast.generate, past_key_values=cache, **inputs)
    assert_same(ours, full)


def test_encapsulated_without_capsule_is_the_full_cache(qwen):
    inputs = mixed_batch(qwen)
    full = greedy(qwen.model.generate, **inputs)
    with capsight.enable(qwen.model) as fast:
        cache = fast.encapsulate(**inputs)
        ours = greedy(fast.generate, past_key_values=cache, **inputs)
    assert_same(ours, full)


def test_evicting_differs_from_rebuilding_and_from_full(qwen):
    inputs = qwen.inputs([([qwen.picture(1), qwen.picture(2)], "compare"), ([qwen.picture(3)], "what is it")])
    capsule = fitted("qwen2_5_vl", 0.25)
    adaptive, evict = (capsule.with_codec(codec) for codec in ("adaptive", "evict"))
    logits = {}
    for name, used in (("full", None), ("rebuilt", adaptive), ("evicted", evict), ("by head", capsule)):
        with capsight.enable(qwen.model, capsule=used) as fast:
            cache = fast.encapsulate(**inputs)
            logits[name] = greedy(fast.generate, past_key_values=cache, **inputs).logits[0]
    for a, b in itertools.combinations(logits.values(), 2):
        assert not torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("codec", ["evict", "heads"])
def test_evicting_everything_kept_is_the_full_cache(qwen, codec):
    inputs = mixed_batch(qwen)
    full = greedy(qwen.model.generate, **inputs)
    capsule = fitted("qwen2_5_vl", 1.0, codec)
    with capsight.enable(qwen.model, capsule=capsule, decode="materialise") as fast:
        assert_same(greedy(fast.generate, **inputs), full)


def test_model_is_what_it_was(qwen):
    model = qwen.model
    text = model.config.get_text_config()
    capsule = fitted("qwen2_5_vl", 0.5)  # fitting runs the model, which moves its rope_deltas

    def state():
        return (
            text._attn_implementation,
            id(model.model.rope_deltas),
            {n: id(m) for n, m in model.named_modules()},
        )

    before = state()
    for codec in ("adaptive", "evict", "heads"):
        with capsight.enable(model, capsule=capsule.with_codec(codec)) as fast:
            fast.generate(**mixed_batch(qwen), max_new_tokens=2)
        assert state() == before


def test_model_is_restored_after_an_error(qwen):
    text = qwen.model.config.get_text_config()
    before = text._attn_implementation
    with (
        pytest.raises(RuntimeError, match="inside"),
        capsight.enable(qwen.model, capsule=fitted("qwen2_5_vl", 0.5).with_codec("evict")),
    ):
        raise RuntimeError("inside")
    assert text._attn_implementation == before


@both_codecs
def test_second_turn_on_the_same_cache(qwen, codec):
    pictures = [[qwen.picture(1)], [qwen.picture(2)]]
    first = qwen.inputs([(p, "what is it") for p in pictures])
    texts = [qwen.prompt(p, "what is it") + "yes<|im_end|>\n<|im_start|>user\nand now?" for p in pictures]
    second = qwen.process(texts, pictures)
    assert torch.equal(second["input_ids"][:, : first["input_ids"].shape[1]], first["input_ids"])
    full = greedy(qwen.model.generate, **second)
    with capsight.enable(qwen.model, capsule=fitted("qwen2_5_vl", 1.0, codec)) as fast:
        fast.generate(**first, max_new_tokens=1)
        ours = greedy(fast.generate, past_key_values=fast.cache, **second)
    assert_same(ours, full)


@both_codecs
def test_interleaved_conversations_keep_their_positions(qwen, codec):
    a = qwen.inputs([([qwen.picture(1), qwen.picture(2)], "compare")])
    b = qwen.inputs([([qwen.picture(3, qwen.other_size)], "what is it")])
    full = greedy(qwen.model.generate, **a)
    with capsight.enable(qwen.model, capsule=fitted("qwen2_5_vl", 1.0, codec)) as fast:
        cache = fast.encapsulate(**a)
        fast.generate(**b, max_new_tokens=2)
        ours = greedy(fast.generate, past_key_values=cache, **a)
    assert_same(ours, full)


def test_sampling_with_a_seed_repeats(qwen):
    inputs = mixed_batch(qwen)
    with capsight.enable(qwen.model, capsule=fitted("qwen2_5_vl", 0.5)) as fast:
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            runs.append(fast.generate(**inputs, max_new_tokens=6, do_sample=True))
    assert torch.equal(*runs)


@both_codecs
def test_beams_and_return_sequences(qwen, codec):
    inputs = mixed_batch(qwen)
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    full = qwen.model.generate(**inputs, **options)
    with capsight.enable(qwen.model, capsule=fitted("qwen2_5_vl", 1.0, codec)) as fast:
        assert torch.equal(fast.generate(**inputs, **options), full)


def test_another_model_is_refused(qwen):
    other = FAMILIES["qwen2_vl"]()
    with (
        pytest.raises(ModelMismatchError, match="fit one"),
        capsight.enable(other.model, capsule=fitted("qwen2_5_vl", 0.5)),
    ):
        pass


def test_prompt_shorter_than_the_cache_is_refused(qwen):
    inputs = mixed_batch(qwen)
    with capsight.enable(qwen.model, capsule=fitted("qwen2_5_vl", 0.5)) as fast:
        fast.generate(**inputs, max_new_tokens=3)
        with pytest.raises(OptionError, match="whole"):
            fast.generate(past_key_values=fast.cache, **inputs, max_new_tokens=1)
