"""Loads capsight-smol, and draws its prompts."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from judging.smol.answer import load_tower
from judging.smol.asks import ASKED, Prompt, draw_prompt, split_rng
from judging.smol.lora import merge
from judging.smol.pictures import Pictures
from judging.smol.registry import DATA, WEIGHTS, fetch
from judging.smol.repeats import draw_repeats, repeats_rng
from judging.smol.tower import build, load_language, processor_of, tokenizer_of


def load_smol(
    dtype: torch.dtype = torch.float32,
    data: Path = DATA,
    weights: Path = WEIGHTS,
    additions: str = "lora.safetensors",
) -> tuple[Any, Any]:
    """The judge in eval mode and its processor (left padding, pictures in RGB).

    Args:
        dtype: compute type.
        data: folder of `registry.fetch`, which downloads what is missing.
        weights: folder of `tower.safetensors` and the additions.
        additions: file of the low-rank additions there; "" for SmolLM2 itself.
    """
    fetch(data)
    tokenizer = tokenizer_of(data / "lm")
    model = build(tokenizer)
    load_language(model, data / "lm")
    load_tower(model, weights / "tower.safetensors")
    if additions:
        merge(model.model.text_model, load_file(weights / additions))
    return model.to(dtype).eval(), processor_of(tokenizer)


@lru_cache(maxsize=4)
def _source(data: Path, split: str) -> Pictures:
    return Pictures(data, split)


def smol_prompt(split: str, index: int, images: int, questions: int = 12, data: Path = DATA) -> Prompt:
    """Prompt `index` of a split (calibration, dev, test); equal on every machine."""
    rng = split_rng(split, index, f"{images} images")
    return draw_prompt(_source(data, split), rng, images, questions, ASKED)


def repeats_prompt(split: str, index: int, images: int, questions: int = 1, data: Path = DATA) -> Prompt:
    """The same for the judge `smol-repeats`, which is asked one thing: what comes twice."""
    return draw_repeats(_source(data, split), repeats_rng(split, index, images), images)
