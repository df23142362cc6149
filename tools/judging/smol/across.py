"""Third lesson: image tokens learn to look at other images while they are read; additions of their own.

    python -m judging.smol.across    (in tools/, after judging.smol.answer)

It goes on from the additions of `answer` with prompts of `repeats`. A probe after layer `PROBE`, thrown away,
has to say from a picture's own tokens whether an earlier picture shows the same: alone at first, when later
layers do not run, then beside the answers. In the first part, and in every other step of the second, the text
between the images sees no image, so that it cannot do the comparing for them.
"""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from judging.smol.answer import accuracy, answers, compiled, fill, student
from judging.smol.asks import Prompt
from judging.smol.cards import counts
from judging.smol.course import Course, answer_loss, answered
from judging.smol.packed import Hidden, Packer, hide
from judging.smol.pictures import Picture, Pictures
from judging.smol.registry import DATA, RUN
from judging.smol.repeats import draw_repeats, repeated, repeats_rng

PROBE = 12
#: Images of a prompt -> (prompts of a step, most questions and all tokens of each); of the first part.
SIZES, LOOKING = {4: (3, 2, 400), 8: (1, 4, 960)}, (3, 1, 336)

#: How answers to held-out questions are measured: with everything seen, and images apart.
HIDDEN = (("dense", None), ("images apart", Hidden.FROM_IMAGES))


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
    course = Course(out / "across.pt", [*added.values(), *probe.parameters()], steps, rate, minutes)
    saved = course.saved
    if saved is None:
        saved = torch.load(out / "answer.pt", weights_only=True)
    else:
        probe.load_state_dict(saved["probe"])
    fill(added, saved["added"])
    train, packer, dev = Pictures(data, "train"), Packer(tokenizer), few(Pictures(data, "dev"), "dev", 4, 12)
    while course.goes_on():
        step = course.step
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
        loss = answer_loss(logits, packed)
        doubt, hit, quiet = probe(packed.input_ids == image, [p.pictures for p in prompts])
        course.learn(doubt if looking else loss + 0.5 * doubt, packed.input_ids.numel())
        if not looking:
            tasks = [q.task for p in prompts for q in p.questions]
            for task, right in zip(tasks, answered(logits.detach(), packed), strict=True):
                course.right[task].append(right)
        course.right["probe, repeats"] += [hit] if hit == hit else []
        course.right["probe, new"] += [quiet] if quiet == quiet else []
        if course.is_due(120 if looking else 280):
            measured = {}
            with torch.compiler.set_stance("force_eager"):  # of any length
                for name, hidden in () if looking else HIDDEN:
                    dev_right = accuracy(model, packer, dev, hidden)
                    measured[f"dev, 4 images, {name}"] = counts(dev_right, dev_right)
            course.save(loss, measured, added=added, probe=probe.state_dict())


if __name__ == "__main__":
    typer.run(across)
