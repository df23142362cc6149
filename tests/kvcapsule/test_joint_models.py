"""The joint codec on language models that no tiny family has: other rotations, heads and attentions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import capsight
from capsight import KVCapsule
from capsight.errors import CalibrationError, UnsupportedModelError
from kvcapsule.conftest import fitted
from kvcapsule.test_generate import batch, full_cache, run
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


def test_layers_that_turn_keys_otherwise_are_refused():
    vlm = llava.build("llava", model_type="smollm3", no_rope_layers=[1, 0, 1], head_dim=16)
    with pytest.raises(CalibrationError, match="cannot tell how"):
        fitted(vlm, codec="joint")
