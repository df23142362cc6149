"""Every method on tiny models, inside `enable`."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import capsight
from baselines.conftest import BLOCK, BUDGETED, EVICTING, RUNNABLE, assert_same, greedy, method, mixed_batch
from capsight.baselines import FeaturePCA, SnapKV
from capsight.errors import CapsightError, ModelMismatchError, OptionError
from capsight.kvcapsule import CapsulePlan
from capsight.layout import build_layout
from tiny import FAMILIES

FEW = ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava_onevision", "internvl", "smolvlm"]


@pytest.mark.parametrize("family", FEW)
def test_everything_retained_is_the_full_cache(family):
    vlm = FAMILIES[family]()
    inputs = mixed_batch(vlm)
    full = greedy(vlm.model.generate, **inputs)
    for name in BUDGETED:
        with capsight.enable(vlm.model, capsule=method(name, vlm, 1.0)) as fast:
            cache = fast.encapsulate(**inputs)
            assert_same(greedy(fast.generate, past_key_values=cache, **inputs), full)
            assert_same(greedy(fast.generate, **inputs), full)


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("name", ["uniform", "streaming-llm", "cur"])
def test_what_scores_kept_is_read_as_it_is_or_rebuilt(family, name):
    vlm, found, held = FAMILIES[family](), [], []
    inputs = mixed_batch(vlm)
    for decode in (None, "materialise"):
        with capsight.enable(vlm.model, capsule=method(name, vlm, 0.25), decode=decode) as fast:
            cache = fast.encapsulate(**inputs)
            held.append(cache.nbytes)
            found.append(greedy(fast.generate, past_key_values=cache, **inputs))
            assert fast.decode == (decode or "latent")
    assert_same(*found)
    assert held[0] == held[1]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "smolvlm"])
@pytest.mark.parametrize("retained", [0.25, 0.4])
def test_methods_take_the_same_bytes(family, retained):
    vlm = FAMILIES[family]()
    inputs = mixed_batch(vlm)
    layout = build_layout(inputs, vlm.config)
    plan = CapsulePlan.from_layout(layout.prefix(layout.last_vision_end), BLOCK)
    for name in BUDGETED:
        with capsight.enable(vlm.model, capsule=method(name, vlm, retained)) as fast:
            cache = fast.encapsulate(**inputs)
        exact = plan.real_tokens(cache.get_seq_length()) - plan.capsule_tokens
        tokens = exact + len(plan.runs) * max(round(retained * BLOCK), 1)
        expected = found = one = 0
        for layer in cache.capsule_layers.values():
            _, _, heads, head_dim = layer._packed.shape
            one = 2 * heads * head_dim * 4
            expected += tokens * one
            index = sum(x.nbytes for name, x in layer.payload.tensors.items() if name in ("counts", "kept"))
            found += layer.nbytes - index
            assert index <= len(plan.runs) * one  # positions cost less than a token a block
        assert abs(found - expected) <= len(plan.runs) * len(cache.capsule_layers) * one, name
        if name in EVICTING or name == "merge":
            assert found == expected, name


def test_each_method_changes_the_answer_in_its_own_way(qwen):
    inputs = mixed_batch(qwen)
    first = {"full": greedy(qwen.model.generate, **inputs).logits[0]}
    for name in RUNNABLE:
        with capsight.enable(qwen.model, capsule=method(name, qwen, 0.25)) as fast:
            cache = fast.encapsulate(**inputs)
            first[name] = greedy(fast.generate, past_key_values=cache, **inputs).logits[0]
            assert torch.isfinite(first[name]).all()
            assert cache.nbytes < cache.nbytes_full
    for (a, x), (b, y) in itertools.combinations(first.items(), 2):
        assert (x[:2] - y[:2]).abs().max() > 1e-4, (a, b)
    for name in BUDGETED:  # text-only rows are exact
        torch.testing.assert_close(first[name][2], first["full"][2], atol=1e-4, rtol=0)


# The window of snapkv and vl-cache reaches over what follows the images in the longest row of a batch.
@pytest.mark.parametrize("name", [n for n in BUDGETED if n not in ("snapkv", "vl-cache")])
def test_rows_of_a_batch_are_what_they_are_alone(qwen, name):
    used = method(name, qwen, 0.25)
    both = mixed_batch(qwen)
    alone = qwen.inputs([([qwen.picture(2)], "hi")])
    with capsight.enable(qwen.model, capsule=used) as fast:
        logits = [
            greedy(fast.generate, past_key_values=fast.encapsulate(**inputs), **inputs).logits[0]
            for inputs in (both, alone)
        ]
    torch.testing.assert_close(logits[0][1], logits[1][0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", RUNNABLE)
def test_crop_and_ask_again(qwen, name):
    inputs = qwen.inputs([([qwen.picture(0), qwen.picture(1)], "what is this?")])
    with capsight.enable(qwen.model, capsule=method(name, qwen, 0.25)) as fast:
        cache = fast.encapsulate(**inputs)
        seen = cache.get_seq_length()
        first = greedy(fast.generate, past_key_values=cache, **inputs)
        assert cache.get_seq_length() > inputs["input_ids"].shape[1]
        cache.crop(seen)
        assert cache.get_seq_length() == seen
        assert_same(greedy(fast.generate, past_key_values=cache, **inputs), first)
        with pytest.raises(CapsightError, match="cannot crop"):
            cache.crop(seen - 10)


@pytest.mark.parametrize("name", RUNNABLE)
def test_repeated_rows_answer_alike(qwen, name):
    inputs = qwen.inputs([([qwen.picture(0)], "what is this?")])
    many = {k: v.repeat(3, 1) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    many["mm_token_type_ids"] = inputs["mm_token_type_ids"].repeat(3, 1)
    with capsight.enable(qwen.model, capsule=method(name, qwen, 0.25)) as fast:
        one = greedy(fast.generate, past_key_values=fast.encapsulate(**inputs), **inputs).logits[0]
        cache = fast.encapsulate(**inputs)
        nbytes = cache.nbytes
        cache.batch_repeat_interleave(3)
        assert cache.nbytes == 3 * nbytes
        three = greedy(fast.generate, past_key_values=cache, **many).logits[0]
    torch.testing.assert_close(three, one.expand_as(three), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["cur", "snapkv", "vl-cache", "kvzip", "merge"])
def test_text_only_prompts_are_exact(qwen, name):
    inputs = qwen.inputs([([], "just words"), ([], "and fewer")])
    full = greedy(qwen.model.generate, **inputs)
    with capsight.enable(qwen.model, capsule=method(name, qwen, 0.25)) as fast:
        assert_same(greedy(fast.generate, **inputs), full)


@pytest.mark.parametrize("name", ["cur", "snapkv", "vl-cache"])
def test_protocol_within_leaves_the_first_token_exact(qwen, name):
    inputs = mixed_batch(qwen)
    full = greedy(qwen.model.generate, **inputs)
    with capsight.enable(qwen.model, capsule=method(name, qwen, 0.25)) as fast:
        ours = greedy(fast.generate, **inputs)
        assert fast.cache.nbytes < fast.cache.nbytes_full
    torch.testing.assert_close(ours.logits[0], full.logits[0], atol=1e-4, rtol=0)
    assert not torch.allclose(ours.logits[1], full.logits[1], atol=1e-4)


def test_beams(qwen):
    inputs = mixed_batch(qwen)
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    full = qwen.model.generate(**inputs, **options)
    for retained in (1.0, 0.25):
        with capsight.enable(qwen.model, capsule=SnapKV(retained, BLOCK)) as fast:
            tokens = fast.generate(**inputs, **options)
        assert tokens.shape[0] == full.shape[0]
        if retained == 1:
            assert torch.equal(tokens, full)


def test_kvzip_reads_the_context_twice_also_within_one_call(qwen):
    inputs = mixed_batch(qwen)
    used = method("kvzip", qwen, 0.25)
    with capsight.enable(qwen.model, capsule=used) as fast:
        after = greedy(fast.generate, past_key_values=fast.encapsulate(**inputs), **inputs)
        assert_same(greedy(fast.generate, **inputs), after)


@pytest.mark.parametrize("name", ["cur", "merge", "snapkv", "kvzip"])
def test_outside_enable_a_cache_is_refused(qwen, name):
    inputs = mixed_batch(qwen)
    cache = method(name, qwen, 0.25).cache(inputs, qwen.config)
    with pytest.raises(CapsightError, match="enable"):
        qwen.model.generate(**inputs, past_key_values=cache, max_new_tokens=3)


def test_a_fitted_method_refuses_another_model(qwen):
    other = FAMILIES["qwen2_vl"]()
    with (
        pytest.raises(ModelMismatchError, match="fit"),
        capsight.enable(other.model, capsule=method("feature-pca", qwen, 0.5)),
    ):
        pass


def test_budgets_are_checked(qwen):
    for bad in (0, 1.5):
        with pytest.raises(OptionError, match="fraction"):
            SnapKV(bad)
        with pytest.raises(OptionError, match="fraction"):
            SnapKV().with_retained(bad)
    with pytest.raises(CapsightError, match="no calibration sample"):
        FeaturePCA.fit(qwen.model, None, [qwen.inputs([([], "words")])], progress=False)


def test_bfloat16(qwen):
    model = copy.deepcopy(qwen.model).to(torch.bfloat16)
    inputs = mixed_batch(qwen)
    for name in RUNNABLE:
        with capsight.enable(model, capsule=method(name, qwen, 0.25)) as fast:
            cache = fast.encapsulate(**inputs)
            logits = greedy(fast.generate, past_key_values=cache, **inputs).logits
            assert cache.nbytes < cache.nbytes_full
        assert all(torch.isfinite(step).all() for step in logits)
