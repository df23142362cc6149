"""`capsight demo`: several questions about six images, the full cache beside capsules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from capsight.cli.demo_picture import draw_demo
from capsight.cli.models import REFERENCE, check_out, load_capsule, load_model
from capsight.cli.output import human_bytes, write_json
from capsight.errors import OptionError
from capsight.evaluation import Answers, Ask, Item, ask_item, exact_match
from capsight.evaluation.asking import process
from capsight.evaluation.timing import Timing, time_generation
from capsight.kvcapsule import KVCapsule
from capsight.reference import split_prompt
from capsight.runtime import enable


@dataclass(frozen=True, slots=True)
class Side:
    """One side of the comparison."""

    name: str
    answers: Answers
    timing: Timing
    module_nbytes: int


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
    """Draw images nobody trained on, ask the reference VLM about them, and compare the two caches."""
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
        ours = _side(f"capsules, {capsule.retained:.0%} retained", model, processor, item, capsule)
    _print(console, item, full, ours)
    draw_demo(png, item, {side.name: side.answers.texts for side in (full, ours)})
    console.print(f"picture: {png}")
    write_json(json, _figures(item, full, ours))


def _side(name: str, model: Any, processor: Any, item: Item, capsule: KVCapsule | None) -> Side:
    with enable(model, capsule=capsule) as fast, torch.no_grad():
        answers = ask_item(fast, processor, item, "after")
        inputs = process(processor, item, [item.asks[0].question])
        timing = time_generation(fast, inputs)
    return Side(name, answers, timing, 0 if capsule is None else capsule.module_nbytes)


def _print(console: Console, item: Item, full: Side, ours: Side) -> None:
    def verdict(answer: str, ask: Ask) -> str:
        mark = "[green]✓[/]" if exact_match(answer, ask.answer) else "[red]✗[/]"
        return f"{mark} {answer}"

    table = Table("question", "right answer", full.name, ours.name, title=f"{len(item.images)} images")
    for i, ask in enumerate(item.asks):
        table.add_row(
            ask.question, ask.answer, verdict(full.answers.texts[i], ask), verdict(ours.answers.texts[i], ask)
        )
    console.print(table)
    costs = Table("", full.name, ours.name, "ratio")
    kv_full, kv_ours = full.answers.nbytes, ours.answers.nbytes
    costs.add_row("KV cache", human_bytes(kv_full), human_bytes(kv_ours), f"{kv_full / kv_ours:.2f}x smaller")
    total = kv_ours + ours.module_nbytes
    costs.add_row("with modules", human_bytes(kv_full), human_bytes(total), f"{kv_full / total:.2f}x smaller")
    a, b = full.timing, ours.timing
    costs.add_row(
        "first token", f"{a.ttft_s * 1e3:.0f} ms", f"{b.ttft_s * 1e3:.0f} ms", f"{b.ttft_s / a.ttft_s:.2f}"
    )
    costs.add_row(
        "decode",
        f"{a.tokens_per_s:.0f} tok/s",
        f"{b.tokens_per_s:.0f} tok/s",
        f"{b.tokens_per_s / a.tokens_per_s:.2f}",
    )
    console.print(costs)


def _figures(item: Item, *sides: Side) -> dict[str, Any]:
    return {
        "images": len(item.images),
        "questions": [{"question": a.question, "answer": a.answer, "task": a.task} for a in item.asks],
        "sides": {
            side.name: {
                "answers": list(side.answers.texts),
                "right": [
                    exact_match(t, a.answer) for t, a in zip(side.answers.texts, item.asks, strict=True)
                ],
                "kv_bytes": side.answers.nbytes,
                "module_bytes": side.module_nbytes,
                "ttft_s": side.timing.ttft_s,
                "tokens_per_s": side.timing.tokens_per_s,
            }
            for side in sides
        },
    }
