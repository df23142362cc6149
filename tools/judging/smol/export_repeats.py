"""Writes the additions of `across` beside those of `answer`: ``python -m judging.smol.export_repeats``.

The card says how many held-out questions are answered with everything seen, and how many when no
image sees another: a model that loses nothing there cannot judge a head map.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

from judging.smol.across import few
from judging.smol.answer import accuracy
from judging.smol.cards import counts, table
from judging.smol.loader import load_smol
from judging.smol.packed import Hidden, Packer
from judging.smol.pictures import Pictures
from judging.smol.registry import DATA, RUN, WEIGHTS
from judging.smol.repeats import REPEATS

IMAGES = (4, 8)
CARD = Path(__file__).with_name("repeats.md")


def export_repeats(
    run: Annotated[Path, typer.Option(help="Folder of the training run.")] = RUN,
    data: Annotated[Path, typer.Option(help="Folder of what the judge is made of.")] = DATA,
    out: Annotated[Path, typer.Option(help="Where to write.")] = WEIGHTS,
    prompts: Annotated[int, typer.Option(help="Test prompts of each number of images.")] = 40,
) -> None:
    """Write the additions in bfloat16, measure, write the card."""
    torch.set_num_threads(1)
    trained = torch.load(run / "across.pt", weights_only=True)
    added = {k: v.bfloat16().contiguous() for k, v in trained["added"].items()}
    save_file(added, out / "repeats.safetensors")
    model, processor = load_smol(torch.bfloat16, data, out, "repeats.safetensors")
    packer, source = Packer(processor.tokenizer), Pictures(data, "test")
    card: dict[str, Any] = {"test prompts of each": prompts, "tokens trained on": trained["tokens"]}
    for name, hidden in (("right", None), ("right, images apart", Hidden.FROM_IMAGES)):
        found = {str(n): accuracy(model, packer, few(source, "test", n, prompts), hidden) for n in IMAGES}
        card[f"{name}, by images and kind"] = {n: counts(c, REPEATS) for n, c in found.items()}
    card["curve"] = [json.loads(line) for line in (run / "across.jsonl").read_text().splitlines()]
    (out / "repeats.json").write_text(json.dumps(card, indent=1) + "\n")
    (out / "REPEATS.md").write_text(CARD.read_text().format(**_words(card)))
    print((out / "REPEATS.md").read_text())


def _words(card: dict[str, Any]) -> dict[str, Any]:
    """What `CARD` is filled with."""
    heads = [f"{n} images{more}" for n in IMAGES for more in ("", ", apart")]
    sides = [
        card[f"{name}, by images and kind"][str(n)]
        for n in IMAGES
        for name in ("right", "right, images apart")
    ]
    last = card["curve"][-1]
    return {
        "table": "\n".join(table(heads, REPEATS, sides)),
        "prompts": card["test prompts of each"], "steps": last["step"],
        "minutes": round(last["seconds"] / 60), "tokens": card["tokens trained on"],
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(export_repeats)
