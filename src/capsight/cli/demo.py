"""`capsight demo`: questions about six images, answered from the full cache and from capsules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn

from capsight.cli.demo_picture import draw_demo
from capsight.cli.demo_sides import Asked, Pace, Side, ask_sides
from capsight.cli.demo_tables import print_demo
from capsight.cli.models import REFERENCE, load_model, reference_head_map
from capsight.cli.options import BitsOption, CompressionOption, JsonOption, RetainedOption, chosen_capsule
from capsight.cli.output import console, write_json
from capsight.cli.target import check_out, write
from capsight.errors import OptionError
from capsight.evaluation import Ask, Item, exact_match
from capsight.kvcapsule import KVCapsule
from capsight.reference import split_prompt
from capsight.runtime import check_decode


def demo(
    images: Annotated[int, typer.Option(help="Images in the prompt.")] = 6,
    questions: Annotated[int, typer.Option(help="Questions to ask.")] = 6,
    sample: Annotated[int, typer.Option(help="Which prompt of the test split.")] = 0,
    retained: RetainedOption = None,
    compression_ratio: CompressionOption = None,
    bits: BitsOption = None,
    decode: Annotated[
        str,
        typer.Option(help="latent attends to capsules as they are, materialise rebuilds keys and values."),
    ] = "latent",
    compiled: Annotated[
        bool, typer.Option(help="Time compiled decode steps, too; that takes a minute the first time.")
    ] = True,
    json: JsonOption = None,
    png: Annotated[Path, typer.Option(help="Picture of the images and answers.")] = Path("capsight-demo.png"),
) -> None:
    """Draw images nobody trained on, ask the reference VLM about them, and compare the caches."""
    if images < 1 or questions < 1:
        raise OptionError("images and questions must be at least 1")
    way = check_decode(decode)
    check_out(json)
    check_out(png, others=[json])
    capsule = chosen_capsule(None, REFERENCE, retained, bits, compression_ratio)
    out = console(json)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), transient=True, console=out) as progress:
        task = progress.add_task("loading the reference VLM")
        model, processor = load_model(REFERENCE, "float32", "cpu")
        prompt = split_prompt("test", sample, images, questions)
        asks = tuple(Ask(q.text, q.answer, q.task) for q in prompt.questions)
        item = Item("demo", tuple(s.image for s in prompt.scenes), asks)
        codec, stored = capsule.info.codec, "" if capsule.info.bits is None else f", {capsule.info.bits} bits"
        heads = KVCapsule.from_pretrained("reference-heads")
        asked = {  # fast decoding first, then small caches
            "full": Asked("full cache"),
            "heads": Asked(f"heads, {heads.retained:.0%} retained", heads, decode=way),
            "default": Asked(f"{codec}, {capsule.retained:.0%} retained{stored}", capsule, decode=way),
        }
        head_map = reference_head_map()
        if head_map is not None:
            asked["with_head_map"] = Asked(f"{codec} + head map", capsule, head_map, way)

        def on_step(text: str) -> None:
            progress.update(task, description=text)

        found = ask_sides(model, processor, item, [*asked.values()], compiled, on_step)
    sides = dict(zip(asked, found, strict=True))
    try:
        write_json(json, _figures(item, sides))
        write(png, draw_demo(item, found))
    finally:
        print_demo(out, item, found)
    out.print(f"picture: {png}", soft_wrap=True)


def _figures(item: Item, sides: Mapping[str, Side]) -> dict[str, Any]:
    """The full cache and the default under "sides"; what else was asked under its name."""
    figures: dict[str, Any] = {
        "images": len(item.images),
        "questions": [{"question": a.question, "answer": a.answer, "task": a.task} for a in item.asks],
        "sides": {sides[name].name: _side_figures(item, sides[name]) for name in ("full", "default")},
    }
    for name, side in sides.items():
        if name in ("full", "default"):
            continue
        saved = {"attention_flops_saved": side.flops.attention_saved, "prefill_flops_saved": side.flops.saved}
        figures[name] = {"name": side.name} | _side_figures(item, side) | saved
    return figures


def _side_figures(item: Item, side: Side) -> dict[str, Any]:
    right = [exact_match(t, a.answer) for t, a in zip(side.answers.texts, item.asks, strict=True)]
    paces = {"eager": side.eager, "compiled": side.compiled}
    return {
        "answers": list(side.answers.texts),
        "right": right,
        "kv_bytes": side.answers.nbytes.kv,
        "module_bytes": side.module_nbytes,
        "ttft_s": side.eager.timing.ttft_s,
        "ttft_ratio": side.eager.ratios.ttft_s,
        **_speed(side.fastest),
        "steps": {name: _speed(pace) for name, pace in paces.items() if pace is not None},
    }


def _speed(pace: Pace) -> dict[str, float]:
    return {"tokens_per_s": pace.timing.tokens_per_s, "speed_ratio": pace.ratios.tokens_per_s}
