"""Methods on the small judges beside the full cache, by kind of question, protocol `after`.

    python benchmarks/judges.py --judge mosaic --judge tiles --method heads --retained 0.4,0.2

A judge is a trained VLM of another shape, class and picture style than the reference VLM (`tools/judging`).
Methods are fitted to its calibration split and asked its `dev` split, on which choices may be made;
`--split test` is for figures that are published.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from capsight.cli.evaluate_tables import print_report
from capsight.cli.methods import METHOD_NAMES, make_methods
from capsight.cli.output import machine, write_json
from capsight.evaluation import evaluate, summary
from capsight.evaluation.prompting import process
from capsight.kvcapsule import KVCapsule

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from judging.loader import judge_items, load_judge

LONGEST_ANSWER = 48
"""Most tokens of an answer: a description takes up to 30."""


def calibration_samples(judge: str, processor: Any, count: int = 16) -> list[Any]:
    """Processor outputs of `count` calibration prompts each of 1, 2 and 4 pictures."""
    items = [item for n in (1, 2, 4) for item in judge_items(judge, "calibration", n, count)]
    return [process(processor, item, [item.asks[0].question]) for item in items]


def judged(
    judge: str,
    methods: list[str],
    retained: list[float],
    pictures: list[int],
    prompts: int,
    split: str,
    block: int,
) -> dict[str, Any]:
    """The summary (`capsight.evaluation.summary`) of methods on one judge."""
    model, processor = load_judge(judge)
    samples = calibration_samples(judge, processor)

    def fitted() -> KVCapsule:
        return KVCapsule.fit(model, processor, samples, codec="heads", block_size=block, progress=False)

    made = make_methods(methods, retained, fitted, lambda: samples, model)
    items = [item for n in pictures for item in judge_items(judge, split, n, prompts)]
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        bar = progress.add_task(judge, total=len(items))
        results = evaluate(
            model,
            processor,
            items,
            made,
            max_new_tokens=LONGEST_ANSWER,
            on_item=lambda *_: progress.advance(bar),
        )
    return summary(results)


def worst_kinds(report: dict[str, Any]) -> dict[str, tuple[str, float]]:
    """For each method the kind of question that loses most, and how many points."""
    full = report["full"]["by"]["task"]
    return {
        name: max(
            (
                (kind, round(full[kind]["exact_match"] - cell["exact_match"], 2))
                for kind, cell in row["by"]["task"].items()
            ),
            key=lambda pair: pair[1],
        )
        for name, row in report.items()
        if name != "full"
    }


def main(
    judge: Annotated[list[str], typer.Option(help="mosaic, tiles...; repeat for several.")],
    method: Annotated[list[str] | None, typer.Option(help=f"{', '.join(METHOD_NAMES)}; repeat.")] = None,
    retained: Annotated[str, typer.Option(help="Retained fractions, comma-separated.")] = "0.4,0.2,0.1",
    pictures: Annotated[str, typer.Option(help="Pictures of a prompt, comma-separated.")] = "1,2,4",
    prompts: Annotated[int, typer.Option(help="Prompts of each number of pictures, 12 questions each.")] = 20,
    split: Annotated[str, typer.Option(help="calibration, dev or test.")] = "dev",
    block_size: Annotated[int, typer.Option(help="Vision tokens per capsule.")] = 36,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Write all figures here.")] = None,
) -> None:
    """Ask, print tables by kind, and write JSON."""
    torch.set_num_threads(threads)
    console, reports = Console(), {}
    for name in judge:
        counts, fractions = (
            [kind(x) for x in text.split(",")] for kind, text in ((int, pictures), (float, retained))
        )
        report = judged(name, method or [], fractions, counts, prompts, split, block_size)
        reports[name] = report
        print_report(console, report, f"judge {name}, split {split}")
        for label, (kind, lost) in worst_kinds(report).items():
            console.print(f"{label}: loses most on {kind}, {lost:.1f} points")
    write_json(
        json,
        {
            "split": split,
            "prompts": prompts,
            "pictures": pictures,
            "block_size": block_size,
            "judges": reports,
            "machine": machine(),
        },
    )


if __name__ == "__main__":
    typer.run(main)
