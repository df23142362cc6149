"""Third lesson: image tokens learn to look at other images while they are read; additions of their own.

    python -m judging.smol.across    (in tools/, after judging.smol.answer)

It goes on from the additions of `answer` with prompts of `repeats`. A probe after layer `PROBE`, thrown away,
has to say from a picture's own tokens whether an earlier picture shows the same: alone at first, when later
layers do not run, then beside the answers. In the first part, and in every other step of the second, the text
between the images sees no image, so that it cannot do the comparing for them.
"""

import json
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from judging.smol.answer import accuracy, answers, compiled, fill, missed, student
from judging.smol.asks import Prompt
from judging.smol.packed import Hidden, Packer, hide
from judging.smol.pictures import Picture, Pictures
from judging.smol.registry import DATA, RUN
from judging.smol.repeats import draw_repeats, repeated, repeats_rng

PROBE = 12
#: Images of a prompt -> (prompts of a step, most questions and all tokens of each); of the first part.
SIZES, LOOKING = {4: (3, 2, 400), 8: (1, 4, 960)}, (3, 1, 336)


class Probe(nn.Module):
    """Says of image tokens whether their picture shows what an earlier one shows."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        """Listen to what a layer is given; it must not be compiled."""
        super().__init__()
        self.say = nn.Linear(width, 1)
        self.heard: Tensor | None = None
        layer.register_forward_pre_hook(self._hear)

    def _hear(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.heard = args[0]

    def forward(self, where: Tensor, pictures: Sequence[Sequence[Picture]]) -> tuple[Tensor, float, float]:
        """The loss, and how often it is right about pictures that repeat and that do not.

        Args:
            where: [B, S] bool, image tokens.
            pictures: of each prompt.
        """
        assert self.heard is not None
        hidden = self.heard[where].float()  # [images x 64, width]
        said = self.say(nn.functional.rms_norm(hidden, hidden.shape[-1:]))[:, 0]
        again = torch.tensor([float(i >= 0) for row in pictures for i in repeated(row)])
        told = torch.stack([_telling(p, i) for row in pictures for i, p in enumerate(row)])
        target = again[:, None].expand_as(told)[told]
        said = said.view_as(told)[told]
        loss = nn.functional.binary_cross_entropy_with_logits(said, target, pos_weight=torch.tensor(2.0))
        hit = ((said > 0) == (target > 0)).float()
        return loss, float(hit[target > 0].mean()), float(hit[target == 0].mean())


def _telling(picture: Picture, index: int) -> Tensor:
    """[64] bool, which tokens know what their picture shows: those that show it, and the last quarter."""
    shows = torch.from_numpy((picture.labels == picture.name).ravel())
    shows[-16:] = True
    return shows if index else torch.zeros_like(shows)


def few(source: Pictures, split: str, images: int, prompts: int, questions: int = 1) -> list[Prompt]:
    """The first prompts of a split; what comes twice, and other questions."""
    rngs = (repeats_rng(split, index, images) for index in range(prompts))
    return [draw_repeats(source, rng, images, questions) for rng in rngs]


def across(
    data: Annotated[Path, typer.Option(help="Folder of `registry.fetch`.")] = DATA,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoints; goes on where a run stopped.")] = RUN,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 300,
    look: Annotated[int, typer.Option(help="Steps of the first part.")] = 93,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    minutes: Annotated[float, typer.Option(help="The rate falls to nothing by then, if sooner.")] = 1e9,
    fuse: Annotated[bool, typer.Option(help="Compile the layers; needs g++.")] = bool(shutil.which("g++")),
) -> None:
    """Train additions for questions that text cannot answer by looking up."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokenizer, added = student(data, out / "see.pt")
    layers, image = model.model.text_model.layers, model.config.image_token_id
    probe = Probe(layers[PROBE], model.config.text_config.hidden_size)
    if fuse:
        compiled(layer for i, layer in enumerate(layers) if i != PROBE)
    learnt = [*added.values(), *probe.parameters()]
    optimiser = torch.optim.AdamW(learnt, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    file, step, seconds, tokens = out / "across.pt", 0, 0.0, 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        optimiser.load_state_dict(saved["optimiser"])
        probe.load_state_dict(saved["probe"])
        step, seconds, tokens = saved["step"], saved["seconds"], saved["tokens"]
    else:
        saved = torch.load(out / "answer.pt", weights_only=True)
    fill(added, saved["added"])
    train, packer, dev = (
        Pictures(data, "train"),
        Packer(tokenizer),
        few(Pictures(data, "dev"), "dev", 4, 12),
    )
    begun = time.time() - seconds
    saved_at, right = time.time(), defaultdict[str, list[float]](list)
    while step < steps and (time.time() - begun) / 60 < minutes:
        rng = random.Random(f"capsight/smol/across/{step}")
        looking, images = step < look, rng.choice((4, 4, 4, 8)) if step >= look else 4
        rows, questions, length = LOOKING if looking else SIZES[images]
        model.model.text_model.config.num_hidden_layers = PROBE + 1 if looking else len(layers)
        prompts = [
            packer.fitting(draw_repeats(train, rng, images, questions, across=2), length) for _ in range(rows)
        ]
        packed = packer(prompts, length if fuse else 0)
        if looking or step % 2:
            packed = hide(packed, image, Hidden.FROM_TEXT)
        logits = answers(model, packed, prompts)
        each = nn.functional.cross_entropy(logits, packed.target, reduction="none")
        count = torch.bincount(packed.question)
        loss = (each / count[packed.question]).sum() / len(count)
        doubt, hit, quiet = probe(packed.input_ids == image, [p.pictures for p in prompts])
        (doubt if looking else loss + 0.5 * doubt).backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        done = max(step / steps, (time.time() - begun) / 60 / minutes)
        optimiser.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 30) * max(0.03, 1 - done)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + int(packed.input_ids.numel())
        tasks = [q.task for p in prompts for q in p.questions if not looking]
        for task, wrong in zip(tasks, missed(logits.detach(), packed, len(count)), strict=False):
            right[task].append(1.0 - wrong)
        right["probe, repeats"] += [hit] if hit == hit else []
        right["probe, new"] += [quiet] if quiet == quiet else []
        if (
            time.time() - saved_at > (120 if looking else 280)
            or step == steps
            or (time.time() - begun) / 60 > minutes
        ):
            line: dict[str, Any] = {
                "step": step,
                "seconds": time.time() - begun,
                "tokens": tokens,
                "loss": loss.item(),
            }
            line["train"] = {k: round(sum(v) / len(v), 3) for k, v in sorted(right.items())}
            with torch.compiler.set_stance("force_eager"):  # of any length
                for name, hidden in (
                    (("dense", None), ("images apart", Hidden.FROM_IMAGES)) if not looking else ()
                ):
                    found = accuracy(model, packer, dev, hidden)
                    line[f"dev, 4 images, {name}"] = {k: f"{a}/{b}" for k, (a, b) in found.items()}
            saved_at, right = time.time(), defaultdict(list)
            print(json.dumps(line), flush=True)
            with (out / "across.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            state = {"added": added, "optimiser": optimiser.state_dict(), "probe": probe.state_dict()}
            torch.save(state | {"step": step, "tokens": tokens, "seconds": time.time() - begun}, file)


if __name__ == "__main__":
    typer.run(across)
