"""`capsight demo`: questions about six images, answered from the full cache, capsules, and a head map."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from capsight.blindsight import HeadMap, prefill_flops
from capsight.cli.demo_picture import draw_demo
from capsight.cli.demo_tables import Side, print_demo
from capsight.cli.models import REFERENCE, check_out, load_capsule, load_model, reference_head_map
from capsight.cli.output import write_json
from capsight.errors import OptionError
from capsight.evaluation import Ask, Item, ask_item, exact_match
from capsight.evaluation.asking import process
from capsight.evaluation.timing import time_generation
from capsight.kvcapsule import KVCapsule
from capsight.layout import build_layout
from capsight.reference import split_prompt
from capsight.runtime import enable


def demo(
    images: Annotated[int, typer.Option(help="Images in the prompt.")] = 6,
    questions: Annotated[int, typer.Option(help="Questions to ask.")] = 6,
    sample: Annotated[int, typer.Option(help="Which prompt of the test split.")] = 0,
    retained: Annotated[
        float | None, typer.Option(help="Another retained fraction than the capsule's.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    png: Annotated[Path, typer.Option(help="Picture of the images and answers.")] = Path("capsight-demo.png"),
) -> None:
    """Draw images nobody trained on, ask the reference VLM about them, and compare the caches."""
    if images < 1 or questions < 1:
        raise OptionError("images and questions must be at least 1")
    check_out(json)
    check_out(png)
    console = Console()
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), transient=True) as progress:
        task = progress.add_task("loading the reference VLM")
        model, processor = load_model(REFERENCE)
        capsule = load_capsule(None, REFERENCE)
        if retained is not None:
            capsule = capsule.with_retained(retained)
        prompt = split_prompt("test", sample, images, questions)
        asks = tuple(Ask(q.text, q.answer, q.task) for q in prompt.questions)
        item = Item("demo", tuple(s.image for s in prompt.scenes), asks)
        progress.update(task, description="asking with the full cache")
        full = _side("full cache", model, processor, item, None)
        progress.update(task, description="asking with capsules")
        sides = [full, _side(f"capsules, {capsule.retained:.0%} retained", model, processor, item, capsule)]
        head_map = reference_head_map()
        if head_map is not None:
            progress.update(task, description="asking with capsules after sparse prefill")
            sides.append(_side("capsules + head map", model, processor, item, capsule, head_map))
    print_demo(console, item, sides)
    draw_demo(png, item, {side.name: side.answers.texts for side in sides})
    console.print(f"picture: {png}")
    write_json(json, _figures(item, sides))


def _side(
    name: str,
    model: Any,
    processor: Any,
    item: Item,
    capsule: KVCapsule | None,
    head_map: HeadMap | None = None,
) -> Side:
    text = model.config.get_text_config()
    dense = HeadMap.all_dense(text.num_hidden_layers, text.num_attention_heads)
    with enable(model, capsule=capsule, head_map=head_map) as fast, torch.no_grad():
        answers = ask_item(fast, processor, item, "after")
        inputs = process(processor, item, [item.asks[0].question])
        timing = time_generation(fast, inputs)
    flops = prefill_flops(model, build_layout(inputs, model.config), head_map or dense)
    return Side(name, answers, timing, 0 if capsule is None else capsule.module_nbytes, flops)


def _figures(item: Item, sides: list[Side]) -> dict[str, Any]:
    """The full cache and capsules under "sides"; capsules after sparse prefill, if any, on their own."""
    figures: dict[str, Any] = {
        "images": len(item.images),
        "questions": [{"question": a.question, "answer": a.answer, "task": a.task} for a in item.asks],
        "sides": {side.name: _side_figures(item, side) for side in sides[:2]},
    }
    for side in sides[2:]:
        saved = {"attention_flops_saved": side.flops.attention_saved, "prefill_flops_saved": side.flops.saved}
        figures["with_head_map"] = {"name": side.name} | _side_figures(item, side) | saved
    return figures


def _side_figures(item: Item, side: Side) -> dict[str, Any]:
    right = [exact_match(t, a.answer) for t, a in zip(side.answers.texts, item.asks, strict=True)]
    return {
        "answers": list(side.answers.texts),
        "right": right,
        "kv_bytes": side.answers.nbytes,
        "module_bytes": side.module_nbytes,
        "ttft_s": side.timing.ttft_s,
        "tokens_per_s": side.timing.tokens_per_s,
    }
