"""Writes a checkpoint as the folder that ships: bf16 safetensors, config, tokenizer, processor files."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import PreTrainedTokenizerFast

from reference_training.architecture import build_config, build_model, build_processor


def export(
    run: Annotated[Path, typer.Option(help="Folder of the training run.")] = Path("runs/reference"),
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("src/capsight/reference/weights"),
) -> None:
    """Export the last checkpoint of a training run."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "tokenizer")
    model = build_model(build_config(tokenizer))
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    model.load_state_dict(state["model"])
    model.bfloat16().save_pretrained(out)
    build_processor(tokenizer).save_pretrained(out)
    size = sum(f.stat().st_size for f in out.iterdir() if f.is_file())
    print(f"stage {state['stage']}, step {state['step']} -> {out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(export)
