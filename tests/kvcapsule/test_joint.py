"""The joint codec: bits, rotations, and caches of every family against a plain reference."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from capsight import enable
from capsight.errors import CalibrationError, OptionError, UnlikeCalibrationWarning
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.codecs.joint import JointCodec
from capsight.kvcapsule.codecs.levels import pack, unpack
from capsight.kvcapsule.codecs.rotary import Rotary, as_turned_by, find_rotary
from capsight.kvcapsule.codecs.rotary import _frequencies as frequencies_of
from capsight.layout import build_layout
from capsight.layout.positions import rope_positions
from kvcapsule.conftest import few, fitted
from kvcapsule.test_generate import asked, assert_same, batch, full_cache, later_turn, run
from tiny import FAMILIES, TinyVLM


def vision_kv(vlm: TinyVLM, inputs: Any) -> tuple[DynamicCache, torch.Tensor]:
    """The full cache of a batch, and which tokens are vision: bool [B, S]."""
    cache, layout = full_cache(vlm), build_layout(inputs, vlm.config)
    run(vlm, inputs, cache, max_new_tokens=1)
    seen = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    for index, row in enumerate(layout.rows):
        for block in row.blocks:
            seen[index, block.start : block.end] = True
    return cache, seen


def test_one_picture_twice_has_the_same_keys_before_rope(vlm):
    """In the first layer a token's key before RoPE depends on the token alone, wherever it stands."""
    picture = vlm.picture(3)
    inputs = vlm.inputs([([picture, picture], "hi")])
    cache, _ = vision_kv(vlm, inputs)
    layers = [i for i, layer in enumerate(cache.layers) if type(layer).__name__ == "DynamicLayer"]
    rotary = find_rotary(vlm.model, layers)
    positions = rope_positions(build_layout(inputs, vlm.config), vlm.config)[:, 0]
    blocks = build_layout(inputs, vlm.config).rows[0].blocks
    half = len(blocks) // 2
    embeds = [sum(b.end - b.start for b in part) for part in (blocks[:half], blocks[half:])]
    assert embeds[0] == embeds[1]
    if layers[0] != 0:
        return  # the first layer is another kind: tokens have seen each other
    plain = rotary.unturn(cache.layers[0].keys[0].float(), *rotary.tables(positions))
    first, second = (
        torch.cat([plain[:, b.start : b.end] for b in part], 1) for part in (blocks[:half], blocks[half:])
    )
    torch.testing.assert_close(first, second, atol=2e-4, rtol=1e-3)


def axes_of(codec: JointCodec) -> torch.Tensor:
    """The axes that get bits, float64 [R, 2, H, D]."""
    return codec.axes.double() * codec.steps.double().T[:, :, None, None]


@few
def test_retaining_everything_is_the_full_cache(vlm):
    inputs = batch(vlm)
    cache = fitted(vlm, 1.0, codec="joint").cache(inputs)
    assert_same(run(vlm, inputs, full_cache(vlm)), run(vlm, inputs, cache))


def test_what_is_rebuilt_is_mean_and_axes(vlm):
    """Keys and values of vision tokens against float64 formulas on the full cache; all others exact."""
    inputs, capsule = batch(vlm), fitted(vlm, 0.9, codec="joint")
    full, seen = vision_kv(vlm, inputs)
    cache = capsule.cache(inputs)
    run(vlm, inputs, cache, max_new_tokens=1)
    places = rope_positions(build_layout(inputs, vlm.config), vlm.config)[:, seen]
    codecs = {i: codec for i, codec in capsule.codecs.items() if isinstance(codec, JointCodec)}
    z: Any = 0
    for i, codec in codecs.items():
        turn = codec.rotary.tables(places)
        k = codec.rotary.unturn(full.layers[i].keys.transpose(1, 2)[seen].transpose(0, 1), *turn).transpose(
            0, 1
        )
        x = torch.stack((k, full.layers[i].values.transpose(1, 2)[seen]), 1) - codec.mean
        x = x.double() * codec.weight.double().view(2, 1, 1) ** 2
        z = z + torch.einsum("tkhd,rkhd->tr", x, axes_of(codec))
    first = next(iter(codecs.values()))
    z = unpack(*pack(z.float(), first.levels), first.levels, torch.float32).double()
    some = next(iter(cache.capsule_layers))
    empty = full.layers[some].keys[:, :, :0]
    for i, codec in codecs.items():
        keys, values = cache.layers[i]._rebuilt(cache.layers[i].placement, empty, empty)
        x = torch.einsum("tr,rkhd->tkhd", z, axes_of(codec)) + codec.mean
        k = codec.rotary.turn(x[:, 0].float().transpose(0, 1), *codec.rotary.tables(places)).transpose(0, 1)
        close = {"atol": 0.1, "rtol": 0.02}  # products in bfloat16: some codes may be the next
        torch.testing.assert_close(keys.transpose(1, 2)[seen], k, **close)
        torch.testing.assert_close(values.transpose(1, 2)[seen], x[:, 1].float(), **close)
        real = ~seen & inputs["attention_mask"].bool()
        torch.testing.assert_close(keys.transpose(1, 2)[real], full.layers[i].keys.transpose(1, 2)[real])


