"""Which tokens are sinks, and how far Sink heads see into their own image, tested on the reference VLM.

    python benchmarks/sink_choice.py

Every map has all heads of one category, so that within a group nothing but the option differs:

* sinks: all Intra-Image+Sink, with an image's delimiters, its first k tokens or both as sinks; all
  Intra-Image is the row without sinks.
* own image: all Sink, seeing the nearest w tokens of their own image; all Intra-Image+Sink is the row that
  sees all of it.

Columns as in head_map_curve.py.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from head_map_curve import markdown, tested
from head_map_maps import Row
from head_map_scoring import Score, Scored
from rich.console import Console
from rich.progress import track

from capsight import load_reference_vlm
from capsight.blindsight import Category, HeadMap, MaskOptions
from capsight.blindsight.calibrate.capture import shape_of
from capsight.cli.output import machine
from capsight.evaluation import reference_items

SINK_TOKENS, OWN_WINDOWS = (1, 4, 16), (1, 8, 32)
RESULT = Path(__file__).parent / "results" / "sink_choice.json"


def rows_of(size: tuple[int, int]) -> list[Row]:
    """Every map there is to test, for a model of so many layers and heads."""
    both, default = Category.INTRA_IMAGE_SINK, MaskOptions()

    def row(group: str, name: str, category: Category, options: MaskOptions) -> Row:
        return Row(group, name, HeadMap.uniform(category, *size, options), {})

    rows = [row("sinks", "none", Category.INTRA_IMAGE, default)]
    rows += [row("sinks", "delimiters", both, MaskOptions(sink_tokens=0))]
    rows += [row("sinks", f"first {k}", both, MaskOptions(False, k)) for k in SINK_TOKENS]
    rows += [row("sinks", f"delimiters, first {k}", both, MaskOptions(True, k)) for k in SINK_TOKENS]
    rows += [row("own image", f"nearest {w}", Category.SINK, MaskOptions(own_window=w)) for w in OWN_WINDOWS]
    return [*rows, row("own image", "all of it", both, default)]


def main(
    images: Annotated[str, typer.Option(help="Image counts of the test prompts.")] = "4,8",
    samples: Annotated[int, typer.Option(help="Test prompts per image count, six questions each.")] = 20,
    json_file: Annotated[Path, typer.Option("--json", help="Write the numbers here.")] = RESULT,
) -> None:
    """Test every option and print a table in markdown."""
    model, processor = load_reference_vlm()
    counts, began = [int(n) for n in images.split(",")], time.perf_counter()
    tests = {
        n: [
            Scored(model, processor, item)
            for item in track(list(reference_items("test", n, samples)), f"{n} images", transient=True)
        ]
        for n in counts
    }
    size = shape_of(model)
    all_dense = HeadMap.all_dense(*size)
    dense = {n: sum((prompt.score(all_dense) for prompt in scored), Score()) for n, scored in tests.items()}
    rows = [Row("dense", "all dense", all_dense, {}), *rows_of(size)]
    results = [tested(row, tests, dense) for row in track(rows, "testing maps", transient=True)]
    json_file.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine(),
        "model": "reference",
        "prompts, each image count": samples,
        "seconds": time.perf_counter() - began,
        "rows": results,
    }
    json_file.write_text(json.dumps(report, indent=1) + "\n")
    Console().print(markdown(results, counts), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
