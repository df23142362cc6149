"""Writes a judge as the folder that ships: ``python -m judging.export --judge mosaic --run runs/mosaic``."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import PreTrainedTokenizerFast

from judging.check import accuracy, table
from judging.loader import WEIGHTS
from judging.shapes import JUDGES, untrained


def export(
    judge: Annotated[str, typer.Option(help="Which judge.")],
    run: Annotated[Path, typer.Option(help="Folder of the training run.")],
    prompts: Annotated[int, typer.Option(help="Test prompts of each number of pictures for the card.")] = 60,
) -> None:
    """Export the last checkpoint, with a card that says what it is and how often it is right."""
    torch.set_num_threads(1)
    made, out = JUDGES[judge], WEIGHTS / judge
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "tokenizer")
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    model = untrained(made, tokenizer)
    model.load_state_dict(state["model"])
    model.bfloat16().save_pretrained(out)
    made.processor(tokenizer, made.chat_template).save_pretrained(out)
    found = accuracy(made, model.float().eval(), tokenizer, "test", prompts)
    text = model.config.get_text_config()
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    card = [
        f"# Judge `{judge}`",
        f"`{type(model).__name__}`, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters: "
        f"{text.num_hidden_layers} layers of width {text.hidden_size}, {text.num_attention_heads} query and "
        f"{text.num_key_value_heads} KV heads, {made.tokens} vision tokens a picture. Initial weights from "
        f"seed {made.seed}; prompts from the seeds `capsight/judges/{judge}/...` (`prompts.split_rng`).",
        f"Trained by `python -m judging.train --judge {judge} --out runs/{judge}` in `tools/`: one CPU "
        f"thread, {state['seconds'] / 60:.0f} minutes on a busy machine; at the end "
        f"{steps[-1]['tokens']:.3f} of the answer tokens right.",
        f"Exact match with the full cache in %, test split, {prompts} prompts of each number of pictures "
        f"(`python -m judging.check --judge {judge} --split test --prompts {prompts}`):",
        table(found),
        f"Drawn, but not asked, as it did not learn them: {', '.join(made.unlearnt) or 'none'} (`--every`).",
    ]
    (out / "README.md").write_text("\n\n".join(card) + "\n")
    print((out / "README.md").read_text())


if __name__ == "__main__":
    typer.run(export)
