"""Saved caches: what comes back goes on as if it had never been away, or is refused."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from safetensors.torch import save_file

import capsight
from capsight.errors import CapsightError, CapsuleFileError, LayoutError, ModelMismatchError, OptionError
from capsight.layout import build_layout
from tiny import CACHES, FAMILIES, in_turn

from .conftest import fitted
from .test_enable import greedy, mixed_batch


def text_after(inputs, vlm, cut, text):
    """The first `cut` tokens of `inputs` with another question after them; no pixels."""
    ids = torch.tensor([vlm.processor.tokenizer(text, add_special_tokens=False)["input_ids"]])
    mask = inputs["attention_mask"][:, :cut]
    return {
        "input_ids": torch.cat([inputs["input_ids"][:, :cut], ids.expand(len(mask), -1)], 1),
        "attention_mask": torch.cat([mask, mask.new_ones(len(mask), ids.shape[1])], 1),
    }


@in_turn("codec,bits", [("heads", 8), ("adaptive", None), ("adaptive", 4)], CACHES)
def test_a_loaded_cache_goes_on_with_the_same_logits(vlm, tmp_path, codec, bits):
    inputs = mixed_batch(vlm)  # left padding, and a row of text alone
    capsule = fitted(vlm.name, 0.4, codec).with_bits(bits)
    cut = build_layout(inputs, vlm.config).last_vision_end
    question = text_after(inputs, vlm, cut, "and what colour is it?")
    path = tmp_path / "images.safetensors"
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        fast.encapsulate(**inputs)
        fast.save(path)
        kept = fast.cache.nbytes
        direct = [greedy(fast.generate, past_key_values=fast.cache, **inputs)]
        fast.save(tmp_path / "turn.safetensors")
        fast.encapsulate(**inputs)
        direct.append(greedy(fast.generate, past_key_values=fast.cache, **question))
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        fast.generate(**vlm.inputs([([vlm.picture(7)], "another conversation")]), max_new_tokens=1)
        cache = fast.load(path)
        assert cache.nbytes == kept
        assert cache.get_seq_length() == cut
        loaded = [greedy(fast.generate, past_key_values=cache, **inputs)]
        loaded.append(greedy(fast.generate, past_key_values=fast.load(path), **question))
        turn = fast.load(tmp_path / "turn.safetensors")
        assert turn.get_seq_length() == cache.get_seq_length()
    for a, b in zip(loaded, direct, strict=True):
        assert torch.equal(a.sequences, b.sequences)
        assert all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))


@pytest.mark.parametrize("codec", ["heads", "adaptive"])
def test_a_later_turn_goes_on_after_loading(qwen, tmp_path, codec):
    inputs = mixed_batch(qwen)
    capsule = fitted("qwen2_5_vl", 0.4, codec)
    results = []
    for save in (False, True):
        with capsight.enable(qwen.model, capsule=capsule) as fast:
            tokens = fast.generate(**inputs, max_new_tokens=4, do_sample=False)
            if save:
                fast.save(tmp_path / "x")
        with capsight.enable(qwen.model, capsule=capsule) as again:
            fast = again if save else fast
            cache = fast.load(tmp_path / "x") if save else fast.cache
            grown = inputs | {"attention_mask": inputs["attention_mask"].new_ones(tokens.shape)}
            grown["attention_mask"][:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
            grown["input_ids"] = tokens
            later = text_after(grown, qwen, tokens.shape[1], "why?")
            results.append(greedy(fast.generate, past_key_values=cache, **later))
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert all(torch.equal(x, y) for x, y in zip(results[0].logits, results[1].logits, strict=True))


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("codec", ["heads", "adaptive"])
def test_a_cache_saved_by_one_decode_serves_the_other(qwen, tmp_path, codec, bits):
    inputs, found = mixed_batch(qwen), {}
    capsule = fitted("qwen2_5_vl", 0.4, codec).with_bits(bits)
    for decode in ("latent", "materialise"):
        with capsight.enable(qwen.model, capsule=capsule, decode=decode) as fast:
            fast.encapsulate(**inputs)
            fast.save(tmp_path / decode)
            found["direct", decode] = greedy(fast.generate, past_key_values=fast.cache, **inputs)
    for decode in ("latent", "materialise"):
        with capsight.enable(qwen.model, capsule=capsule, decode=decode) as fast:
            for source in ("latent", "materialise"):
                found[source, decode] = greedy(
                    fast.generate, past_key_values=fast.load(tmp_path / source), **inputs
                )
    for decode in ("latent", "materialise"):
        assert torch.equal(found["direct", decode].logits[0], found[decode, decode].logits[0])
        other = found["materialise" if decode == "latent" else "latent", decode]
        torch.testing.assert_close(other.logits[0], found[decode, decode].logits[0], atol=2e-2, rtol=0)


@pytest.mark.parametrize("codec", ["heads", "adaptive"])
def test_text_alone_and_repeated_rows(qwen, tmp_path, codec):
    capsule = fitted("qwen2_5_vl", 0.4, codec)
    with capsight.enable(qwen.model, capsule=capsule) as fast:
        words = qwen.inputs([([], "just words"), ([], "few")])
        cache = fast.encapsulate(**{k: v[:, :8] for k, v in words.items()})
        fast.save(tmp_path / "words")
        a = greedy(fast.generate, past_key_values=cache, **words)
        b = greedy(fast.generate, past_key_values=fast.load(tmp_path / "words"), **words)
        assert torch.equal(a.logits[0], b.logits[0])
        one = qwen.inputs([([qwen.picture(0)], "hi")])
        cache = fast.encapsulate(**one)
        cache.batch_repeat_interleave(2)
        fast.save(tmp_path / "two")
        two = {k: torch.cat([v, v]) for k, v in one.items()}
        a = greedy(fast.generate, past_key_values=cache, **two)
        b = greedy(fast.generate, past_key_values=fast.load(tmp_path / "two"), **two)
        assert torch.equal(a.logits[0], b.logits[0])


@pytest.mark.parametrize("codec", ["heads", "adaptive"])
@pytest.mark.parametrize("rows", [[1, 0, 2], [2, 1], [0, 0, 1, 2]])
def test_rows_that_have_moved_go_on_and_are_saved(qwen, tmp_path, rows, codec):
    """Prompt and M-RoPE offset move with the rows; the rows have different ones of both."""
    inputs = mixed_batch(qwen)
    cut = build_layout(inputs, qwen.config).last_vision_end
    asked = text_after(inputs, qwen, cut, "and what colour is it?")
    moved = {name: value[rows] for name, value in asked.items()}
    with capsight.enable(qwen.model, capsule=fitted("qwen2_5_vl", 0.4, codec)) as fast:
        fast.encapsulate(**inputs)
        expected = greedy(fast.generate, past_key_values=fast.cache, **asked)
        fast.encapsulate(**inputs)
        fast.cache.reorder_cache(torch.tensor(rows)) if len(rows) == 3 else (
            fast.cache.batch_select_indices(torch.tensor(rows))
        )
        assert torch.equal(fast.prompt_ids, inputs["input_ids"][rows, :cut])
        fast.save(tmp_path / "x")
        if rows == [1, 0, 2]:
            with pytest.raises(LayoutError, match="another prompt"):
                fast.generate(past_key_values=fast.cache, **asked, max_new_tokens=1)
        for cache in (fast.cache, fast.load(tmp_path / "x")):
            ours = greedy(fast.generate, past_key_values=cache, **moved)
            for logits, of_all in zip(ours.logits, expected.logits, strict=True):
                torch.testing.assert_close(logits, of_all[rows], atol=1e-4, rtol=0)


@pytest.fixture
def saved(qwen, tmp_path):
    """A saved cache, the capsule that made it, and its prompt."""
    inputs = qwen.inputs([([qwen.picture(1)], "what"), ([qwen.picture(2)], "what is it")])
    capsule = fitted("qwen2_5_vl", 0.4)
    with capsight.enable(qwen.model, capsule=capsule) as fast:
        fast.encapsulate(**inputs)
        fast.save(tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors", capsule, inputs


def test_another_capsule_model_or_dtype_is_refused(qwen, saved):
    path, capsule, _ = saved
    for other in (
        capsule.with_retained(0.5),
        capsule.with_bits(8),
        capsule.with_codec("evict"),
        capsule.with_codec("adaptive"),
    ):
        with (
            capsight.enable(qwen.model, capsule=other) as fast,
            pytest.raises(ModelMismatchError, match=r"another capsule \(heads, 0.406"),
        ):
            fast.load(path)
    vl = FAMILIES["qwen2_vl"]()
    with (
        capsight.enable(vl.model, capsule=fitted("qwen2_vl", 0.4)) as fast,
        pytest.raises(ModelMismatchError, match="another model"),
    ):
        fast.load(path)
    half = copy.deepcopy(qwen.model).to(torch.bfloat16)
    with capsight.enable(half, capsule=capsule) as fast, pytest.raises(ModelMismatchError, match="bfloat16"):
        fast.load(path)


def test_another_prompt_or_other_images_are_refused(qwen, saved):
    path, capsule, inputs = saved
    with capsight.enable(qwen.model, capsule=capsule) as fast:
        wrong = dict(inputs)
        wrong["input_ids"] = inputs["input_ids"].flip(0)
        with pytest.raises(LayoutError, match="another prompt: token"):
            fast.generate(past_key_values=fast.load(path), **wrong, max_new_tokens=1)
        wrong = dict(inputs)
        wrong["pixel_values"] = inputs["pixel_values"] + 1
        with pytest.raises(LayoutError, match="other images"):
            fast.generate(past_key_values=fast.load(path), **wrong, max_new_tokens=1)
        wrong.pop("pixel_values")
        fast.generate(past_key_values=fast.load(path), **wrong, max_new_tokens=1)


def test_what_cannot_be_saved_or_loaded_says_so(qwen, saved, tmp_path):
    path, capsule, inputs = saved
    with capsight.enable(qwen.model) as fast:
        fast.encapsulate(**inputs)
        for action in (fast.save, fast.load):
            with pytest.raises(OptionError, match="KVCapsule"):
                action(path)
    with capsight.enable(qwen.model, capsule=capsule) as fast:
        with pytest.raises(OptionError, match="KVCapsule"):
            fast.save(path)
        fast.cache = capsule.cache(inputs)
        with pytest.raises(CapsightError, match="encapsulate"):
            fast.save(path)
        fast.encapsulate(**inputs)
        next(iter(fast.cache.capsule_layers.values()))._packed[0, 0, 0, 0] = float("nan")
        with pytest.raises(CapsightError, match="NaN"):
            fast.save(tmp_path / "nan")
        fast.encapsulate(**inputs)
        with pytest.raises(CapsuleFileError, match="cannot write"):
            fast.save(tmp_path / "no" / "such" / "folder")
        for missing in (tmp_path / "nothing", tmp_path):
            with pytest.raises(CapsuleFileError):
                fast.load(missing)
        save_file({"a": torch.zeros(1)}, tmp_path / "other")
        with pytest.raises(CapsuleFileError, match="not a saved"):
            fast.load(tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "x.safetensors"]


@pytest.mark.parametrize("step", ["os.replace", "os.fsync", "capsight.kvcapsule.cache_file.save_file"])
def test_a_full_disk_loses_nothing(qwen, saved, monkeypatch, step):
    path, capsule, inputs = saved
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with capsight.enable(qwen.model, capsule=capsule) as fast:
        fast.generate(**inputs, max_new_tokens=3)
        with monkeypatch.context() as patch:
            patch.setattr(step, full)
            with pytest.raises(CapsuleFileError, match=r"No space left.*unharmed"):
                fast.save(path)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]
        fast.save(path)
        assert path.read_bytes() != before
        assert fast.load(path).get_seq_length() > 3
