"""What would go past `enable`, or takes a part of a model for the whole: right all the same, or told."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

import capsight
from capsight import BlindSight, KVCapsule
from capsight.cache_argument import CACHE
from capsight.errors import CapsightError, OptionError, UnsupportedModelError
from tiny import CACHES, FAMILIES, in_turn

from .conftest import few, fitted
from .test_conversations import one
from .test_enable import assert_same, greedy, mixed_batch


@in_turn("codec", ["joint", "heads", "adaptive"], CACHES)
def test_generate_of_the_class_uses_the_capsule_or_says_whose_it_is(vlm, codec):
    inputs, bound = mixed_batch(vlm), vlm.model.generate
    full = greedy(bound, **inputs)
    with capsight.enable(vlm.model, capsule=fitted(vlm.name, 1.0, codec)):
        for generate in (bound, lambda **given: type(vlm.model).generate(vlm.model, **given)):
            ours, refusal = attempt(generate, inputs)
            if refusal:
                assert "that of its class" in refusal
                continue
            assert_same(ours, full)
            assert getattr(ours, CACHE).nbytes_full > 0


def attempt(generate, inputs):
    try:
        return greedy(generate, **inputs), ""
    except CapsightError as error:
        return None, str(error)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    ("name", "way"), [*((name, copy.deepcopy) for name in CACHES), ("qwen2_5_vl", by_pickle)]
)
def test_a_copy_made_inside_is_not_enabled_and_has_the_models_own_attention(name, way):
    vlm = FAMILIES[name]()
    model, inputs, capsule = type(vlm.model)(copy.deepcopy(vlm.config)), one(vlm), fitted(name, 0.4)
    model.eval().load_state_dict(vlm.model.state_dict())
    model.set_attn_implementation("eager")
    full = greedy(model.generate, **inputs)
    with capsight.enable(model, capsule=capsule, decode="latent") as fast:
        lossy, twin = greedy(fast.generate, **inputs), way(model)
        assert_same(greedy(twin.generate, **inputs), full)
    for _ in range(2):
        assert twin.config.get_text_config()._attn_implementation == "eager"
        assert_same(greedy(twin.generate, **inputs), full)
        with capsight.enable(twin, capsule=capsule, decode="latent") as fast:
            for generate in (fast.generate, twin.generate):
                assert_same(greedy(generate, **inputs), lossy)


@few
def test_continuous_batching_is_refused_inside_alone(vlm):
    for method in ("generate_batch", "init_continuous_batching"):
        with (
            capsight.enable(vlm.model, capsule=fitted(vlm.name, 0.4)),
            pytest.raises(UnsupportedModelError, match="continuous batching"),
        ):
            getattr(vlm.model, method)([[5, 6, 7]])
        assert method not in vars(vlm.model)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "lfm3_vl"])
def test_attention_weights_are_the_models_own_or_refused(name):
    vlm = FAMILIES[name]()
    model, inputs = copy.deepcopy(vlm.model), one(vlm)
    model.set_attn_implementation("eager")
    asked = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    full = model.generate(**inputs, **asked)
    for codec, decode in (("joint", "latent"), ("heads", "materialise")):
        with capsight.enable(model, capsule=fitted(name, 1.0, codec), decode=decode) as fast:
            for call in (fast.generate, model.generate):
                with pytest.raises(OptionError, match="output_attentions"):
                    call(**inputs, **asked)
            with pytest.raises(OptionError, match="output_attentions"):
                model(**inputs, output_attentions=True)
    with capsight.enable(model, capsule=fitted(name, 1.0, "joint"), decode="materialise") as fast:
        ours = fast.generate(**inputs, **asked)
    for a, b in zip(ours.attentions, full.attentions, strict=True):
        torch.testing.assert_close(a[-1], b[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("codec", ["heads", "evict"])
@pytest.mark.parametrize("name", ["gemma3", "internvl", "cohere2_vision"])
def test_a_pass_of_its_own_inside_generate_hides_nothing(name, codec):
    """Guidance runs the model without the images, over a cache of its own."""
    vlm = FAMILIES[name]()
    inputs, capsule, said = one(vlm), fitted(name, 0.4, "heads").with_codec(codec), []
    for decode in ("materialise", "latent"):
        with capsight.enable(vlm.model, capsule=capsule, decode=decode) as fast:
            said.append(greedy(fast.generate, **inputs, guidance_scale=1.5))
    assert_same(*said)


@few
def test_a_model_that_trains_answers_as_ever_or_is_refused_where_it_keeps_nothing(vlm):
    """transformers 5.24 drops the cache only where there are gradients; earlier ones in all training."""
    model = copy.deepcopy(vlm.model)
    if not model.supports_gradient_checkpointing:
        pytest.skip("it has no gradient checkpointing")
    inputs, capsule = one(vlm), fitted(vlm.name, 0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with capsight.enable(model, capsule=capsule) as fast:
            right = greedy(fast.generate, **inputs)
        model.gradient_checkpointing_enable()
        model.train()
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
        with capsight.enable(model, capsule=capsule) as fast:
            if cache is not None and cache.get_seq_length():
                assert_same(greedy(fast.generate, **inputs), right)
                return
            for call in (fast.generate, fast.encapsulate):
                with pytest.raises(CapsightError, match=r"model\.eval"):
                    call(**inputs)


def wrong_models():
    vlm = FAMILIES["qwen2_5_vl"]()
    return {
        "pass its .module": torch.nn.DataParallel(vlm.model),
        "language head": vlm.model.model,
        "without the language": vlm.model.get_decoder(),
        "None is no": None,
        "'Qwen/x' is no": "Qwen/x",
        "Linear is no": torch.nn.Linear(2, 2),
    }


@pytest.mark.parametrize("words", wrong_models())
def test_what_is_no_whole_model_is_told_everywhere(qwen, words):
    model, capsule, samples = wrong_models()[words], fitted("qwen2_5_vl", 0.4), [one(qwen)]
    calls = (
        lambda: KVCapsule.fit(model, None, samples, progress=False),
        lambda: BlindSight.calibrate(model, None, samples, progress=False),
        lambda: capsule.check_model(model),
        lambda: capsight.enable(model).__enter__(),
        lambda: capsight.enable(model, capsule=capsule).__enter__(),
    )
    for call in calls:
        with pytest.raises(UnsupportedModelError) as caught:
            call()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
