from __future__ import annotations

from functools import cache

import pytest
import torch

from capsight import KVCapsule
from tiny import CACHES, FAMILIES, KINDS
from tiny.base import TinyVLM

few = pytest.mark.parametrize("vlm", CACHES, indirect=True)
"""Run with one family of each kind of cache: others change nothing, or `tests/checking` runs them all."""


@cache
def _fitted(name: str, codec: str) -> KVCapsule:
    vlm = FAMILIES[name]()
    samples = [vlm.inputs([([vlm.picture(seed), vlm.picture(seed + 1)], "what")]) for seed in range(0, 6, 2)]
    return KVCapsule.fit(vlm.model, None, samples, retained=0.4, codec=codec, progress=False)


@cache
def fitted(name: str, retained: float, codec: str = "heads") -> KVCapsule:
    """Fitted once for all fractions, which is the same (`test_capsule.py`)."""
    return _fitted(name, codec).with_retained(retained)


@pytest.fixture(params=KINDS)
def vlm(request: pytest.FixtureRequest) -> TinyVLM:
    return FAMILIES[request.param]()


@pytest.fixture
def qwen() -> TinyVLM:
    torch.manual_seed(0)
    return FAMILIES["qwen2_5_vl"]()
