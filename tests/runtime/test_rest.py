"""Caches at rest: a few bytes an image, text read anew; what comes back goes on as the cache itself would."""

from __future__ import annotations

import os
from functools import cache

import pytest
import torch

import capsight
from capsight.errors import CapsightError, ModelMismatchError, OptionError
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.rest import read_rest_file
from capsight.kvcapsule.rest.parts import can_reread, open_latents
from capsight.layout import build_layout
from capsight.runtime.text_pass import can_read_text
from tiny import FAMILIES, TinyVLM

from .test_enable import greedy, mixed_batch
from .test_saved import text_after


@cache
def tiny(name: str) -> TinyVLM:
    return FAMILIES[name]()


@cache
def joint(name: str, retained: float = 0.9, seed: int = 90) -> KVCapsule:
    vlm = tiny(name)
    samples = [vlm.inputs([([vlm.picture(s)], "hi")]) for s in (seed, seed + 1)]
    return KVCapsule.fit(vlm.model, vlm.processor, samples, retained, progress=False)


def two_pictures(vlm: TinyVLM, text: str = "what is it?"):
    return vlm.inputs([([vlm.picture(90), vlm.picture(91)], text)])


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_comes_back_from_rest(name, tmp_path):
    vlm, capsule, path = tiny(name), joint(name), tmp_path / "images"
    inputs = two_pictures(vlm)
    cut = build_layout(inputs, vlm.config).last_vision_end
    question = text_after(inputs, vlm, cut, "and what colour is it?")
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        held = fast.encapsulate(**inputs)
        before = {i: layer._packed.clone() for i, layer in held.capsule_layers.items()}
        fast.save(path, quality=0.999)
        kept, nbytes = open_latents(held, next(iter(capsule.codecs.values()))), held.nbytes
        direct = greedy(fast.generate, past_key_values=held, **question)
        again = fast.load(path)
        assert (again.get_seq_length(), again.nbytes) == (cut, nbytes)
        z = open_latents(again, next(iter(capsule.codecs.values())))
        assert float((z - kept).norm() / kept.norm()) < 0.25  # packed in fewer bits a second time
        for index, layer in again.capsule_layers.items():
            error = (layer._packed - before[index]).norm() / before[index].norm()
            assert error < 0.3, (index, error)  # text saw latents where it had seen exact images
        loaded = greedy(fast.generate, past_key_values=again, **question)
    told = read_rest_file(path)
    ids = inputs["input_ids"][:, :cut]
    alone = can_read_text(vlm.config) and can_reread(told.layout, ids)
    assert (told.text == 0) == alone
    assert len(told.images) == 2
    assert loaded.sequences.shape == direct.sequences.shape


def test_text_is_read_as_in_a_prefill_over_the_same_latents(tmp_path):
    """With next to nothing lost, text anew is text as it was, at every layer and position."""
    vlm, capsule = tiny("qwen2_5_vl"), joint("qwen2_5_vl", 0.99)
    inputs = two_pictures(vlm)
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        held = fast.encapsulate(**inputs)
        before = [layer._packed.clone() for layer in held.capsule_layers.values()]
        fast.save(tmp_path / "x", quality=1 - 1e-7)
        again = fast.load(tmp_path / "x")
        for layer, old in zip(again.capsule_layers.values(), before, strict=True):
            assert float((layer._packed - old).norm() / old.norm()) < 0.03


def test_fewer_bits_stay_fewer_and_bytes_follow_quality(tmp_path):
    vlm, capsule = tiny("qwen2_5_vl"), joint("qwen2_5_vl")
    inputs = two_pictures(vlm)
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        fast.encapsulate(**inputs)
        sizes = []
        for quality in (0.99, 0.9, 0.5):
            fast.save(tmp_path / "x", quality=quality)
            sizes.append(read_rest_file(tmp_path / "x").nbytes)
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    for retained in (0.9, 0.3):
        less = capsule.with_retained(retained)
        with capsight.enable(vlm.model, capsule=less) as fast:
            payload = next(iter(fast.load(tmp_path / "x").capsule_layers.values())).payload
            assert payload.nbytes == 128 * less.codecs[0].levels.nbytes


