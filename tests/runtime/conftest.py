from __future__ import annotations

from functools import cache

import pytest
import torch

from capsight import KVCapsule
from tiny import FAMILIES, KINDS
from tiny.base import TinyVLM


@cache
def fitted(name: str, retained: float, codec: str = "heads") -> KVCapsule:
    vlm = FAMILIES[name]()
    samples = [vlm.inputs([([vlm.picture(seed), vlm.picture(seed + 1)], "what")]) for seed in range(0, 6, 2)]
    return KVCapsule.fit(vlm.model, None, samples, retained=retained, codec=codec, progress=False)


@pytest.fixture(params=KINDS)
def vlm(request: pytest.FixtureRequest) -> TinyVLM:
    return FAMILIES[request.param]()


@pytest.fixture
def qwen() -> TinyVLM:
    torch.manual_seed(0)
    return FAMILIES["qwen2_5_vl"]()
