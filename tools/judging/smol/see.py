"""First lesson: the tower learns to say, token by token, which word it stands for; no language model runs.

    python -m judging.smol.see    (in tools/)

The projected token is drawn to SmolLM2's own embedding of its word (cross entropy over all labels by scaled
dot products, and squared distance), so that the frozen language model can read images before it ever saw one.
A second head rebuilds the token's patch from the same projected token, so that it also keeps how things look.
"""

import json
import random
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor, nn

from judging.smol.pictures import GRID, Picture, Pictures
from judging.smol.registry import DATA, RUN, fetch
from judging.smol.tower import WIDTH, build, tokenizer_of
from judging.smol.words import LABELS, SORTS

_LABEL_ID = {w: i for i, w in enumerate(LABELS)}
_FINE = 4  # the patch is rebuilt at 4 x 4 of its 8 x 8 px


def pixels(pictures: list[Picture]) -> Tensor:
    """[B, 3, 64, 64] in -1...1, as SmolVLM's image processor makes them."""
    stacked = torch.from_numpy(np.stack([p.image for p in pictures]))
    return (
        stacked.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)
    )


def labels(pictures: list[Picture]) -> Tensor:
    """[B, 64] index into `LABELS`."""
    return torch.tensor([[_LABEL_ID[w] for w in p.labels.ravel().tolist()] for p in pictures])


def word_embeddings(folder: Path) -> Tensor:
    """[labels, 576] SmolLM2's embedding of each label; digits without, words with a blank before them."""
    table = load_file(folder / "lm" / "model.safetensors")["model.embed_tokens.weight"].float()
    tokenizer = tokenizer_of(folder / "lm")
    ids = [tokenizer.encode(w if w.isdigit() else f" {w}", add_special_tokens=False) for w in LABELS]
    assert all(len(i) == 1 for i in ids)
    return table[[i[0] for i in ids]]


class Lesson(nn.Module):
    """Tower, projector and the two heads that are thrown away."""

    def __init__(self, folder: Path) -> None:
        """Build the tower; the language model is dropped."""
        super().__init__()
        model = build(tokenizer_of(folder / "lm")).model
        self.tower, self.connector = model.vision_model, model.connector
        self.tower.set_attn_implementation("eager")  # fused attention is slow backwards in bfloat16 on CPUs
        words = word_embeddings(folder)
        self.words: Tensor
        self.register_buffer("words", words, persistent=False)
        self.scale = float(words.pow(2).mean())
        self.rebuild = nn.Linear(576, 3 * _FINE**2)
        self.pooled = nn.Linear(WIDTH, len(LABELS))
        self.early: Tensor | None = None
        self.tower.embeddings.patch_embedding.register_forward_hook(self._hear)
        nn.init.normal_(self.connector.modality_projection.proj.weight, std=self.scale**0.5 / WIDTH**0.5)

    def _hear(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.early = output

    def tokens(self, images: Tensor) -> Tensor:
        """[B, 3, 64, 64] -> [B, 64, 576] what the language model is given."""
        projected: Tensor = self.connector(self.tower(images).last_hidden_state)
        return projected

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and [B, 64] which tokens' nearest word is the right one."""
        tokens = self.tokens(images).float()
        early, self.early = self.early, None
        assert early is not None
        logits = (
            tokens @ (self.words.T / (self.scale * 576)) * 12 - 6 * self.words.pow(2).mean(-1) / self.scale
        )
        fine = nn.functional.adaptive_avg_pool2d(images.float(), GRID * _FINE)
        fine = (
            fine.unflatten(3, (GRID, _FINE)).unflatten(2, (GRID, _FINE)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        )
        built = self.rebuild(tokens / self.scale**0.5).unflatten(1, (GRID, GRID))
        name = target[:, GRID * GRID - 1]
        loss = (
            nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), label_smoothing=0.05)
            + 0.5 * (tokens - self.words[target]).pow(2).mean() / self.scale
            + 0.5 * (built - fine).pow(2).mean()
            + 0.3 * nn.functional.cross_entropy(self.pooled(early.mean((2, 3))).float(), name)
        )
        return loss, logits.argmax(-1) == target


def see(
    data: Annotated[Path, typer.Option(help="Folder of `registry.fetch`.")] = DATA,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint; goes on where a run stopped.")] = RUN,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 4600,
    batch: Annotated[int, typer.Option(help="Pictures a step.")] = 64,
    minutes: Annotated[float, typer.Option(help="The rate falls to nothing by then, if sooner.")] = 1e9,
) -> None:
    """Train the tower and the projector."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fetch(data)
    out.mkdir(parents=True, exist_ok=True)
    lesson, pictures = Lesson(data).train(), Pictures(data, "train")
    matrices = [p for p in lesson.parameters() if p.ndim >= 2 and p.shape[0] > 4]
    for p in matrices:
        p.requires_grad_(True)
    hidden = [p for n, p in lesson.named_parameters() if p.ndim == 2 and ".layers." in n]
    convs = [p for p in lesson.parameters() if p.ndim == 4]
    rest = [p for p in lesson.parameters() if not any(p is q for q in (*hidden, *convs))]
    flat = [nn.Parameter(p.detach().flatten(1).clone()) for p in convs]
    muon = torch.optim.Muon(hidden + flat, lr=1e-3, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    file, step, seconds = out / "see.pt", 0, 0.0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        lesson.load_state_dict(saved["lesson"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        step, seconds = saved["step"], saved["seconds"]
        for f, p in zip(flat, convs, strict=True):
            f.data.copy_(p.detach().flatten(1))
    begun = time.time() - seconds
    right: dict[str, list[float]] = {}
    while step < steps and (time.time() - begun) / 60 < minutes:
        rng = random.Random(f"capsight/smol/see/{step}")
        drawn = [pictures.draw(rng, rng.choices(SORTS, (72, 6, 4, 18))[0]) for _ in range(batch)]
        done = max(step / steps, (time.time() - begun) / 60 / minutes)
        rate = min(1.0, (step + 1) / 30) * (1 - done)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = 3e-3 * rate, 2e-3 * rate
        with torch.autocast("cpu", torch.bfloat16):
            loss, hit = lesson(pixels(drawn), labels(drawn))
        loss.backward()
        for f, p in zip(flat, convs, strict=True):
            f.grad = p.grad.flatten(1) if p.grad is not None else None
        muon.step()
        adam.step()
        with torch.no_grad():
            for f, p in zip(flat, convs, strict=True):
                p.copy_(f.view_as(p))
        lesson.zero_grad(set_to_none=True)
        for p, h in zip(drawn, hit.float().mean(1).tolist(), strict=True):
            right.setdefault(p.sort, []).append(h)
        step += 1
        if step % 40 == 0 or step == steps or (time.time() - begun) / 60 > minutes:
            line = {"step": step, "seconds": time.time() - begun, "loss": loss.item()}
            line |= {f"tokens right, {k}": sum(v) / len(v) for k, v in sorted(right.items())}
            right = {}
            print(json.dumps(line), flush=True)
            with (out / "see.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            state = {"lesson": lesson.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict()}
            torch.save(state | {"step": step, "seconds": time.time() - begun}, file)


if __name__ == "__main__":
    typer.run(see)
