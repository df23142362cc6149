"""What a model has read with one PEFT adapter is not taken for what another reads."""

from __future__ import annotations

import copy

import pytest
import torch

import capsight
from capsight import CapsuleStore, KVCapsule
from capsight.adapters import adapters_fingerprint
from capsight.cache_argument import CACHE
from capsight.errors import CalibrationError, ModelMismatchError
from capsight.kvcapsule.calibration import fit_journal
from tiny import CACHES, FAMILIES, in_turn

from .conftest import fitted
from .test_conversations import one
from .test_enable import assert_same, greedy

peft = pytest.importorskip("peft")


def adapted(vlm, wrapped=True):
    """A model with adapters "default", which is active, and "other"."""
    torch.manual_seed(0)
    model = copy.deepcopy(vlm.model)
    text = {id(module) for module in model.get_decoder().modules()}
    names = [
        n
        for n, m in model.named_modules()
        if n.endswith(("self_attn.k_proj", "self_attn.v_proj")) and id(m) in text
    ]
    config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    model.add_adapter("other", config)
    model.set_adapter("default")
    return (model if wrapped else model.get_base_model()).eval()


def switched(model):
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.set_adapter("other")


@in_turn("codec", ["heads", "joint"], CACHES)
def test_a_cache_goes_on_with_its_own_adapters_only(vlm, codec, tmp_path):
    inputs, capsule = one(vlm), fitted(vlm.name, 0.4, codec)
    model = adapted(vlm, wrapped=codec == "heads")
    with capsight.enable(model, capsule=capsule) as fast:
        cache = fast.encapsulate(**inputs)
        fast.save(tmp_path / "images")
        expected = greedy(fast.generate, past_key_values=copy.deepcopy(cache), **inputs)
        switched(model)
        ids = {"input_ids": inputs["input_ids"][:, cache.get_seq_length() :]}
        calls = (
            lambda: fast.generate(past_key_values=copy.deepcopy(cache), **inputs),
            lambda: fast.encapsulate(past_key_values=copy.deepcopy(cache), **inputs),
            lambda: model(**ids, **{CACHE: copy.deepcopy(cache)}),
            lambda: fast.load(tmp_path / "images"),
        )
        for call in calls:
            with pytest.raises(ModelMismatchError, match="other adapters"):
                call()
        again = greedy(fast.generate, **inputs)
        assert not torch.equal(again.logits[0], expected.logits[0])
    fresh = adapted(vlm, wrapped=codec == "heads")
    with capsight.enable(fresh, capsule=capsule) as fast:
        assert_same(greedy(fast.generate, past_key_values=fast.load(tmp_path / "images"), **inputs), expected)


def test_switched_off_and_back_on(qwen):
    inputs, model = one(qwen), adapted(qwen)
    with capsight.enable(model, capsule=fitted("qwen2_5_vl", 0.4)) as fast:
        cache = fast.encapsulate(**inputs)
        with model.disable_adapter():
            assert adapters_fingerprint(model) == ""
            with pytest.raises(ModelMismatchError, match="other adapters"):
                fast.generate(past_key_values=cache, **inputs)
        fast.generate(past_key_values=cache, **inputs, max_new_tokens=1)
    assert adapters_fingerprint(qwen.model) == ""


@pytest.mark.parametrize("reuse", ["prefix", "anywhere"])
def test_a_store_keeps_adapters_apart(qwen, tmp_path, reuse):
    pytest.importorskip("constriction")
    inputs, model = one(qwen), adapted(qwen)
    store = CapsuleStore(tmp_path, quality=0.999, reuse=reuse)
    with capsight.enable(model, capsule=fitted("qwen2_5_vl", 0.9, "joint"), store=store) as fast:
        fast.encapsulate(**inputs)
        held = len(store.files())
        switched(model)
        fast.encapsulate(**inputs)
        assert len(store.files()) == 2 * held
        fast.generate(past_key_values=fast.encapsulate(**inputs), **inputs, max_new_tokens=1)
        assert len(store.files()) == 2 * held


def test_images_at_rest_keep_their_adapters(tmp_path):
    pytest.importorskip("constriction")
    vlm = FAMILIES["internvl"]()
    model = adapted(vlm)
    with capsight.enable(model, capsule=fitted("internvl", 0.9, "joint")) as fast:
        fast.encapsulate(**one(vlm))
        fast.save(tmp_path / "images", quality=0.99)
        fast.load(tmp_path / "images")
        switched(model)
        with pytest.raises(ModelMismatchError, match="other adapters"):
            fast.load(tmp_path / "images")


def test_an_interrupted_fit_goes_on_with_its_adapters_only(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_journal, "EVERY", 0.0)
    model, samples = adapted(qwen), [one(qwen, (seed, seed + 1)) for seed in (0, 2)]
    KVCapsule.fit(model, None, samples, codec="heads", progress=False, resume=tmp_path / "fit")
    switched(model)
    with pytest.raises(CalibrationError, match="another model"):
        KVCapsule.fit(model, None, samples, codec="heads", progress=False, resume=tmp_path / "fit")
