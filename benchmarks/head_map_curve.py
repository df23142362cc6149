"""Attention FLOPs saved against accuracy lost, on a judge; calibration and test data are disjoint.

    python benchmarks/head_map_curve.py
    python benchmarks/head_map_curve.py --judge smol --criteria mass,output --json FILE

Rows: criteria (mass, output, distribution) at equal FLOPs; several tolerances, with the largest alpha that
they allow, and with a given alpha and the recovery pass; controls (all heads of one category, random maps of
the same cost). Columns: attention FLOPs saved at every image count, exact match, its drop against the dense
model, agreement with it. sink_choice.py tests the options of the masks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from head_map_maps import Calibration, Row, rows_of, saved
from head_map_scoring import Score, Scored
from judges_known import REFERENCE, load_asked
from rich.console import Console
from rich.progress import track

from capsight.blindsight import HeadMap, MaskOptions, prompts
from capsight.cli.output import machine
from capsight.evaluation.prompting import process
from capsight.evaluation.score import difference_interval

CALIBRATION_IMAGES = (2, 4, 6, 8)
LEADS = {"smol": " ", "smol-repeats": " "}
"""What a judge writes before an answer."""
RESULT = Path(__file__).parent / "results" / "head_map_curve.json"


def tested(row: Row, tests: dict[int, list[Scored]], dense: dict[int, Score]) -> dict[str, Any]:
    """What a map does on the test prompts, as JSON."""
    found: dict[str, Any] = {
        "group": row.group,
        "name": row.name,
        **row.facts,
        "heads": {category.value: n for category, n in row.head_map.counts().items()},
        "options": asdict(row.head_map.options),
        "by_images": {},
    }
    total, before = Score(), sum(dense.values(), Score())
    for images, scored in tests.items():
        score = sum((prompt.score(row.head_map) for prompt in scored), Score())
        total += score
        found["by_images"][str(images)] = {
            "attention_saved": saved([prompt.layout for prompt in scored], row.head_map),
            "exact_match": 100 * score.right / score.questions,
            "drop": 100 * (dense[images].right - score.right) / score.questions,
            "agreement": 100 * score.agrees / score.questions,
        }
    low, high = difference_interval(before.outcomes, total.outcomes)
    return found | {
        "questions": total.questions,
        "exact_match": 100 * total.right / total.questions,
        "drop": 100 * (before.right - total.right) / total.questions,
        "drop_interval": [100 * low, 100 * high],
        "agreement": 100 * total.agrees / total.questions,
    }


def markdown(rows: Sequence[dict[str, Any]], images: Sequence[int]) -> str:
    """The table."""
    heads = [*(f"saved at {n} images, %" for n in images), "exact match, %", "drop, points", "agree, %"]
    lines = ["| maps | | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for row in rows:
        label = row["name"]
        if "share" in row:
            label += f", {row['share']:.0%} of the possible saving"
        if "tolerance" in row:
            label += f", tolerance {row['tolerance']:.0%}"
        cells = [f"{100 * row['by_images'][str(n)]['attention_saved']:.1f}" for n in images]
        cells += [f"{row['exact_match']:.1f}", f"{row['drop']:+.1f}", f"{row['agreement']:.1f}"]
        lines.append(f"| {row['group']} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    judge: Annotated[str, typer.Option(help="reference, or one of tools/judging.")] = REFERENCE,
    images: Annotated[str, typer.Option(help="Image counts of the test prompts.")] = "4,8",
    samples: Annotated[int, typer.Option(help="Test prompts per image count, six questions each.")] = 40,
    voting: Annotated[int, typer.Option(help="Calibration prompts that vote, per image count.")] = 3,
    held: Annotated[
        int, typer.Option(help="Calibration prompts that measure the drop, per image count.")
    ] = 5,
    criteria: Annotated[
        str, typer.Option(help="Criteria; output has to be there.")
    ] = "mass,output,distribution",
    shares: Annotated[
        str, typer.Option(help="Savings compared at equal FLOPs, of what the cheapest map (all Sink) saves.")
    ] = "0.25,0.5,0.75,0.9",
    tolerances: Annotated[
        str, typer.Option(help="Shares of held-out answers that may change.")
    ] = "0,0.01,0.02,0.05",
    dtype: Annotated[str, typer.Option(help="Of the model: bfloat16 or float32.")] = "float32",
    json_file: Annotated[Path, typer.Option("--json", help="Write the numbers here.")] = RESULT,
) -> None:
    """Calibrate, test, and print a table in markdown."""
    model, processor, items = load_asked(judge, getattr(torch, dtype))
    counts, began = [int(n) for n in images.split(",")], time.perf_counter()
    drawn = [items("calibration", n, voting) for n in CALIBRATION_IMAGES]
    given = [process(processor, item, [item.asks[0].question]) for some in drawn for item in some]
    calibration = Calibration(model, list(prompts(model, None, given)), MaskOptions(), criteria.split(","))
    kept = [i for n in CALIBRATION_IMAGES for i in items("calibration", n, held, first=voting)]
    lead = LEADS.get(judge, "")
    held_out = [
        Scored(model, processor, item, lead) for item in track(kept, "held-out prompts", transient=True)
    ]
    tests = {
        n: [
            Scored(model, processor, item, lead)
            for item in track(list(items("test", n, samples)), f"test, {n} images", transient=True)
        ]
        for n in counts
    }
    all_dense = HeadMap.all_dense(*calibration.size)
    dense = {n: sum((prompt.score(all_dense) for prompt in scored), Score()) for n, scored in tests.items()}
    saving, allowed = ([float(x) for x in text.split(",")] for text in (shares, tolerances))
    rows = rows_of(calibration, held_out, saving, allowed)
    results = [tested(row, tests, dense) for row in track(rows, "testing maps", transient=True)]
    json_file.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine(),
        "model": judge,
        "prompts": {"voting": len(given), "held_out": len(kept), "test, each image count": samples},
        "seconds": {"in all": time.perf_counter() - began, **calibration.seconds},
        "rows": results,
    }
    json_file.write_text(json.dumps(report, indent=1) + "\n")
    Console().print(markdown(results, counts), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
