"""Layers that keep different counts: measured, cached, decoded, saved, quantised."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import capsight
from capsight.errors import CapsuleFileError, OptionError
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.budget import LayerNeeds, measured_counts
from capsight.kvcapsule.calibration.block_sample import BlockSample, relative_error
from capsight.kvcapsule.calibration.vision_attention import VisionAttention
from capsight.kvcapsule.codecs import AdaptiveCodec
from capsight.layout import build_layout
from kvcapsule.conftest import BLOCK, blocks, codec, fitted
from kvcapsule.test_generate import batch, full_cache, run
from kvcapsule.test_store import edit_header


def uneven(capsule: KVCapsule) -> KVCapsule:
    """The capsule with all that is to be given away in its last layer: 1, 1 and 16 of 16 tokens."""
    needs = LayerNeeds((8,), ((0.5,),) * 3, (0.1, 0.2, 0.3))
    return KVCapsule(capsule.codecs, replace(capsule.info, needs=needs)).with_budget("water-filled")


def kept(capsule: KVCapsule) -> list[int]:
    assert [layer.kept for layer in capsule.info.layers] == [c.kept for c in capsule.codecs.values()]
    return [layer.kept for layer in capsule.info.layers]


def test_a_fit_measures_what_layers_need_and_shares_out_any_average(qwen):
    uniform, filled = fitted(qwen), fitted(qwen, budget="water-filled")
    needs = uniform.info.needs
    assert needs == filled.info.needs
    assert needs.kept == measured_counts(BLOCK)
    assert all(0 < share < 1 for share in needs.attention)
    assert all(1 > row[0] > row[-1] > 0 for row in needs.errors)
    assert kept(uniform) == [6] * 3
    assert kept(filled) == list(needs.share_out(6, BLOCK))
    assert filled.retained == uniform.retained
    assert filled.with_budget("uniform").info == uniform.info
    assert uniform.with_budget("water-filled").info == filled.info
    assert sum(kept(filled.with_retained(0.75))) == 3 * 12
    assert filled.with_codec("evict").info == fitted(qwen, codec="evict", budget="water-filled").info
    assert fitted(qwen, weights="stored").info.needs == needs


def test_errors_are_those_of_the_codecs_on_blocks_of_the_pass(qwen):
    samples = [qwen.inputs([([qwen.picture(seed)], "hi")]) for seed in (90, 91)]  # those of `fitted`
    capsule, needs = fitted(qwen), fitted(qwen).info.needs
    from capsight.kvcapsule.calibration.fit import prefilled_blocks

    found = [prefilled_blocks(qwen.model, inputs, BLOCK) for inputs in samples]
    for layer, errors in enumerate(needs.errors):
        keys, values = (torch.cat([each[layer][kind] for each in found]) for kind in (0, 1))
        for count, error in zip(needs.kept, errors, strict=True):
            own = capsule.codecs[layer].resized(count)
            assert relative_error(own, keys, values) == pytest.approx(error, abs=1e-5)


def test_the_static_codec_has_one_count(qwen):
    static = fitted(qwen, codec="static")
    assert static.info.needs is None
    assert static.with_budget("uniform").codecs == static.codecs  # what it has
    with pytest.raises(OptionError, match=r"fit (it )?again"):
        static.with_budget("water-filled")
    with pytest.raises(OptionError, match=r"fit (it )?again"):
        static.with_retained(0.9)
    with pytest.raises(OptionError, match="budget must"):
        fitted(qwen).with_budget("greedy")


def test_relative_error_and_the_sample_it_is_measured_on():
    sample, many = BlockSample(), blocks(100, 2, 8, 4)
    parts = [{0: (part, -part), 3: (2 * part, part)} for part in many.split(7)]
    for index, part in enumerate(parts):
        sample.add(part, index)
    sample.add({}, len(parts))
    keys, values = sample.blocks(0)
    assert len(keys) == 32
    assert torch.equal(values, -keys)
    assert torch.equal(sample.blocks(3)[0], 2 * keys)
    places = [int((many == block).flatten(1).all(1).nonzero()) for block in keys]
    assert len(set(places)) == 32
    assert max(places) > 60  # not just the first ones
    shared = [BlockSample(), BlockSample()]  # by two processes, the later samples first
    for index, part in reversed([*enumerate(parts)]):
        shared[index % 2].add(part, index)
    shared[0].join(shared[1])
    assert torch.equal(shared[0].blocks(3)[1], sample.blocks(3)[1])
    errors = [relative_error(codec("adaptive", count), keys, keys) for count in (1, 3, 5, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_attention_to_vision_tokens_is_the_models_own(qwen):
    inputs = batch(qwen)  # padding, one row without an image
    layout, seen = build_layout(inputs, qwen.config), VisionAttention()
    with seen.watching(qwen.model, layout):
        run(qwen, inputs, full_cache(qwen), max_new_tokens=1)
    before = qwen.config.text_config._attn_implementation
    qwen.model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = qwen.model(**inputs, output_attentions=True).attentions
    qwen.model.set_attn_implementation(before)
    for layer, weights in enumerate(attentions):  # [B, Hq, S, S]
        shares = []
        for row in (0, 1):
            spans = layout.rows[row].blocks
            last = weights[row, :, max(spans[-1].end, layout.length - 32) :].mean((0, 1))
            shares.append(sum(float(last[block.start : block.end].sum()) for block in spans))
        assert seen.share(layer) == pytest.approx(sum(shares) / 2, abs=1e-5)
    assert seen.share(99) == 0


def test_layers_are_encoded_together_as_each_alone():
    codecs = [codec("adaptive", n, weights="stored") for n in (3, 8, 5, 1)]
    keys, values = blocks(5, 2, 8, 4, 7), blocks(5, 2, 8, 4, 8)
    together = AdaptiveCodec.encode_layers(codecs, [keys] * 4, [values] * 4, [])
    for own, payload in zip(codecs, together, strict=True):
        alone = own.encode(keys, values).tensors
        assert set(alone) == set(payload.tensors)
        assert torch.equal(payload.tensors["kept"], alone["kept"])
        for name, tensor in alone.items():
            torch.testing.assert_close(payload.tensors[name], tensor)


CHANGES = {
    "solved": lambda capsule: capsule,
    "stored": lambda capsule: capsule.with_weights("stored"),
    "int8": lambda capsule: capsule.with_bits(8),
    "evict": lambda capsule: capsule.with_codec("evict"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_caches_of_layers_that_keep_different_counts(qwen, tmp_path, change):
    capsule = CHANGES[change](uneven(fitted(qwen)))
    assert kept(capsule) == [1, 1, 16]
    inputs = qwen.inputs([([qwen.picture(1)], "what"), ([qwen.picture(2)], "what is it")])
    found = []
    for decode in ("materialise", "latent"):
        with capsight.enable(qwen.model, capsule=capsule, decode=decode) as fast:
            cache = fast.encapsulate(**inputs)
            fast.save(tmp_path / decode)
            for index, layer in cache.capsule_layers.items():
                own = fast.capsule.stored[index].payload_nbytes(2, 16, 4)
                assert layer.payload.nbytes == 2 * 64 // BLOCK * own
            for each in (cache, fast.load(tmp_path / decode)):
                found.append(
                    fast.generate(
                        **inputs, past_key_values=each, max_new_tokens=3, min_new_tokens=3, do_sample=False,
                        output_logits=True, return_dict_in_generate=True,
                    )
                )  # fmt: skip
    for other in found[1:]:
        for a, b in zip(found[0].logits, other.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3 if change == "stored" else 1e-4, rtol=0)


def test_bytes_do_not_depend_on_how_the_average_is_shared_out(qwen):
    even, odd = fitted(qwen), uneven(fitted(qwen))
    assert odd.break_even_tokens(3) == even.break_even_tokens(3)
    assert odd.module_nbytes == even.module_nbytes


def test_files_hold_the_budget_and_those_without_needs_are_uniform(qwen, tmp_path):
    odd = uneven(fitted(qwen))
    odd.save_pretrained(tmp_path)
    again = KVCapsule.from_pretrained(tmp_path)
    assert again.info == odd.info
    assert kept(again.with_retained(0.5)) == kept(odd.with_retained(0.5))
    for name, value in (("budget", "greedy"), ("budget", []), ("needs", None), ("needs", {"kept": []})):
        old = json.loads((tmp_path / "capsule.json").read_text())[name]
        edit_header(tmp_path, **{name: value})
        with pytest.raises(CapsuleFileError, match=name):
            KVCapsule.from_pretrained(tmp_path)
        edit_header(tmp_path, **{name: old})
    fitted(qwen).save_pretrained(tmp_path)
    edit_header(tmp_path, budget="uniform", needs=None)
    old = KVCapsule.from_pretrained(tmp_path)
    assert (old.info.budget, old.info.needs) == ("uniform", None)
    assert kept(old.with_retained(0.5)) == [8] * 3
    with pytest.raises(OptionError, match="fit it again"):
        old.with_budget("water-filled")
