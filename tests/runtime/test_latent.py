"""`enable(decode="latent")` through `generate`, against `materialise` and the full cache."""

from __future__ import annotations

import pytest
import torch

import capsight
from capsight import KVCapsule
from capsight.baselines import METHODS
from capsight.errors import OptionError
from tiny import CACHES, in_turn

from .conftest import fitted
from .test_enable import assert_same, greedy, mixed_batch


def both_ways(vlm, capsule, **inputs):
    """Logits after encapsulated images, materialised and latent."""
    found = []
    for decode in ("materialise", "latent"):
        with capsight.enable(vlm.model, capsule=capsule, decode=decode) as fast:
            cache = fast.encapsulate(**inputs)
            found.append(greedy(fast.generate, past_key_values=cache, **inputs))
            found[-1].nbytes = fast.cache.nbytes
    return found


@in_turn("codec", ["heads", "adaptive"], CACHES)
def test_equals_materialise(vlm, codec):
    a, b = both_ways(vlm, fitted(vlm.name, 0.4, codec).for_latent(), **mixed_batch(vlm))
    assert_same(b, a)
    assert a.nbytes == b.nbytes


@pytest.mark.parametrize("name", ["cur", "snapkv", "vl-cache", "kvzip"])
def test_baselines_that_evict(qwen, name):
    a, b = both_ways(qwen, METHODS[name](0.3), **mixed_batch(qwen))
    assert_same(b, a)
    assert a.nbytes == b.nbytes


@in_turn("codec", ["adaptive", "heads"], CACHES)
def test_all_retained_is_the_full_cache(vlm, codec):
    inputs = mixed_batch(vlm)
    full = greedy(vlm.model.generate, **inputs)
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 1.0, codec), decode="latent") as fast:
        assert_same(greedy(fast.generate, **inputs), full)
        cache = fast.encapsulate(**inputs)
        assert_same(greedy(fast.generate, past_key_values=cache, **inputs), full)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("codec", ["heads", "adaptive"])
def test_few_bits(qwen, codec, bits):
    a, b = both_ways(qwen, fitted("qwen2_5_vl", 0.4, codec).with_bits(bits), **mixed_batch(qwen))
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.logits, b.logits, strict=True):
        torch.testing.assert_close(x, y, atol=1e-3 if codec == "heads" else 2e-2, rtol=0)


@pytest.mark.parametrize("codec", ["evict", "static"])
def test_other_codecs(qwen, codec):
    capsule = fitted("qwen2_5_vl", 0.4)
    if codec == "static":
        samples = [qwen.inputs([([qwen.picture(seed)], "what")]) for seed in range(3)]
        capsule = KVCapsule.fit(qwen.model, None, samples, retained=0.4, codec="static", progress=False)
    else:
        capsule = capsule.with_codec("evict")
    a, b = both_ways(qwen, capsule, **mixed_batch(qwen))
    assert_same(b, a)


@pytest.mark.parametrize("codec", ["heads", "adaptive"])
def test_text_alone(qwen, codec):
    inputs = qwen.inputs([([], "just words"), ([], "and fewer")])
    full = greedy(qwen.model.generate, **inputs)
    with capsight.enable(qwen.model, capsule=fitted("qwen2_5_vl", 0.4, codec), decode="latent") as fast:
        assert_same(greedy(fast.generate, **inputs), full)


@pytest.mark.parametrize("codec", ["heads", "adaptive"])
def test_a_cache_may_change_between_the_two_ways(qwen, codec):
    inputs, capsule = mixed_batch(qwen), fitted("qwen2_5_vl", 0.4, codec).for_latent()
    found = []
    for first, second in (
        ("materialise", "materialise"),
        ("latent", "materialise"),
        ("materialise", "latent"),
    ):
        with capsight.enable(qwen.model, capsule=capsule, decode="latent") as fast:
            fast.decode = first
            tokens = fast.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
            more = {
                "input_ids": torch.cat([tokens, tokens[:, -2:]], 1),
                "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1),
            }
            fast.decode = second
            found.append(greedy(fast.generate, past_key_values=fast.cache, **more))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("codec", ["heads", "adaptive"])
def test_beams(qwen, codec):
    inputs = mixed_batch(qwen)
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    full = qwen.model.generate(**inputs, **options)
    with capsight.enable(qwen.model, capsule=fitted("qwen2_5_vl", 1.0, codec), decode="latent") as fast:
        assert torch.equal(fast.generate(**inputs, **options), full)


def test_weights_are_stored_unless_told_otherwise(qwen, tmp_path):
    capsule = fitted("qwen2_5_vl", 0.4, "adaptive")
    solved = capsule.with_weights("solved")
    evict, heads = (capsule.with_codec(codec) for codec in ("evict", "heads"))
    for given, stored in ((capsule, True), (solved, False), (evict, False), (heads, False)):
        with capsight.enable(qwen.model, capsule=given, decode="latent") as fast:
            cache = fast.encapsulate(**qwen.inputs([([qwen.picture(1)], "what is it")]))
        payload = next(iter(cache.capsule_layers.values())).payload
        assert ("weights" in payload.tensors) == stored
    capsule.with_weights("stored").save_pretrained(tmp_path)
    again = KVCapsule.from_pretrained(tmp_path)
    assert all(codec.weights == "stored" for codec in again.codecs.values())
    assert again.with_retained(0.2).codecs[0].weights == "stored"
    assert again.with_codec("evict").with_codec("adaptive").codecs[0].weights == "solved"


def test_how_to_decode_unless_told(qwen):
    """What rebuilds nothing is read as it is; the others leave the model's own attention in place."""
    text, capsule = qwen.config.get_text_config(), fitted("qwen2_5_vl", 0.4)
    before = text._attn_implementation
    for used, decode, attention in (
        (None, "materialise", before),
        (capsule, "latent", "capsight"),
        (capsule.with_bits(8), "latent", "capsight"),
        (capsule.with_codec("evict"), "latent", "capsight"),
        (capsule.with_codec("adaptive"), "materialise", before),
        (METHODS["uniform"](0.4), "latent", "capsight"),
        (METHODS["snapkv"](0.4), "latent", "capsight"),
        (METHODS["merge"](0.4), "materialise", "capsight"),
    ):
        with capsight.enable(qwen.model, capsule=used) as fast:
            assert (fast.decode, text._attn_implementation) == (decode, attention)
    with capsight.enable(qwen.model, capsule=capsule, decode="materialise") as fast:
        assert (fast.decode, text._attn_implementation) == ("materialise", "capsight")


def test_refused(qwen):
    text = qwen.config.get_text_config()
    before = text._attn_implementation
    for capsule, decode, match in (
        (None, "latent", "KVCapsule"),
        (METHODS["merge"](0.4), "latent", "KVCapsule"),
        (fitted("qwen2_5_vl", 0.4), "fused", "one of"),
    ):
        with (
            pytest.raises(OptionError, match=match),
            capsight.enable(qwen.model, capsule=capsule, decode=decode),
        ):
            pass
    with capsight.enable(qwen.model, capsule=fitted("qwen2_5_vl", 0.4), decode="latent"):
        assert text._attn_implementation == "capsight"
    assert text._attn_implementation == before
