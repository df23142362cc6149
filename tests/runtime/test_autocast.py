"""Under autocast, and with weights that accelerate keeps elsewhere until a layer runs."""

from __future__ import annotations

import copy

import pytest
import torch

from capsight import BlindSight, CapsuleStore, KVCapsule, enable
from capsight.errors import CalibrationError
from tiny import FAMILIES

KINDS = ("qwen2_5_vl", "gemma3", "internvl", "qwen3_5", "llava")
"""M-RoPE, windows, tiles, states, and one position without delimiters."""


def samples(vlm, count=2):
    return [
        vlm.inputs([([vlm.picture(i), vlm.picture(i + 9, vlm.other_size)], "hi"), ([], "a")])
        for i in range(count)
    ]


def same(a: KVCapsule, b: KVCapsule) -> bool:
    pairs = ((a.codecs[i].state_dict(), b.codecs[i].state_dict()) for i in a.codecs)
    return all(torch.equal(x[name], y[name]) for x, y in pairs for name in x)


@pytest.mark.parametrize("codec", ["joint", "heads", "adaptive"])
@pytest.mark.parametrize("name", KINDS)
def test_autocast(name, codec):
    vlm = FAMILIES[name]()
    plain = KVCapsule.fit(vlm.model, None, samples(vlm), retained=1.0, codec=codec, progress=False)
    options = {
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    inputs = samples(vlm)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fitted = KVCapsule.fit(vlm.model, None, samples(vlm), retained=1.0, codec=codec, progress=False)
        stock = vlm.model.generate(**inputs, **options)
        with enable(vlm.model, capsule=fitted) as fast:
            ours = fast.generate(**inputs, **options)
    assert same(plain, fitted)
    assert (ours.logits[1] - stock.logits[1]).abs().max() < 0.06 * stock.logits[1].abs().max()


@pytest.mark.parametrize("codec", ["joint", "heads"])
def test_offloaded_weights(codec):
    vlm = FAMILIES["qwen2_5_vl"]()
    plain = KVCapsule.fit(vlm.model, None, samples(vlm), codec=codec, progress=False)
    inputs = samples(vlm)[0]
    with enable(vlm.model, capsule=plain) as fast:
        expected = fast.generate(**inputs, max_new_tokens=4)
    cpu_offload = pytest.importorskip("accelerate").cpu_offload
    model = cpu_offload(copy.deepcopy(vlm.model), execution_device="cpu")
    assert model.device.type == "meta"
    fitted = KVCapsule.fit(model, None, samples(vlm), codec=codec, progress=False)
    assert same(plain, fitted)
    with enable(model, capsule=fitted) as fast:
        assert fast.generate(**inputs, max_new_tokens=4).equal(expected)


def test_calibration_under_autocast_and_with_offloaded_weights():
    vlm = FAMILIES["qwen2_5_vl"]()
    prompts, options = samples(vlm, 4), {"criterion": "mass", "tolerance": None, "progress": False}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = BlindSight.calibrate(
            vlm.model, None, prompts, criterion="mass", tolerance=None, progress=False
        )
    cpu_offload = pytest.importorskip("accelerate").cpu_offload
    model = cpu_offload(copy.deepcopy(vlm.model), execution_device="cpu")
    offloaded = BlindSight.calibrate(model, None, prompts, **options)
    plain = BlindSight.calibrate(vlm.model, None, prompts, **options)
    assert offloaded.categories == plain.categories
    assert len(found.categories) == len(plain.categories)
    with pytest.raises(CalibrationError, match="offloaded"):
        BlindSight.calibrate(model, None, prompts, **options | {"criterion": "output"})


@pytest.mark.parametrize("quality", [None, 1 - 1e-7])
def test_saved_caches_go_on_with_offloaded_weights(quality, tmp_path):
    vlm = FAMILIES["qwen2_5_vl"]()
    capsule = KVCapsule.fit(vlm.model, None, samples(vlm), 0.99, progress=False)
    inputs = vlm.inputs([([vlm.picture(0), vlm.picture(1)], "hi")])
    model = pytest.importorskip("accelerate").cpu_offload(copy.deepcopy(vlm.model), execution_device="cpu")
    with enable(vlm.model, capsule=capsule) as fast:
        fast.encapsulate(**inputs)
        fast.save(tmp_path / "x", quality)
        expected = fast.generate(past_key_values=fast.load(tmp_path / "x"), **inputs, max_new_tokens=4)
    with enable(model, capsule=capsule) as fast:
        found = fast.generate(past_key_values=fast.load(tmp_path / "x"), **inputs, max_new_tokens=4)
    assert found.equal(expected)


def test_autocast_leaves_caches_at_rest_as_they_are(tmp_path):
    vlm = FAMILIES["qwen2_5_vl"]()
    capsule = KVCapsule.fit(vlm.model, None, samples(vlm), 0.99, progress=False)
    inputs = vlm.inputs([([vlm.picture(0), vlm.picture(1)], "hi")])
    store = CapsuleStore(tmp_path / "store", quality=1 - 1e-6)
    with enable(vlm.model, capsule=capsule, store=store) as fast:
        fast.encapsulate(**inputs)
        fast.save(tmp_path / "x", 1 - 1e-6)
        plain = [fast.load(tmp_path / "x"), fast.encapsulate(**inputs)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fast.save(tmp_path / "x", 1 - 1e-6)
            found = [fast.load(tmp_path / "x"), fast.encapsulate(**inputs)]
    for one, other in zip(plain, found, strict=True):
        a, b = (x.capsule_layers[0].payload.tensors for x in (one, other))
        assert torch.equal(a["codes"], b["codes"])
        text = [x.capsule_layers[0]._packed.float() for x in (one, other)]
        assert (text[0] - text[1]).norm() < 0.03 * text[0].norm()
