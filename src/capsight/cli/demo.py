"""`capsight demo`: questions about six images, answered from the full cache and from capsules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn

from capsight.cli.demo_picture import draw_demo
from capsight.cli.demo_sides import Asked, Side, ask_sides
from capsight.cli.demo_tables import print_demo
from capsight.cli.models import REFERENCE, load_model, reference_head_map
from capsight.cli.options import BitsOption, CompressionOption, JsonOption, RetainedOption, chosen_capsule
from capsight.cli.output import console, write_json
from capsight.cli.target import check_out, write
from capsight.errors import OptionError
from capsight.evaluation import Ask, Item, exact_match
from capsight.kvcapsule import KVCapsule
from capsight.reference import split_prompt
from capsight.runtime import DECODES, check_decode


def demo(
    images: Annotated[int, typer.Option(help="Images in the prompt.")] = 6,
    questions: Annotated[int, typer.Option(help="Questions to ask.")] = 6,
    sample: Annotated[int, typer.Option(help="Which prompt of the test split.")] = 0,
    retained: RetainedOption = None,
    compression_ratio: CompressionOption = None,
    bits: BitsOption = None,
    decode: Annotated[
        str | None,
        typer.Option(help="materialise or latent; by default all that suit the capsule are timed."),
    ] = None,
    json: JsonOption = None,
    png: Annotated[Path, typer.Option(help="Picture of the images and answers.")] = Path("capsight-demo.png"),
) -> None:
    """Draw images nobody trained on, ask the reference VLM about them, and compare the caches."""
    if images < 1 or questions < 1:
        raise OptionError("images and questions must be at least 1")
    chosen = None if decode is None else check_decode(decode)
    check_out(json)
    check_out(png, others=[json])
    capsule = chosen_capsule(None, REFERENCE, retained, bits, compression_ratio)
    out = console(json)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), transient=True, console=out) as progress:
        task = progress.add_task("loading the reference VLM")
        model, processor = load_model(REFERENCE, "float32", "cpu")
        ways = (chosen,) if chosen is not None else DECODES if capsule.rebuilds else DECODES[1:]
        prompt = split_prompt("test", sample, images, questions)
        asks = tuple(Ask(q.text, q.answer, q.task) for q in prompt.questions)
        item = Item("demo", tuple(s.image for s in prompt.scenes), asks)
        stored = "" if capsule.info.bits is None else f", {capsule.info.bits} bits"
        asked = [
            Asked("full cache"),
            Asked(f"capsules, {capsule.retained:.0%} retained{stored}", capsule, decodes=ways),
        ]
        more = {}
        head_map = reference_head_map()
        if head_map is not None:
            more["with_head_map"] = Asked("capsules + head map", capsule, head_map, ways[:1])
        heads = KVCapsule.from_pretrained("reference-heads")
        more["heads"] = Asked(f"heads, {heads.retained:.0%} retained", heads, decodes=(chosen or "latent",))
        asked += more.values()
        sides = ask_sides(model, processor, item, asked, lambda text: progress.update(task, description=text))
    try:
        write_json(json, _figures(item, sides, [*more]))
        write(png, draw_demo(item, sides))
    finally:
        print_demo(out, item, sides)
    out.print(f"picture: {png}", soft_wrap=True)


def _figures(item: Item, sides: list[Side], more: Sequence[str]) -> dict[str, Any]:
    """The full cache and capsules under "sides"; what else was asked under the names in `more`."""
    figures: dict[str, Any] = {
        "images": len(item.images),
        "questions": [{"question": a.question, "answer": a.answer, "task": a.task} for a in item.asks],
        "sides": {side.name: _side_figures(item, side) for side in sides[:2]},
    }
    for name, side in zip(more, sides[2:], strict=True):
        saved = {"attention_flops_saved": side.flops.attention_saved, "prefill_flops_saved": side.flops.saved}
        figures[name] = {"name": side.name} | _side_figures(item, side) | saved
    return figures


def _side_figures(item: Item, side: Side) -> dict[str, Any]:
    right = [exact_match(t, a.answer) for t, a in zip(side.answers.texts, item.asks, strict=True)]
    figures = {
        "answers": list(side.answers.texts),
        "right": right,
        "kv_bytes": side.answers.nbytes.kv,
        "module_bytes": side.module_nbytes,
        "ttft_s": side.timing.ttft_s,
        "tokens_per_s": side.timing.tokens_per_s,
    }
    return figures if side.other is None else figures | {side.other.decode: side.other.to_dict()}