def test_a_size_is_kept_to_with_the_best_quality_that_fits(tmp_path):
    vlm, capsule, path = tiny("qwen2_5_vl"), joint("qwen2_5_vl"), tmp_path / "x"
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        fast.encapsulate(**two_pictures(vlm))
        fast.save(path, quality=0.9)
        known = path.stat().st_size
        qualities = []
        for nbytes in (known // 2, known, 2 * known, 10**9):
            fast.save(path, bytes=nbytes)
            about = read_rest_file(path)
            assert 0.9 * min(nbytes, about.nbytes) <= about.nbytes == path.stat().st_size <= nbytes
            qualities.append(about.quality)
            fast.load(path)
        assert sorted(set(qualities)) == qualities
        assert qualities[1] > 0.88
        before = path.read_bytes()
        for refused in ({"bytes": 99}, {"bytes": 0}, {"bytes": 2.5}, {"bytes": 9**9, "quality": 0.9}):
            with pytest.raises(OptionError, match="bytes"):
                fast.save(path, **refused)
        assert path.read_bytes() == before


def test_a_batch_with_answers_keeps_its_text(tmp_path):
    vlm, capsule = tiny("qwen2_5_vl"), joint("qwen2_5_vl")
    inputs = mixed_batch(vlm)
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        fast.generate(**inputs, max_new_tokens=3, do_sample=False)
        held = fast.cache
        fast.save(tmp_path / "x", quality=0.9)
        again = fast.load(tmp_path / "x")
        assert again.get_seq_length() == held.get_seq_length()
        for a, b in zip(again.capsule_layers.values(), held.capsule_layers.values(), strict=True):
            assert torch.equal(a._packed, b._packed)
            assert torch.equal(a._tail, b._tail)


def test_beams_are_not_saved_and_what_was_cropped_is(tmp_path):
    vlm, capsule = tiny("qwen2_5_vl"), joint("qwen2_5_vl")
    inputs = two_pictures(vlm)
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        fast.generate(**inputs, max_new_tokens=3, num_beams=2)
        with pytest.raises(CapsightError, match="beams"):
            fast.save(tmp_path / "x", quality=0.9)
        fast.cache.crop(inputs["input_ids"].shape[1])
        fast.save(tmp_path / "x", quality=0.9)
        assert fast.load(tmp_path / "x").get_seq_length() == inputs["input_ids"].shape[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    vlm, capsule = tiny("qwen2_5_vl"), joint("qwen2_5_vl")
    path = tmp_path_factory.mktemp("rest") / "x"
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        fast.encapsulate(**two_pictures(vlm))
        fast.save(path, quality=0.9)
    return path, vlm, capsule


def test_other_models_capsules_and_dtypes_are_refused(saved):
    path, vlm, _ = saved
    with (
        capsight.enable(vlm.model, capsule=joint("qwen2_5_vl", seed=80)) as fast,
        pytest.raises(ModelMismatchError, match="another capsule"),
    ):
        fast.load(path)
    other = tiny("qwen2_vl")
    with (
        capsight.enable(other.model, capsule=joint("qwen2_vl")) as fast,
        pytest.raises(ModelMismatchError, match="another model"),
    ):
        fast.load(path)


@pytest.mark.parametrize("quality", [0, 1, -1, 2, True, "high", float("nan")])
def test_qualities_that_are_none_are_refused(saved, tmp_path, quality):
    _, vlm, capsule = saved
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        fast.encapsulate(**two_pictures(vlm))
        with pytest.raises(OptionError, match="quality"):
            fast.save(tmp_path / "x", quality=quality)
    assert not os.listdir(tmp_path)


def test_without_the_coder_the_error_names_the_extra(saved, monkeypatch, tmp_path):
    path, vlm, capsule = saved
    monkeypatch.setitem(__import__("sys").modules, "constriction", None)
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        with pytest.raises(OptionError, match=r"capsight\[rest\]"):
            fast.load(path)
        fast.encapsulate(**two_pictures(vlm))
        with pytest.raises(OptionError, match=r"capsight\[rest\]"):
            fast.save(tmp_path / "x", quality=0.9)


def test_other_codecs_have_no_quality(tmp_path):
    vlm = tiny("qwen2_5_vl")
    samples = [vlm.inputs([([vlm.picture(s)], "hi")]) for s in (90, 91)]
    heads = KVCapsule.fit(vlm.model, vlm.processor, samples, codec="heads", block_size=16, progress=False)
    with capsight.enable(vlm.model, capsule=heads) as fast:
        fast.encapsulate(**two_pictures(vlm))
        with pytest.raises(OptionError, match="joint"):
            fast.save(tmp_path / "x", quality=0.9)
