"""Methods on trained judges beside the full cache, by kind of question, protocol `after`.

    python benchmarks/judges.py --judge mosaic --judge tiles --method joint --method cur --retained 0.4,0.2

A judge is a trained VLM: the reference VLM, or one of another shape, class and picture style
(`tools/judging`). Methods are fitted to its calibration split and asked its `dev` split, on which choices may
be made; `--split test` is for figures that are published. Numbers of caches are bfloat16, so that every ratio
is one of 16-bit bytes. Baselines take a whole picture as one run. Answers are added to
`benchmarks/results/judges/JUDGE.json`; what stands there is not asked again, and a run that was cut off goes
on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from judges_known import Source, load_source
from judges_record import Judged, Record
from peers import PEERS, make_peers
from rich.console import Console
from rich.progress import Progress

from capsight.cli.methods import METHOD_NAMES, make_methods
from capsight.cli.output import machine
from capsight.evaluation import FULL, Journal, evaluate
from capsight.kvcapsule import CacheMethod

RESULTS = Path(__file__).resolve().parent / "results" / "judges"
LONGEST_ANSWER = 32
"""Most tokens of an answer: a description takes up to 30."""


def methods_of(source: Source, names: list[str], retained: list[float]) -> dict[str, CacheMethod]:
    """Methods of the package and peers, by label."""
    own = [name for name in names if name not in PEERS]
    peers = [name for name in names if name in PEERS]
    made = make_methods(own, retained, source.capsule, lambda: source.samples, source.model, source.block)
    return made | make_peers(peers, retained, source.model, source.block)


def ask(
    record: Record, judge: str, names: list[str], retained: list[float], pictures: str | None, prompts: int,
    split: str, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Ask one judge all that it was not asked yet."""
    source = load_source(judge, dtype)
    counts = source.pictures if pictures is None else [int(n) for n in pictures.split(",")]
    items = [item for n in counts for item in source.items(split, n, prompts)]
    made = methods_of(source, names, retained)
    made = {label: m for label, m in made.items() if not record.asked(judge, split, label, items)}
    if not made and record.asked(judge, split, FULL, items):
        return
    settings = {"items": [item.name for item in items], "methods": list(made), "dtype": str(dtype)}
    RESULTS.mkdir(parents=True, exist_ok=True)
    journal = Journal(RESULTS / f"{judge}-{split}.partial", settings)
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        bar = progress.add_task(judge, total=len(items))
        results = evaluate(
            source.model,
            source.processor,
            items,
            made,
            max_new_tokens=LONGEST_ANSWER,
            journal=journal,
            on_item=lambda *_: progress.advance(bar),
        )
    record.add(judge, split, items, results, machine())
    journal.remove()


def show(console: Console, judge: str, found: Judged) -> None:
    """Print a line for each method."""
    console.print(f"{judge}: full cache {found.percent(FULL):.1f} %")
    for label in found.methods[1:]:
        lost, (kind, points) = found.lost(label), found.worst(label)
        console.print(
            f"{label:24s} {found.percent(label):5.1f} %  lost {lost.points:5.1f} (p = {lost.p:.3f}, "
            f"{lost.questions} questions)  {kind} {points:.1f}  {found.share(label):.3f}x"
        )


def main(
    judge: Annotated[list[str], typer.Option(help="reference, mosaic, tiles...; repeat for several.")],
    method: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join((*METHOD_NAMES, *PEERS))}; repeat.")
    ] = None,
    retained: Annotated[str, typer.Option(help="Retained fractions, comma-separated.")] = "0.4,0.2,0.1,0.05",
    pictures: Annotated[
        str | None, typer.Option(help="Pictures of a prompt, comma-separated; 1,2,4, of the reference 1,4,8.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Prompts of each number of pictures, 6 or 12 questions.")] = 10,
    split: Annotated[str, typer.Option(help="calibration, dev or test.")] = "dev",
    dtype: Annotated[str, typer.Option(help="Of model and cache: bfloat16 or float32.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Ask, and print what stands in the files then."""
    torch.set_num_threads(threads)
    record, console = Record(RESULTS), Console()
    fractions = [float(x) for x in retained.split(",")]
    for name in judge:
        ask(record, name, method or [], fractions, pictures, prompts, split, getattr(torch, dtype))
        show(console, name, record.judges(split)[name])


if __name__ == "__main__":
    typer.run(main)
