"""The heads codec on tiny models: prompts shared out, attention to what is kept, later turns, and files."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import capsight
from capsight.errors import CapsightError, CapsuleFileError
from capsight.kvcapsule import CapsuleCache, KVCapsule
from capsight.kvcapsule.cache.layer import CapsuleLayer
from capsight.kvcapsule.cache.stock import stock_nbytes
from capsight.kvcapsule.cache_file import load_cache, save_cache
from capsight.layout import build_layout
from kvcapsule.conftest import BLOCK, few, fitted
from kvcapsule.test_cache_file import forge, parts
from kvcapsule.test_generate import asked, batch, later_turn, run
from tiny import CACHES, FAMILIES, TinyVLM, in_turn

WAYS = ("materialise", "latent")
GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def conversation(vlm: TinyVLM, capsule: KVCapsule | None, decode: str, inputs: Any) -> list[Any]:
    """Images alone, a question, and a second question, which the cache of the first goes on with."""
    length = {"max_new_tokens": 3, "min_new_tokens": 3}
    with capsight.enable(vlm.model, capsule=capsule, decode=decode) as fast:
        cache = fast.encapsulate(**inputs)
        turns = [fast.generate(past_key_values=cache, **inputs, **length, **GREEDY)]
        if vlm.name == "gemma4":
            pytest.skip("its random weights say an image token")
        again = later_turn(asked(vlm, turns[0].sequences, "and now, what else?"), inputs)
        turns.append(fast.generate(past_key_values=cache, **again, **length, **GREEDY))
        turns.append(fast.cache)
    return turns


def close(ours: Any, theirs: Any, tolerance: float) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def check_bytes(capsule: KVCapsule, cache: CapsuleCache) -> None:
    """Rows share out what is theirs, and all that is stored is counted."""
    placement = next(iter(cache.capsule_layers.values())).placement
    expected = 16 * len(placement.runs) + 16 * len(placement.exact_cols)
    for index, layer in cache.capsule_layers.items():
        sizes = next(each for each in capsule.info.layers if each.index == index)
        kept, counts = round(0.4 * BLOCK), layer.payload.tensors["counts"].long()
        assert len(counts.unique()) > 1
        for row in (0, 1):
            own = counts[placement.run_rows == row]
            assert len(own) >= 4
            assert own.sum() == kept * own.numel()
            assert own.min() >= 1
        token = 2 * sizes.head_dim * 4
        expected += counts.sum() * (token + 1) + counts.numel()
        expected += sizes.heads * token * (layer._packed.shape[1] + 3 * layer._tail.shape[2])
    others = [layer for layer in cache.layers if not isinstance(layer, CapsuleLayer)]
    expected += sum(stock_nbytes(layer) for layer in others)
    expected += 0 if cache._states is None else cache._states.nbytes(cache.layers)  # kept for cropping
    assert cache.nbytes == expected


@in_turn("decode", WAYS, CACHES)
def test_two_turns(vlm, decode):
    """Left padding, images of different sizes, and a row without any."""
    inputs, everything = batch(vlm), fitted(vlm, 1.0, codec="heads")
    capsule = everything.with_retained(0.4)
    full = conversation(vlm, None, "materialise", inputs)
    rebuilt, latent = (conversation(vlm, capsule, decode, inputs) for decode in WAYS)
    all_kept = conversation(vlm, everything, decode, inputs)
    for turn in (0, 1):
        close(latent[turn], rebuilt[turn], 1e-3)
        close(all_kept[turn], full[turn], 1e-4)
    check_bytes(capsule, latent[2])
    assert latent[2].nbytes == rebuilt[2].nbytes
    assert (latent[0].logits[0][:2] - full[0].logits[0][:2]).abs().max() > 1e-2  # something was evicted
    torch.testing.assert_close(latent[0].logits[0][2], full[0].logits[0][2], atol=1e-4, rtol=0)


def test_a_row_keeps_what_it_keeps_alone(qwen):
    capsule = fitted(qwen, codec="heads")
    alone = qwen.inputs([([qwen.picture(0), qwen.picture(1, qwen.other_size)], "what do you see here?")])
    together, one = (conversation(qwen, capsule, "latent", each)[2] for each in (batch(qwen), alone))
    for index, layer in one.capsule_layers.items():
        among = together.capsule_layers[index]
        own = (among.placement.run_rows == 0).nonzero()[:, 0]
        found, expected = among.payload.select(own), layer.payload
        for name in ("kept", "counts"):
            assert torch.equal(found.tensors[name], expected.tensors[name])
        torch.testing.assert_close(found.tensors["keys"], expected.tensors["keys"])


@pytest.mark.parametrize("decode", WAYS)
def test_crop_back_to_the_images_and_move_rows(qwen, decode):
    inputs, capsule = batch(qwen), fitted(qwen, codec="heads")
    cut, rows = build_layout(inputs, qwen.config).last_vision_end, [1, 1, 0, 2]
    question = later_turn(asked(qwen, inputs["input_ids"][:, :cut], "which one is it?"), inputs)
    question["attention_mask"] = question["attention_mask"][:, : question["input_ids"].shape[1]]
    with capsight.enable(qwen.model, capsule=capsule, decode=decode) as fast:
        cache = fast.encapsulate(**inputs)
        held = cache.nbytes
        first = fast.generate(past_key_values=cache, **question, max_new_tokens=3, **GREEDY)
        cache.crop(cut)
        assert cache.nbytes == held
        close(fast.generate(past_key_values=cache, **question, max_new_tokens=3, **GREEDY), first, 0)
        cache.crop(cut)
        cache.reorder_cache(torch.tensor(rows))
        counts = cache.capsule_layers[0].payload.tensors["counts"]
        assert torch.equal(counts[:4], counts[4:8])  # of the row that is there twice
        moved = {name: x[rows] for name, x in question.items()}
        found = fast.generate(past_key_values=cache, **moved, max_new_tokens=3, **GREEDY)
    assert torch.equal(found.sequences, first.sequences[rows])
    for a, b in zip(found.logits, first.logits, strict=True):
        torch.testing.assert_close(a, b[rows], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_beams_are_the_same_either_way(family):
    vlm = FAMILIES[family]()
    inputs, capsule, found = batch(vlm), fitted(vlm, codec="heads"), []
    for decode in WAYS:
        with capsight.enable(vlm.model, capsule=capsule, decode=decode) as fast:
            options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
            found.append(fast.generate(**inputs, **options))
            assert fast.cache.layout.batch_size == 3 * 3
    assert torch.equal(*found)


@few
def test_without_capsight_attention_it_says_so(vlm):
    inputs, capsule = batch(vlm), fitted(vlm, codec="heads")
    before = vlm.config.get_text_config()._attn_implementation
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        assert fast.decode == "latent"
    assert vlm.config.get_text_config()._attn_implementation == before
    with pytest.raises(CapsightError, match=r"heads codec .*capsight\.enable"):
        run(vlm, inputs, capsule.cache(inputs))


EVEN = [[6, 6]] * 4


@pytest.mark.parametrize(
    ("counts", "fine"),
    [
        ([*EVEN, *EVEN], True),
        ([[16, 1], [1, 16], [1, 1], [6, 6], [12, 12], [5, 5], [4, 4], [3, 3]], True),
        ([[0, 12], [6, 6], [6, 6], [6, 6], *EVEN], False),  # a head of a block keeps one at least
        ([[17, 1], [6, 6], [6, 6], [3, 3], *EVEN], False),  # and no more than there are
        ([[7, 6], [6, 6], [6, 6], [6, 6], *EVEN[1:], [5, 6]], False),  # a row shares out what is its own
    ],
)
def test_counts_that_no_row_shares_out_are_refused(qwen, tmp_path, counts, fine):
    """The positions fit the counts, so nothing else is wrong."""
    capsule = fitted(qwen, codec="heads")
    inputs = qwen.inputs([([qwen.picture(0)], "hi"), ([qwen.picture(1)], "what is it?")])
    cache = capsule.cache(inputs)
    with torch.no_grad():
        qwen.model(**inputs, past_key_values=cache, use_cache=True)
    save_cache(tmp_path / "x", cache, capsule)
    header, tensors = parts(tmp_path / "x")
    tensors["layers.1.capsule.counts"] = torch.tensor(counts, dtype=torch.uint8)
    kept = torch.cat([torch.arange(block[head]) for head in (0, 1) for block in counts])
    tensors["layers.1.capsule.kept"] = kept.to(torch.uint8)
    forged = forge(tmp_path / "x", header, tensors)
    if fine:
        assert load_cache(forged, capsule).capsule_layers[1].payload.tensors["counts"].tolist() == counts
    else:
        with pytest.raises(CapsuleFileError, match=r"layers\.1\.capsule\.counts"):
            load_cache(forged, capsule)
