"""Under autocast, and with weights that accelerate keeps elsewhere until a layer runs."""

from __future__ import annotations

import copy

import pytest
import torch

from capsight import BlindSight, KVCapsule, enable
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
