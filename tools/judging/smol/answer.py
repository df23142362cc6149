"""Second lesson: the language model, with low-rank additions, learns to answer; the tower stays as it is.

python -m judging.smol.answer    (in tools/, after judging.smol.see)
"""

import random
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from judging.smol.asks import Prompt, draw_prompt, split_rng
from judging.smol.cards import counts
from judging.smol.course import Course, answer_loss, answered
from judging.smol.lora import adapt
from judging.smol.packed import Hidden, Packed, Packer, hide
from judging.smol.pictures import Pictures
from judging.smol.registry import DATA, RUN
from judging.smol.see import pixels
from judging.smol.tower import build, load_language, tokenizer_of

#: Images of a prompt -> (prompts of a step, most questions and all tokens of each): few shapes to compile.
SIZES = {1: (6, 8, 144), 2: (3, 11, 336), 4: (2, 16, 544), 8: (1, 22, 960)}
#: How much more frequent questions across images are in the lesson: they take longest to learn.
ACROSS = 3
#: Steps from which prompts of these numbers of images are drawn.
STAGES = ((0, (1, 1, 2)), (80, (1, 2, 4)), (250, (1, 2, 4, 4, 8)))


def load_tower(model: Any, file: Path) -> None:
    """Fill in the tower and the projector of `see` from its checkpoint, or from the file that ships."""
    if file.suffix == ".pt":
        state = torch.load(file, weights_only=True)["lesson"]
    else:
        state = load_file(file)
    parts = {"tower": model.model.vision_model, "connector": model.model.connector}
    for name, module in parts.items():
        mine = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in mine.items()})


def save_tower(checkpoint: Path, file: Path) -> None:
    """Write the tower and the projector of a checkpoint of `see` in bfloat16."""
    state = torch.load(checkpoint, weights_only=True)["lesson"]
    kept = {k: v for k, v in state.items() if k.split(".")[0] in ("tower", "connector")}
    kept = {k: v.bfloat16() if v.is_floating_point() else v for k, v in kept.items()}
    save_file({k: v.contiguous() for k, v in kept.items()}, file)


def student(data: Path, tower: Path) -> tuple[Any, Any, dict[str, nn.Parameter]]:
    """The frozen model in bfloat16, its tokenizer, and the additions to be trained."""
    tokenizer = tokenizer_of(data / "lm")
    model = build(tokenizer)
    load_language(model, data / "lm")
    load_tower(model, tower)
    model.bfloat16().requires_grad_(False).eval()
    model.model.text_model.set_attn_implementation("eager")  # fused attention is slow backwards in bfloat16
    return model, tokenizer, adapt(model.model.text_model)


def fill(added: dict[str, nn.Parameter], saved: dict[str, Tensor]) -> None:
    """Put trained additions in the place of those that `adapt` made."""
    for name, p in added.items():
        p.data.copy_(saved[name])


def compiled(layers: Iterable[nn.Module]) -> None:
    """Compile layers, each anew for every length."""
    torch._dynamo.config.recompile_limit = 64  # four lengths; layers with and without additions
    for layer in layers:
        layer.compile(dynamic=False)


def answers(model: Any, packed: Packed, prompts: list[Prompt]) -> Tensor:
    """[N, vocabulary] logits at `packed.at`."""
    inner = model.model
    with torch.no_grad():
        embeds = inner.text_model.embed_tokens(packed.input_ids)
        images = pixels([p for prompt in prompts for p in prompt.pictures]).to(embeds.dtype)
        tokens = inner.connector(inner.vision_model(images).last_hidden_state).to(embeds.dtype)
        where = (packed.input_ids == model.config.image_token_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(where, tokens.flatten(0, 1))
        unseen = ~packed.mask
        mask = torch.zeros(unseen.shape, dtype=embeds.dtype)
        mask = mask.masked_fill(unseen, torch.finfo(embeds.dtype).min)
    hidden = inner.text_model(
        inputs_embeds=embeds, position_ids=packed.position_ids, attention_mask=mask, use_cache=False
    ).last_hidden_state
    logits: Tensor = model.lm_head(hidden.flatten(0, 1)[packed.at]).float()
    return logits


@torch.no_grad()
def accuracy(
    model: Any, packer: Packer, prompts: Sequence[Prompt], hidden: Hidden | None = None
) -> dict[str, tuple[int, int]]:
    """(right, asked) by kind; right when every token of the answer would have been said."""
    found: dict[str, list[bool]] = defaultdict(list)
    for prompt in prompts:
        packed = packer([prompt])
        if hidden is not None:
            packed = hide(packed, model.config.image_token_id, hidden)
        hit = answers(model, packed, [prompt]).argmax(-1) == packed.target
        for number, question in enumerate(prompt.questions):
            found[question.task].append(bool(hit[packed.question == number].all()))
    return {k: (sum(v), len(v)) for k, v in found.items()}


def held_out(source: Pictures, split: str, images: int, prompts: int, questions: int = 16) -> list[Prompt]:
    """The first prompts of a split, all kinds asked."""
    rngs = (split_rng(split, index, f"{images} images") for index in range(prompts))
    return [draw_prompt(source, rng, images, questions) for rng in rngs]


def answer(
    data: Annotated[Path, typer.Option(help="Folder of `registry.fetch`.")] = DATA,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoints; goes on where a run stopped.")] = RUN,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 900,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1.5e-3,
    minutes: Annotated[float, typer.Option(help="The rate falls to nothing by then, if sooner.")] = 1e9,
    fuse: Annotated[bool, typer.Option(help="Compile the layers; needs g++.")] = bool(shutil.which("g++")),
) -> None:
    """Train the low-rank additions."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokenizer, added = student(data, out / "see.pt")
    if fuse:
        compiled(model.model.text_model.layers)
    course = Course(out / "answer.pt", [*added.values()], steps, rate, minutes)
    if course.saved is not None:
        fill(added, course.saved["added"])
    train, packer = Pictures(data, "train"), Packer(tokenizer)
    few = held_out(Pictures(data, "dev"), "dev", 4, 3)
    while course.goes_on():
        rng = random.Random(f"capsight/smol/answer/{course.step}")
        images = rng.choice([sizes for first, sizes in STAGES if course.step >= first][-1])
        rows, questions, length = SIZES[images]
        prompts = [draw_prompt(train, rng, images, questions, across=ACROSS) for _ in range(rows)]
        prompts = [packer.fitting(prompt, length) for prompt in prompts]
        packed = packer(prompts, length)
        logits = answers(model, packed, prompts)
        loss = answer_loss(logits, packed)
        course.learn(loss, packed.input_ids.numel())
        tasks = [q.task for p in prompts for q in p.questions]
        for task, right in zip(tasks, answered(logits.detach(), packed), strict=True):
            course.right[task].append(right)
        if course.is_due(90):
            with torch.compiler.set_stance("force_eager"):  # of any length
                few_dev = accuracy(model, packer, few)
            course.save(loss, {"dev, 4 images": counts(few_dev, few_dev)}, added=added)


if __name__ == "__main__":
    typer.run(answer)
