"""KVCapsule's choices against their alternatives, at equal bytes, on the reference VLM.

    python benchmarks/ablations.py

Everything is fitted to the same calibration prompts and asked the same test prompts (disjoint), protocol
`after`. Beside accuracy: agreement with the full cache, relative errors of rebuilt keys and values, and
of the attention logits that the queries after the images would have.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import ablations_page
import torch
import typer
from ablation_calibration import Blocks, calibrate
from ablation_heads import TABLES as HEADS_TABLES
from ablation_metrics import output_moments
from ablation_places import BeforeRope, Tiles
from ablation_variants import (
    BEFORE,
    RUNS,
    TABLES,
    TILES,
    VALUE_TILES,
    Variant,
    variants,
    variants_of_heads,
)
from rich.console import Console
from rich.progress import Progress, track
from torch import Tensor

from capsight.cli.fit import calibration_items
from capsight.cli.models import REFERENCE, load_model
from capsight.cli.output import machine, write_json
from capsight.cli.target import check_out
from capsight.evaluation import Item, MethodResult, evaluate, reference_items, summary
from capsight.evaluation.asking import process
from capsight.evaluation.score import difference_interval, mcnemar_p
from capsight.kvcapsule.calibration.fit import kept_tokens
from capsight.kvcapsule.plan import DEFAULT_BLOCK_SIZE

RESULT = Path(__file__).parent / "results" / "ablations.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "ablations.md"


def prefilled(model: Any, processor: Any, items: Sequence[Item], what: str) -> Iterable[Blocks]:
    """The blocks of items, each with its first question."""
    for item in track(items, what, transient=True):
        inputs = process(processor, item, [item.asks[0].question])
        yield Blocks.prefilled(model, inputs, DEFAULT_BLOCK_SIZE)


@torch.no_grad()
def errors(variant: Variant, prompts: Sequence[Blocks]) -> dict[str, float]:
    """Relative errors of what is rebuilt, the mean over layers: |K^ - K| / |K|, likewise for V and Q K^T."""
    layers = range(len(prompts[0].keys))
    squares = torch.zeros(len(layers), 3, 2, dtype=torch.float64)  # keys, values, logits; error, all
    for prompt in prompts:
        bound = variant.bound(prompt.layout)
        codecs = [bound[layer] for layer in layers]
        payloads = type(codecs[0]).encode_layers(codecs, prompt.keys, prompt.values, prompt.plan.runs)
        for layer, (codec, payload) in enumerate(zip(codecs, payloads, strict=True)):
            whole = prompt.keys[layer], prompt.values[layer]
            wrong = [a - b for a, b in zip(codec.decode(payload), whole, strict=True)]
            for place, (keys, values) in enumerate((wrong, whole)):
                logits = _logits(keys, prompt.queries[layer])
                squares[layer, :, place] += torch.stack([keys.square().sum(), values.square().sum(), logits])
    found = (squares[:, :, 0] / squares[:, :, 1]).sqrt().mean(0).tolist()
    return dict(zip(("key_error", "value_error", "logit_error"), found, strict=True))


def _logits(keys: Tensor, queries: Tensor) -> Tensor:
    """Mean squared score of queries with second moment `[H, D, D]` over `[M, H, N, D]`, times M N."""
    return ((keys @ queries) * keys).sum()


def compared(
    results: Mapping[str, MethodResult], tables: Mapping[str, Mapping[str, str]], budgets: Sequence[float]
) -> dict[str, list[dict[str, Any]]]:
    """By table, its rows: each against the first of the table at the same budget, on the same questions."""
    found = {}
    for title, rows in tables.items():
        found[title] = [
            {"label": label, "retained": rho, "method": f"{name} {rho:g}"}
            | against(results[f"{name} {rho:g}"], results[f"{next(iter(rows.values()))} {rho:g}"])
            for rho in budgets
            for label, name in rows.items()
        ]
    return found


def against(ours: MethodResult, first: MethodResult) -> dict[str, Any]:
    """How many points more `ours` has, with a 95 % interval, and the p-value of a paired test."""
    right = [[outcome.right for outcome in result.outcomes] for result in (ours, first)]
    interval = [100 * end for end in difference_interval(ours.outcomes, first.outcomes)]
    points = 100 * (sum(right[0]) - sum(right[1])) / len(right[0])
    return {"difference": points, "interval": interval, "p_value": mcnemar_p(*right)}


def main(
    samples: Annotated[int, typer.Option(help="Test prompts per image count, six questions each.")] = 16,
    images: Annotated[str, typer.Option(help="Image counts of the test prompts.")] = "4,8",
    retained: Annotated[str, typer.Option(help="Retained fractions.")] = "0.4,0.2",
    heads_retained: Annotated[
        str, typer.Option(help="Retained fractions of variants of heads.")
    ] = "0.1,0.05",
    calibration: Annotated[int, typer.Option(help="Calibration prompts.")] = 96,
    json_file: Annotated[Path, typer.Option("--json", help="Write the numbers here.")] = RESULT,
    page: Annotated[Path, typer.Option(help="Write the page here.")] = PAGE,
) -> None:
    """Fit, test, write the numbers and the page."""
    json_file.parent.mkdir(parents=True, exist_ok=True)
    check_out(page)
    model, processor = load_model(REFERENCE)
    counts = [int(n) for n in images.split(",")]
    budgets, few = ([float(rho) for rho in text.split(",")] for text in (retained, heads_retained))
    arrangements = {
        RUNS: None,
        BEFORE: BeforeRope(model.get_decoder().rotary_emb),
        TILES: Tiles(8, 8, keys=True),
        VALUE_TILES: Tiles(8, 8, keys=False),
    }
    began = time.perf_counter()
    drawn = calibration_items(REFERENCE, None, calibration)
    seen = calibrate(prefilled(model, processor, drawn, "calibrating"), arrangements, output_moments(model))
    methods = {
        f"{variant.name} {rho:g}": variant
        for make, fractions in ((variants, budgets), (variants_of_heads, few))
        for rho in fractions
        for variant in track(
            make(seen, kept_tokens(rho, DEFAULT_BLOCK_SIZE)), f"fitting at {rho:g}", transient=True
        )
    }
    fitted = time.perf_counter()
    items = [item for n in counts for item in reference_items("test", n, samples)]
    looked_at = [item for n in counts for item in reference_items("test", n, min(samples, 4))]
    blocks = list(prefilled(model, processor, looked_at, "test prompts"))
    rebuilt = {
        name: {} if variant.needs_attention else errors(variant, blocks)
        for name, variant in track(methods.items(), "errors", transient=True)
    }
    with Progress(transient=True) as bar:
        task = bar.add_task("asking", total=len(items))
        results = evaluate(model, processor, items, methods, on_item=lambda *_: bar.advance(task))
    report = {
        "model": REFERENCE,
        "protocol": "after",
        "images": counts,
        "samples": samples,
        "retained": budgets,
        "calibration": {"prompts": seen.prompts, "blocks": seen.blocks},
        "seconds": {"fit": fitted - began, "test": time.perf_counter() - fitted},
        "methods": {name: row | rebuilt.get(name, {}) for name, row in summary(results).items()},
        "tables": compared(results, HEADS_TABLES, few) | compared(results, TABLES, budgets),
    }
    write_json(json_file, report)
    text = ablations_page.page(report | {"machine": machine()})
    page.write_text(text)
    Console().print(text, soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    typer.run(main)
