"""Command line of the trainer: ``python -m reference_training --out runs/reference``."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from reference_training.architecture import build_config, build_model, build_tokenizer
from reference_training.corpus import wording
from reference_training.loop import Trainer
from reference_training.stages import STAGES


def train(
    out: Annotated[
        Path, typer.Option(help="Folder of checkpoint, log and tokenizer; training resumes from it.")
    ],
    until: Annotated[str, typer.Option(help="Last stage to train.")] = STAGES[-1].name,
    device: Annotated[str, typer.Option(help="cpu, or cuda (bf16 autocast).")] = "cpu",
    workers: Annotated[int, typer.Option(help="Processes that draw ahead; worth it from four cores on.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    weights: Annotated[Path | None, typer.Option(help="Start from an exported model.")] = None,
    first: Annotated[str, typer.Option(help="Stage to start with.")] = STAGES[0].name,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights.")] = 0,
) -> None:
    """Train the reference VLM from nothing, or go on where a run in OUT stopped."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    saved = out / "tokenizer"
    tokenizer = (
        PreTrainedTokenizerFast.from_pretrained(saved) if saved.exists() else build_tokenizer(wording())
    )
    model = build_model(build_config(tokenizer)).train()
    if weights is not None:
        model.load_state_dict(load_file(weights / "model.safetensors"), strict=False)
    model.to(torch.device(device))
    tokenizer.save_pretrained(out / "tokenizer")
    trainer = Trainer(model, tokenizer, out, workers)
    trainer.stage_index = [s.name for s in STAGES].index(first)
    if trainer.resume():
        print(f"resuming at {STAGES[min(trainer.stage_index, len(STAGES) - 1)].name}, step {trainer.step}")
    trainer.run(until)


typer.run(train)
