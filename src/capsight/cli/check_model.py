"""`capsight check-model`: what works for a model's class, tried on a tiny copy with random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from capsight.checking import CHECKS, Case, run_checks, tiny_model
from capsight.cli.models import REFERENCE, load_config
from capsight.cli.options import JsonOption
from capsight.cli.output import console, write_json
from capsight.cli.target import check_out
from capsight.errors import CapsightError, OptionError
from capsight.layout.families import family_for
from capsight.processors import load_processor
from capsight.reference.loader import load_reference_processor

_MARKS = {True: ("yes", "green"), False: ("NO", "red"), None: ("-", "")}


def check_model(
    model: Annotated[str, typer.Argument(help="'reference', a folder or a hub id; weights are not read.")],
    check: Annotated[list[str] | None, typer.Option(help=f"Only this one: {', '.join(CHECKS)}.")] = None,
    size: Annotated[int, typer.Option(help="Side of the pictures, in pixels.")] = 224,
    json: JsonOption = None,
) -> None:
    """Build a tiny copy of a model with random weights and try all that capsight does with it.

    Equality with the full cache is exact there; it says nothing of accuracy on the trained weights.
    """
    check_out(json)
    if size < 1:
        raise OptionError(f"the side of a picture is positive, not {size}")
    config = load_config(model)
    family_for(config)
    processor = load_reference_processor() if model == REFERENCE else load_processor(model)
    case = Case(tiny_model(config), _prompts(processor), ((size, size), (size * 3 // 2, size)))
    results = run_checks(case, check)
    table = Table("check", "works", "seen", title=f"{model} ({config.model_type})")
    for result in results:
        table.add_row(result.name, Text(*_MARKS[result.passed]), result.detail)
    try:
        checks = list(map(asdict, results))
        write_json(json, {"model": model, "model_type": config.model_type, "checks": checks})
    finally:
        console(json).print(table)
    failed = [result.name for result in results if result.passed is False]
    if failed:
        raise CapsightError(f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}")


def _prompts(processor: Any) -> Any:
    """Makes batches with the model's own chat template."""
    if not getattr(processor, "chat_template", None):
        raise OptionError(
            f"the {type(processor).__name__} has no chat template; save one with it, so that prompts "
            "can be written as the model expects them"
        )

    def make(rows: Sequence[tuple[Sequence[Any], str]]) -> Mapping[str, Any]:
        texts = []
        for pictures, text in rows:
            content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}]
            texts.append(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        images = [list(pictures) for pictures, _ in rows if pictures]
        given = {"images": images} if images else {}
        inputs: Mapping[str, Any] = processor(text=texts, padding=True, return_tensors="pt", **given)
        return inputs

    return make
