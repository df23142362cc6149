"""Layer budgets: the same average shared out evenly and by water-filling, on the reference VLM.

    python benchmarks/layer_budget.py

One fit; the kept tokens of all layers together, and so the bytes, are the same for both budgets. Asked by the
protocol `after`, on test prompts, each question of both. `DEFAULT_BUDGET` in
`src/capsight/kvcapsule/budget.py` is to be what wins here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from capsight.cli.fit import calibration_items
from capsight.cli.models import REFERENCE, load_model
from capsight.cli.output import write_json
from capsight.cli.target import check_out
from capsight.evaluation import FULL, MethodResult, evaluate, paired, reference_items, summary
from capsight.evaluation.asking import process
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.budget import BUDGETS

RESULT = Path(__file__).parent / "results" / "layer_budget.json"
FILLED, UNIFORM = BUDGETS


def layers_of(capsules: Mapping[str, KVCapsule]) -> list[dict[str, Any]]:
    """What was measured of every layer, and what it keeps under each capsule."""
    first = next(iter(capsules.values())).info
    assert first.needs is not None
    return [
        {
            "index": layer.index,
            "attention": first.needs.attention[place],
            "errors": dict(zip(first.needs.kept, first.needs.errors[place], strict=True)),
            "kept": {name: capsule.info.layers[place].kept for name, capsule in capsules.items()},
        }
        for place, layer in enumerate(first.layers)
    ]


def markdown(report: Mapping[str, Any], budgets: Sequence[float]) -> str:
    """The table: both budgets at every average, and the paired difference."""
    methods, tests = report["methods"], {row["method"]: row for row in report["paired"]}
    full = methods[FULL]["exact_match"]
    lines = [
        f"Full cache: {full:.1f} % exact match, {methods[FULL]['questions']} questions.",
        "",
        "| average | uniform: exact, agrees | water-filled: exact, agrees | difference (95 % interval), p "
        "| kept by layer |",
        "|---|---|---|---|---|",
    ]
    for rho in budgets:
        shown = [methods[f"{name} {rho:g}"] for name in (UNIFORM, FILLED)]
        cells = [f"{m['exact_match']:.1f}, {m['agreement']:.1f}" for m in shown]
        test, filled = tests[f"{FILLED} {rho:g}"], f"{FILLED} {rho:g}"
        low, high = test["interval"]
        cells.append(f"{test['difference']:+.1f} ({low:+.1f} to {high:+.1f}), {test['p_value']:.3f}")
        cells.append(" ".join(str(layer["kept"][filled]) for layer in report["layers"]))
        lines.append(f"| {rho:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    samples: Annotated[int, typer.Option(help="Test prompts per image count, six questions each.")] = 20,
    images: Annotated[str, typer.Option(help="Image counts of the test prompts.")] = "4,8",
    retained: Annotated[str, typer.Option(help="Averages to compare at.")] = "0.4,0.2,0.1",
    calibration: Annotated[int, typer.Option(help="Calibration prompts to fit to.")] = 32,
    json: Annotated[Path, typer.Option(help="Write the figures here.")] = RESULT,
) -> None:
    """Fit once, ask with both budgets, print a table in markdown, write the figures."""
    json.parent.mkdir(parents=True, exist_ok=True)
    check_out(json)
    began = time.perf_counter()
    budgets = [float(rho) for rho in retained.split(",")]
    model, processor = load_model(REFERENCE)
    prompts = [
        process(processor, item, [item.asks[0].question])
        for item in calibration_items(REFERENCE, None, calibration)
    ]
    capsule = KVCapsule.fit(model, None, prompts, codec="heads")
    capsules = {
        f"{name} {rho:g}": capsule.with_budget(name).with_retained(rho) for rho in budgets for name in BUDGETS
    }
    items = [item for n in images.split(",") for item in reference_items("test", int(n), samples)]
    results: dict[str, MethodResult] = evaluate(
        model, processor, track(items, "asking", transient=True), capsules, "after"
    )
    report = {
        "model": REFERENCE,
        "protocol": "after",
        "images": images,
        "samples": samples,
        "calibration": calibration,
        "block_size": capsule.info.block_size,
        "layers": layers_of(capsules),
        "methods": summary(results),
        "paired": paired(results, FILLED),
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(json, report)
    Console().print(markdown(report, budgets), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
