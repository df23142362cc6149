"""One model has one fingerprint, however it is loaded or wrapped; another has another."""

from __future__ import annotations

import copy

import pytest
import torch

import capsight
from capsight import KVCapsule
from capsight.errors import ModelMismatchError, UnsupportedModelError
from capsight.model_fingerprint import model_fingerprint, same_model
from runtime.conftest import fitted
from runtime.test_enable import assert_same, greedy, mixed_batch
from tiny import FAMILIES

every = pytest.mark.parametrize("name", sorted(FAMILIES))


@every
def test_dtypes_of_one_checkpoint_are_one_model(name):
    model = FAMILIES[name]().model
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.flatten()[::3] *= 2.0**-16  # where float16 has fewer bits
    same = {model_fingerprint(copy.deepcopy(rounded).to(dtype)) for dtype in (torch.float16, torch.float32)}
    assert same == {model_fingerprint(rounded)}
    assert model_fingerprint(model) not in same


@every
def test_a_checkpoint_in_float32_is_one_model_in_float16_and_bfloat16(name):
    model = FAMILIES[name]().model
    own = model_fingerprint(model)
    for dtype in (torch.float16, torch.bfloat16):
        loaded = copy.deepcopy(model).to(dtype)
        assert same_model(model_fingerprint(loaded), own)
        with torch.no_grad():
            for parameter in loaded.get_decoder().parameters():
                parameter.mul_(1.5)
        assert not same_model(model_fingerprint(loaded), own)


def test_frequencies_that_a_cast_rounds_are_the_same():
    model = copy.deepcopy(FAMILIES["qwen2_5_vl"]().model)
    rotary = model.get_decoder().rotary_emb
    wanted = 2 ** (1e-5 - (torch.arange(len(rotary.inv_freq)) + 0.5) / 16)  # close to where octaves are cut
    octaves = [(x.double().log2() * 16).round() for x in (wanted, wanted.bfloat16())]
    assert (octaves[0] != octaves[1]).any()
    rotary.inv_freq = rotary.original_inv_freq = wanted
    own = model_fingerprint(model)
    for dtype in (torch.bfloat16, torch.float16):
        cast = copy.deepcopy(model).to(dtype)
        assert cast.get_decoder().rotary_emb.inv_freq.dtype == dtype
        assert same_model(model_fingerprint(cast), own)
    rotary.inv_freq = rotary.original_inv_freq = wanted * 1.1
    assert not same_model(model_fingerprint(model), own)


@every
def test_norms_biases_and_frequencies_tell_models_apart(name):
    model = FAMILIES[name]().model
    own, before, seen = dict(model.get_decoder().named_parameters()), model_fingerprint(model), 0
    for key in ("norm.weight", "bias"):
        parameter = next((p for n, p in reversed(own.items()) if n.endswith(key) and p.ndim == 1), None)
        if parameter is not None:
            kept = parameter.detach().clone()
            parameter.data += 0.25
            assert not same_model(model_fingerprint(model), before)
            parameter.data.copy_(kept)
            seen += 1
    assert seen
    config = copy.deepcopy(model.config)
    rope = config.get_text_config().rope_parameters
    for values in [rope] if "rope_theta" in rope else rope.values():
        values["rope_theta"] *= 4
    other = type(model)(config)
    other.load_state_dict(model.state_dict())
    assert not same_model(model_fingerprint(other), before)
    assert model_fingerprint(model) == before


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "smolvlm", "glm4v", "lfm3_vl", "llava_next"])
def test_quantised_weights_are_the_model_they_were_made_from(name):
    quanto = pytest.importorskip("optimum.quanto")
    vlm, capsule = FAMILIES[name](), fitted(name, 0.4)
    model = copy.deepcopy(vlm.model)
    quanto.quantize(model.get_decoder(), weights=quanto.qint8)
    quanto.freeze(model)
    capsule.check_model(model)
    with torch.no_grad():
        next(p for n, p in model.get_decoder().named_parameters() if n.endswith("norm.weight")).add_(0.25)
    with pytest.raises(ModelMismatchError):
        capsule.check_model(model)


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "lfm3_vl"])
def test_weights_of_torchao_are_the_model_they_were_made_from_and_run(name, kind):
    """Needs torchao, which the project's environment has not."""
    pytest.importorskip("torchao")
    from torchao import quantization

    vlm, capsule = FAMILIES[name](), fitted(name, 1.0)
    model, inputs = copy.deepcopy(vlm.model), mixed_batch(vlm)
    quantization.quantize_(model.get_decoder(), getattr(quantization, kind)())
    full = greedy(model.generate, **inputs)
    with capsight.enable(model, capsule=capsule) as fast:
        assert_same(greedy(fast.generate, **inputs), full)
    with torch.no_grad():
        next(p for n, p in model.get_decoder().named_parameters() if n.endswith("norm.weight")).add_(0.25)
    with pytest.raises(ModelMismatchError):
        capsule.check_model(model)


def test_weights_in_eight_bit_floats_are_the_model_they_were_made_from():
    model = copy.deepcopy(FAMILIES["qwen2_5_vl"]().model)
    before = model_fingerprint(model)
    for parameter in model.get_decoder().layers.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(torch.float8_e4m3fn)
    assert same_model(model_fingerprint(model), before)


TUNERS = {
    "LoraConfig": {"modules_to_save": ["lm_head"], "trainable_token_indices": [1, 2]},
    "IA3Config": {"feedforward_modules": []},
    "VeraConfig": {"r": 2},
    "LoKrConfig": {"r": 2},
    "OFTConfig": {"oft_block_size": 4},
}
"""Adapters whose parameters have names of their own, beside the layers of the model or around them."""


@pytest.mark.parametrize(("kind", "options"), TUNERS.items())
def test_adapters_are_told_from_the_model(kind, options):
    peft, model = pytest.importorskip("peft"), copy.deepcopy(FAMILIES["qwen2_5_vl"]().model)
    before = model_fingerprint(model)
    config = getattr(peft, kind)(target_modules=r".*language_model.*q_proj", **options)
    adapted = peft.get_peft_model(model, config)
    assert model_fingerprint(adapted) == model_fingerprint(model) == before


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_adapters_of_prompts_are_refused(kind):
    peft, model = pytest.importorskip("peft"), copy.deepcopy(FAMILIES["qwen2_5_vl"]().model)
    adapted = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4))
    capsule = fitted("qwen2_5_vl", 0.4)
    with (
        pytest.raises(UnsupportedModelError, match="virtual tokens"),
        capsight.enable(adapted, capsule=capsule),
    ):
        pass
    with pytest.raises(UnsupportedModelError, match="virtual tokens"):
        KVCapsule.fit(adapted, None, [{}], progress=False)
