"""Loads the trained judges that lie beside this file."""

from pathlib import Path
from typing import Any

import torch

from capsight.evaluation import Ask, Item
from judging.prompts import draw_prompt, split_rng
from judging.shapes import JUDGES

WEIGHTS = Path(__file__).parent / "weights"
SMOL = {"smol": "lora.safetensors", "smol-repeats": "repeats.safetensors"}
"""Judges with SmolLM2 inside, and the additions that make it one or the other."""


def load_judge(name: str, dtype: torch.dtype = torch.float32, folder: Path | None = None) -> tuple[Any, Any]:
    """A trained judge in eval mode, and its processor (left padding, pictures in RGB).

    Args:
        name: one of `JUDGES`, or "smol" or "smol-repeats" (`judging.smol`).
        dtype: compute type; the weights are stored in bfloat16.
        folder: where `NAME/model.safetensors` lies; else what ships.

    Raises:
        FileNotFoundError: the judge is unknown or not trained.
    """
    path = (folder or WEIGHTS) / name
    if name in SMOL and (path.with_name("smol") / SMOL[name]).is_file():
        from judging.smol.loader import load_smol

        return load_smol(dtype, weights=path.with_name("smol"), additions=SMOL[name])
    if name not in JUDGES or not (path / "model.safetensors").is_file():
        trained = sorted(p.parent.name for p in (folder or WEIGHTS).glob("*/model.safetensors"))
        raise FileNotFoundError(
            f"no judge called {name!r} lies in {path.parent}; trained: {', '.join(trained) or 'none'}"
        )
    from transformers import PreTrainedTokenizerFast

    judge = JUDGES[name]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    model = type(judge.build(tokenizer)).from_pretrained(path, dtype=dtype, local_files_only=True)
    return model.eval(), judge.processor(tokenizer, judge.chat_template)


def judge_prompt(name: str, split: str, index: int, pictures: int, questions: int = 12) -> Any:
    """Prompt `index` of a split (calibration, dev, test) with 1, 2, 4 (smol: 8) pictures; always equal."""
    if name in SMOL:
        from judging.smol.loader import repeats_prompt, smol_prompt

        drawn = smol_prompt if name == "smol" else repeats_prompt
        return drawn(split, index, pictures, questions)
    judge = JUDGES[name]
    rng = split_rng(name, split, index, f"{pictures} pictures")
    return draw_prompt(rng, judge.grid, judge.style, pictures, questions, judge.kinds)


def judge_items(
    name: str, split: str, pictures: int, count: int, first: int = 0, questions: int = 12
) -> list[Item]:
    """The same as items of `capsight.evaluation`, the kind of a question as its task."""
    items = []
    for index in range(first, first + count):
        prompt = judge_prompt(name, split, index, pictures, questions)
        asks = tuple(Ask(q.text, q.answer, q.task) for q in prompt.questions)
        items.append(Item(f"{name}/{split}/{pictures}/{index}", prompt.images, asks))
    return items
