"""The joint codec on language models that no tiny family has: other rotations, heads and attentions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image

import capsight
from capsight import KVCapsule
from capsight.errors import CalibrationError, CapsuleFileError, ModelMismatchError, UnsupportedModelError
from capsight.kvcapsule.cache_file import load_cache, save_cache
from capsight.kvcapsule.codecs.heads import HeadsCodec
from capsight.kvcapsule.codecs.joint import JointCodec
from kvcapsule.conftest import fitted
from kvcapsule.test_generate import asked, batch, full_cache, later_turn, run
from tiny import TinyVLM, llava


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


MODELS: dict[str, dict[str, Any]] = {
    "llama3": rope(
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=64),
    "dynamic": rope("dynamic", factor=4.0) | {"max_position_embeddings": 512},
    "longrope": {"model_type": "phi3", "original_max_position_embeddings": 512}
    | rope(
        "longrope",
        short_factor=[1.0] * 8,
        long_factor=[2.0] * 8,
        original_max_position_embeddings=512,
    ),
    "a quarter is turned": {"model_type": "stablelm"} | rope("default", partial_rotary_factor=0.25),
    "interleaved": {"model_type": "cohere"},
    "norms of keys": {"model_type": "qwen3", "head_dim": 16},
    "one KV head for 32": {"num_attention_heads": 32, "num_key_value_heads": 1, "head_dim": 16},
    "16 heads for 2": {"num_attention_heads": 16, "head_dim": 16},
    "20 channels": {"head_dim": 20},
    "256 channels": {"head_dim": 256},
    "a factor of scores": {"model_type": "granite", "attention_multiplier": 0.3},
}
OWN_ATTENTION: dict[str, dict[str, Any]] = {
    "caps": {"model_type": "gemma2", "attn_logit_softcapping": 2.0, "head_dim": 16, "sliding_window": 64},
    "sinks": {
        "model_type": "gpt_oss",
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": 64,
        "head_dim": 16,
    },
}


def gap(vlm: TinyVLM, decode: str | None) -> float:
    """Relative error of the logits of a first answer over capsules that hold nearly all."""
    samples = [vlm.inputs([([vlm.picture(seed)], "hi")]) for seed in range(90, 106)]
    inputs, capsule = batch(vlm), KVCapsule.fit(vlm.model, None, samples, 0.9, progress=False)
    full = run(vlm, inputs, full_cache(vlm), max_new_tokens=1).logits[0]
    with capsight.enable(vlm.model, capsule=capsule, decode=decode) as fast:
        cache = fast.encapsulate(**inputs)
        found = fast.generate(
            past_key_values=cache,
            **inputs,
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return float((found.logits[0] - full).norm() / full.norm())


@pytest.mark.parametrize("name", MODELS)
def test_latents_of_nearly_all_are_nearly_the_full_cache(name):
    vlm = llava.build("llava", **MODELS[name])
    assert gap(vlm, "latent") < 0.02
    assert gap(vlm, "materialise") < 0.02


def test_fitting_leaves_frequencies_that_grow_as_they_were():
    vlm = llava.build("llava", **MODELS["dynamic"] | {"max_position_embeddings": 256})
    inputs = batch(vlm)
    before = run(vlm, inputs, full_cache(vlm)).logits[0]
    fitted(vlm, 0.9, codec="joint")
    assert torch.equal(run(vlm, inputs, full_cache(vlm)).logits[0], before)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_prompts_beyond_the_frequencies_that_were_fitted_are_refused(kind):
    """Both types turn all keys otherwise once a prompt is longer than the first training was."""
    first = 120  # longer than a picture and a word, shorter than the batch
    given = MODELS[kind] | {"max_position_embeddings": first if kind == "dynamic" else 512}
    given["original_max_position_embeddings"] = first
    given["rope_parameters"] = given["rope_parameters"] | {"original_max_position_embeddings": first}
    vlm = llava.build("llava", **given)
    inputs, short = batch(vlm), vlm.inputs([([vlm.picture(1)], "hi")])
    assert short["input_ids"].shape[1] < first < inputs["input_ids"].shape[1]
    joint, heads = fitted(vlm, 0.9, codec="joint"), fitted(vlm, 0.9, codec="heads")
    with pytest.raises(UnsupportedModelError, match="turns keys otherwise"):
        KVCapsule.fit(vlm.model, None, [inputs], progress=False)
    with capsight.enable(vlm.model, capsule=joint) as fast:
        for call in (fast.generate, fast.encapsulate):
            with pytest.raises(UnsupportedModelError, match="turns keys otherwise"):
                call(**inputs)
        long = vlm.inputs([([vlm.picture(1)], "a question of many letters, which goes on beyond them" * 2)])
        cache = fast.encapsulate(**long)  # its pictures were read before
        assert long["input_ids"].shape[1] > first
        fast.generate(past_key_values=cache, **long, max_new_tokens=2)
    for capsule in (joint.with_retained(1.0), heads.with_retained(1.0)):
        ours, full = (copy.deepcopy(vlm.model) for _ in range(2))  # frequencies grow in a model
        asked_for = {"max_new_tokens": 3, "do_sample": False}
        with capsight.enable(ours, capsule=capsule) as fast:
            assert torch.equal(fast.generate(**inputs, **asked_for), full.generate(**inputs, **asked_for))


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_attention_that_is_more_than_a_softmax_stays_the_models_own(name):
    vlm = llava.build("llava", **OWN_ATTENTION[name])
    assert gap(vlm, None) < 0.02
    joint = fitted(vlm, 0.9, codec="joint")
    with pytest.raises(UnsupportedModelError, match="more than a softmax"):
        capsight.enable(vlm.model, capsule=joint, decode="latent").__enter__()
    with pytest.raises(UnsupportedModelError, match="more than a softmax"):
        fitted(vlm, codec="heads")
    vlm.model.set_attn_implementation({"text_config": "capsight"})
    with pytest.raises(UnsupportedModelError, match="leave the model its own"):
        run(vlm, batch(vlm), joint.cache(batch(vlm)))


def test_attention_that_changes_values_is_told_how_to_go_on():
    """DiffLlama attends twice, each time with half of the values."""
    vlm = llava.build("llava", model_type="diffllama")
    inputs, options = batch(vlm), {"max_new_tokens": 3, "do_sample": False}
    samples = [vlm.inputs([([vlm.picture(seed)], "hi")]) for seed in range(90, 94)]
    for codec in ("joint", "heads"):
        capsule = KVCapsule.fit(vlm.model, None, samples, 1.0, codec, progress=False)
        part = capsule.with_retained(0.5)
        with (
            capsight.enable(vlm.model, capsule=part, decode="latent") as fast,
            pytest.raises(UnsupportedModelError, match="materialise"),
        ):
            fast.generate(**inputs, **options)
        with capsight.enable(vlm.model, capsule=capsule, decode="materialise") as fast:
            found = fast.generate(**inputs, **options)
        assert torch.equal(found, vlm.model.generate(**inputs, **options))


def test_layers_that_turn_keys_otherwise_are_refused():
    vlm = llava.build("llava", model_type="smollm3", no_rope_layers=[1, 0, 1], head_dim=16)
    with pytest.raises(CalibrationError, match="cannot tell how"):
        fitted(vlm, codec="joint")


def test_tokens_that_are_all_alike_are_refused(qwen):
    """A white page: float16 rounds its tokens to numbers that differ from their mean by rounding alone."""
    white = qwen.inputs([([Image.new("RGB", qwen.size, "white")], "hi")])
    with pytest.raises(CalibrationError, match="alike"):
        KVCapsule.fit(qwen.model, None, [white], progress=False)


def test_tables_of_rotations_do_not_outlive_the_pass(qwen):
    inputs = batch(qwen)
    cache = fitted(qwen, 0.5, codec="joint").cache(inputs)
    said = run(qwen, inputs, cache, max_new_tokens=1).sequences  # encodes
    assert cache._ledger._positions[1]._tables is None
    again = asked(qwen, said, "a question of more than four tokens")
    run(qwen, later_turn(again, inputs), cache, max_new_tokens=1)  # rebuilds
    assert cache._ledger._positions[1]._tables is None


def test_latents_may_lie_on_another_device_than_a_layer(qwen):
    capsule = fitted(qwen, 0.5, codec="joint")
    codec = copy.deepcopy(capsule.codecs[1]).to("meta")
    keys, values = codec.expand(torch.zeros(3, codec.levels.rank))
    assert keys.device == values.device == torch.device("meta")


def test_files_say_which_constants_they_hang_on(qwen, tmp_path, monkeypatch):
    inputs, capsule = batch(qwen), fitted(qwen, 0.5, codec="joint")
    capsule.save_pretrained(tmp_path / "joint")
    fitted(qwen, codec="heads").save_pretrained(tmp_path / "heads")
    cache = capsule.cache(inputs)
    run(qwen, inputs, cache, max_new_tokens=1)
    save_cache(tmp_path / "images.safetensors", cache, capsule)
    with pytest.raises(ModelMismatchError, match="another capsule"):
        load_cache(tmp_path / "images.safetensors", capsule.with_retained(0.25))
    monkeypatch.setattr(JointCodec, "constants", JointCodec.constants | {"points": [0.5, 1.5]})
    monkeypatch.setattr(HeadsCodec, "constants", {"key_weight": 1.0})
    with pytest.raises(ModelMismatchError, match="another capsule"):
        load_cache(tmp_path / "images.safetensors", capsule)
    for name in ("joint", "heads"):
        with pytest.raises(CapsuleFileError, match="constants"):
            KVCapsule.from_pretrained(tmp_path / name)
