"""Writes capsight-smol as the folder that ships, with a card: ``python -m judging.smol.export``.

The card says how many held-out questions of each kind the full cache answers, at 1, 4 and 8 images;
`card.json` has the curves of training, too.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

from judging.smol.answer import accuracy, held_out, save_tower
from judging.smol.asks import ASKED, KINDS, Prompt
from judging.smol.cards import counts, table
from judging.smol.loader import load_smol, smol_prompt
from judging.smol.packed import Packer
from judging.smol.pictures import Pictures
from judging.smol.registry import DATA, RUN, WEIGHTS

IMAGES = (1, 4, 8)
CARD = Path(__file__).with_name("card.md")


def same_tokens(processor: Any, packer: Packer, prompt: Prompt) -> bool:
    """Whether the processor's chat template and `Packer` spell a prompt in the same tokens."""
    content = [
        *({"type": "image"} for _ in prompt.pictures),
        {"type": "text", "text": prompt.questions[0].text},
    ]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [p.pil for p in prompt.pictures]
    theirs = processor(text=[text], images=[images], return_tensors="pt")["input_ids"][0].tolist()
    ours = packer([Prompt(prompt.pictures, prompt.questions[:1])]).input_ids[0].tolist()
    return theirs == ours[: len(theirs)]


def export(
    run: Annotated[Path, typer.Option(help="Folder of the training run.")] = RUN,
    data: Annotated[Path, typer.Option(help="Folder of what the judge is made of.")] = DATA,
    out: Annotated[Path, typer.Option(help="Where to write.")] = WEIGHTS,
    prompts: Annotated[int, typer.Option(help="Test prompts of each number of images.")] = 40,
) -> None:
    """Write the weights in bfloat16, measure, write the card."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    save_tower(run / "see.pt", out / "tower.safetensors")
    trained = torch.load(run / "answer.pt", weights_only=True)
    save_file({k: v.bfloat16().contiguous() for k, v in trained["added"].items()}, out / "lora.safetensors")
    model, processor = load_smol(torch.bfloat16, data, out)
    packer, source = Packer(processor.tokenizer), Pictures(data, "test")
    assert same_tokens(processor, packer, smol_prompt("test", 0, 4, 1, data))
    found = {n: accuracy(model, packer, held_out(source, "test", n, prompts)) for n in IMAGES}
    log = [json.loads(line) for line in (run / "answer.jsonl").read_text().splitlines()]
    see = [json.loads(line) for line in (run / "see.jsonl").read_text().splitlines()]
    card: dict[str, Any] = {
        "right, by images and kind": {str(n): counts(c, KINDS) for n, c in found.items()},
        "right, %": {str(n): _percent([c[k] for k in ASKED if k in c]) for n, c in found.items()},
        "asked": list(ASKED),
        "test prompts of each": prompts,
        "tokens trained on": trained["tokens"],
        "curve, tower": see,
        "curve, answers": log,
    }
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (out / "README.md").write_text(CARD.read_text().format(**_words(card)))
    print((out / "README.md").read_text())


def _percent(counts: Sequence[tuple[int, int]]) -> float:
    return round(100 * sum(a for a, _ in counts) / sum(b for _, b in counts), 1)


def _words(card: dict[str, Any]) -> dict[str, Any]:
    """What `CARD` is filled with."""
    by_images, see, answers = card["right, by images and kind"], card["curve, tower"], card["curve, answers"]
    rows = table(["1 image" if n == "1" else f"{n} images" for n in by_images], KINDS, [*by_images.values()])
    rows.append("| asked kinds | " + " | ".join(f"{x:.1f}" for x in card["right, %"].values()) + " |")
    return {
        "table": "\n".join(rows), "prompts": card["test prompts of each"],
        "see": see[-1]["step"], "see_minutes": round(see[-1]["seconds"] / 60),
        "photo": 100 * see[-1]["tokens right, photo"], "page": 100 * see[-1]["tokens right, page"],
        "steps": answers[-1]["step"], "minutes": round(answers[-1]["seconds"] / 60),
        "tokens": card["tokens trained on"],
        "unlearnt": ", ".join(k for k in KINDS if k not in ASKED) or "none",
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(export)