def test_layers_share_one_latent_whatever_happens_to_rows(qwen):
    inputs = batch(qwen)
    cache = fitted(qwen, 0.5, codec="joint").cache(inputs)
    run(qwen, inputs, cache, max_new_tokens=1)
    once = cache.nbytes

    def latents(c: Any) -> Any:
        held = {id(layer.payload): layer.payload for layer in c.capsule_layers.values()}
        assert len(held) == 1
        return next(iter(held.values()))

    before = latents(cache).tensors["codes"]
    copied = deepcopy(cache)
    assert torch.equal(latents(copied).tensors["codes"], before)
    copied.batch_repeat_interleave(2)
    assert len(latents(copied).tensors["codes"]) == 2 * len(before)
    assert copied.nbytes < 2.1 * once
    copied.batch_select_indices(torch.tensor([0, 2, 4]))
    assert torch.equal(latents(copied).tensors["codes"], before)


@few
def test_ask_crop_ask_save_and_load(vlm, tmp_path):
    inputs = batch(vlm)
    with enable(vlm.model, capsule=fitted(vlm, 0.6, codec="joint")) as fast:
        held = fast.encapsulate(**inputs)
        fast.save(tmp_path / "images.safetensors")
        copied = deepcopy(held)
        length = held.get_seq_length()
        first = fast.generate(past_key_values=held, **inputs, max_new_tokens=4, do_sample=False)
        if not any("sliding" in type(layer).__name__.lower() for layer in held.layers):
            held.crop(length)
            again = fast.generate(past_key_values=held, **inputs, max_new_tokens=4, do_sample=False)
            assert torch.equal(first, again)
        loaded = fast.load(tmp_path / "images.safetensors")
        assert loaded.nbytes == copied.nbytes
        assert torch.equal(
            first, fast.generate(past_key_values=loaded, **inputs, max_new_tokens=4, do_sample=False)
        )


def test_a_later_turn_goes_on(qwen):
    inputs = batch(qwen)
    full, cache = full_cache(qwen), fitted(qwen, 1.0, codec="joint").cache(inputs)
    first = run(qwen, inputs, full, min_new_tokens=4)
    assert_same(first, run(qwen, inputs, cache, min_new_tokens=4))
    again = later_turn(asked(qwen, first.sequences, "and now?"), inputs)
    assert_same(run(qwen, again, full), run(qwen, again, cache))


def test_fractions_bits_budgets_and_options(qwen, tmp_path):
    capsule = fitted(qwen, 0.5, codec="joint")
    assert capsule.with_retained(0.25).retained <= 0.25 < capsule.retained <= 0.5
    capsule.with_retained(0.25).save_pretrained(tmp_path)
    loaded = KVCapsule.from_pretrained(tmp_path)
    assert loaded.retained == capsule.with_retained(0.25).retained
    assert torch.equal(loaded.whole_codecs()[0].whole()["axes"], capsule.codecs[0].whole()["axes"])
    for refused in (
        lambda: capsule.with_bits(4),
        lambda: capsule.with_budget("water-filled"),
        lambda: capsule.with_codec("heads"),
        lambda: capsule.with_retained(0.0),
        lambda: capsule.with_retained(1e-4),
        lambda: fitted(qwen, codec="joint", rank=0),
        lambda: fitted(qwen, codec="joint", ridge=0.1),
        lambda: fitted(qwen, 1.5, codec="joint"),
    ):
        with pytest.raises(OptionError):
            refused()
    with pytest.raises(CalibrationError, match="image"):
        KVCapsule.fit(qwen.model, None, [qwen.inputs([([], "hi")])], codec="joint", progress=False)


def test_images_unlike_calibration_are_named(qwen):
    capsule = fitted(qwen, 0.9, codec="joint", rank=32)
    codec = capsule.codecs[0]
    codec.typical.fill_(1e-4)
    inputs = qwen.inputs([([qwen.picture(7)], "hi")])
    with pytest.warns(UnlikeCalibrationWarning, match="unlike"):
        run(qwen, inputs, capsule.cache(inputs), max_new_tokens=1)


def test_keys_of_a_cast_model_are_turned_back_as_it_turned_them(qwen):
    capsule = fitted(qwen, 0.4, codec="joint")
    before = {index: codec.rotary for index, codec in capsule.codecs.items()}
    with enable(qwen.model, capsule=capsule) as fast:
        assert fast.capsule is capsule
    cast = deepcopy(qwen.model).to(torch.bfloat16)
    rounded = cast.get_decoder().rotary_emb.inv_freq
    assert rounded.dtype == torch.bfloat16
    assert not torch.equal(rounded.double(), before[0].frequencies)
    with enable(cast, capsule=capsule) as fast:
        cache = fast.new_cache(batch(qwen))
    for layer in cache.capsule_layers.values():
        assert torch.equal(layer.codec.rotary.frequencies, rounded.double())
    assert {index: codec.rotary for index, codec in capsule.codecs.items()} == before
    rounded.mul_(1.5)  # RoPE that grows with the prompt has others for long ones, too
    assert as_turned_by(cast, before[0]) is before[0]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_is_turned_by_the_frequencies_that_a_cast_leaves(name):
    model = FAMILIES[name]().model
    frequencies, scaling = frequencies_of(model.get_decoder())
    rotary = Rotary(frequencies, torch.zeros(len(frequencies)).long(), False, scaling)
    assert as_turned_by(model, rotary) is rotary
    for dtype in (torch.bfloat16, torch.float16):
        cast = deepcopy(model).to(dtype)
        rounded, _ = frequencies_of(cast.get_decoder())
        assert not torch.equal(rounded, frequencies)
        assert torch.equal(as_turned_by(cast, rotary).frequencies, rounded)
