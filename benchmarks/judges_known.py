"""The judges by name: models, prompts of their splits, samples to fit methods to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import capsight
from capsight.evaluation import Item, reference_items
from capsight.evaluation.prompting import process
from capsight.kvcapsule import KVCapsule
from capsight.layout import build_layout

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from judging.loader import judge_items, load_judge

REFERENCE = "reference"
LATER = 1000
"""First calibration prompt of the reference VLM that is a development prompt; fits use earlier ones."""
FITTED = 96
"""Calibration prompts that methods are fitted to."""


@dataclass(frozen=True)
class Source:
    """A judge.

    Attributes:
        model, processor: as loaded.
        items: (split, pictures of a prompt, prompts) to what is asked.
        samples: processor outputs of the calibration split.
        pictures: numbers of pictures of its prompts.
        block: vision tokens of a picture, or of a part of it: what baselines take as one run.
        capsule: fits a `heads` capsule, or loads the one that ships.
    """

    model: Any
    processor: Any
    items: Callable[[str, int, int], list[Item]]
    samples: list[Any]
    pictures: tuple[int, ...]
    block: int
    capsule: Callable[[], KVCapsule]


def load_asked(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Callable[..., list[Item]]]:
    """Model, processor, and (split, pictures of a prompt, prompts, first=0) to what is asked.

    Raises:
        FileNotFoundError: there is no such judge.
    """
    if name != REFERENCE:
        return *load_judge(name, dtype), partial(judge_items, name)

    def items(split: str, pictures: int, prompts: int, first: int = 0) -> list[Item]:
        first += LATER if split == "dev" else 0
        return list(reference_items("test" if split == "test" else "calibration", pictures, prompts, first))

    return *capsight.load_reference_vlm(dtype), items


def load_source(name: str, dtype: torch.dtype) -> Source:
    """A judge of `tools/judging`, or the reference VLM.

    Raises:
        FileNotFoundError: there is no such judge.
    """
    counts = (1, 4, 8) if name in (REFERENCE, "smol") else (1, 2, 4)
    model, processor, items = load_asked(name, dtype)

    drawn = [item for n in counts for item in items("calibration", n, FITTED // len(counts))]
    samples = [process(processor, item, [item.asks[0].question]) for item in drawn]
    rows = [row for sample in samples for row in build_layout(sample, model.config).rows]
    block = min(block.end - block.start for row in rows for block in row.blocks)

    def capsule() -> KVCapsule:
        if name == REFERENCE:
            return KVCapsule.from_pretrained(REFERENCE)
        return KVCapsule.fit(model, processor, samples, codec="heads", block_size=block, progress=False)

    return Source(model, processor, items, samples, counts, block, capsule)
