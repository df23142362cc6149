"""Methods for tiny models, fitted once, and the batches that the tests share."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers.utils import is_optimum_quanto_available

from capsight.baselines import METHODS, Baseline
from tiny import FAMILIES, TinyVLM

BLOCK = 16  # tokens in a run of the tiny models
BUDGETED = [name for name in METHODS if not name.startswith("quanto")]
RUNNABLE = sorted(METHODS) if is_optimum_quanto_available() else sorted(BUDGETED)
EVICTING = ["uniform", "streaming-llm", "snapkv", "vl-cache", "cur", "kvzip"]
NEW = 4


@cache
def _fitted(name: str, family: str) -> Baseline:
    vlm = FAMILIES[family]()
    kind: Any = METHODS[name]
    if not kind.calibrated:
        return kind(0.4, BLOCK)
    samples = [vlm.inputs([([vlm.picture(seed)], "hi")]) for seed in (90, 91)]
    return kind.fit(vlm.model, None, samples, 0.4, BLOCK, progress=False)


def method(name: str, vlm: TinyVLM, retained: float) -> Baseline:
    return _fitted(name, vlm.name).with_retained(retained)


def mixed_batch(vlm: TinyVLM) -> Any:
    """Two images of two sizes, one image, none: left-padded rows."""
    pictures = [vlm.picture(0), vlm.picture(1, vlm.other_size)]
    return vlm.inputs([(pictures, "what do you see here?"), ([vlm.picture(2)], "hi"), ([], "only text")])


def greedy(generate: Any, **inputs: Any) -> Any:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    return generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)


def assert_same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.fixture
def qwen() -> TinyVLM:
    return FAMILIES["qwen2_5_vl"]()
