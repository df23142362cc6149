"""Choices that are made without what they are judged by: one judge, or one kind of question, is left out.

    python benchmarks/judges_choice.py --candidate "joint 0.05" --candidate "joint 0.02"

For each judge the candidate is chosen on the `dev` split of all the others, and its figure is the one on the
`test` split of the judge left out; likewise over kinds of question. The fewest bytes win among candidates
that lose no more than `--within` points on any judge (or kind) that the choice may see; if none does, the one
that loses least there. Answers stand in `benchmarks/results/judges` (`judges.py`). Writes
`benchmarks/results/judges_choice.json`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from judges_record import Judged, Record
from rich.console import Console

from capsight.cli.output import write_json

RESULTS = Path(__file__).resolve().parent / "results"


def best(
    candidates: list[str], worst: Callable[[str], float], size: Callable[[str], float], within: float
) -> str:
    """The smallest candidate that loses at most `within` at worst, or else the one that loses least."""
    good = [label for label in candidates if worst(label) <= within]
    return min(good, key=size) if good else min(candidates, key=worst)


def size_of(judges: Iterable[Judged]) -> Callable[[str], float]:
    """The mean share of the bytes of candidates over judges."""
    known = list(judges)
    return lambda label: sum(judged.share(label) for judged in known) / len(known)


def without_judge(
    dev: dict[str, Judged], test: dict[str, Judged], candidates: list[str], within: float
) -> list[dict[str, Any]]:
    """A row for each judge left out."""
    rows = []
    for name, judged in test.items():
        seen = [other for key, other in dev.items() if key != name]

        def worst(label: str, seen: list[Judged] = seen) -> float:
            return max(other.lost(label).points for other in seen)

        rows.append({"left_out": name} | figures(judged, best(candidates, worst, size_of(seen), within)))
    return rows


def without_kind(
    dev: dict[str, Judged], test: dict[str, Judged], candidates: list[str], within: float
) -> list[dict[str, Any]]:
    """A row for each judge and kind of question: the choice saw all judges, but not the kind."""
    rows = []
    for kind in sorted({kind for judged in test.values() for kind in judged.tasks.values()}):

        def worst(label: str, kind: str = kind) -> float:
            lost = []
            for judged in dev.values():
                others = set(judged.tasks.values()) - {kind}
                lost.append(judged.pair(label, "full", others).points)
            return max(lost)

        chosen = best(candidates, worst, size_of(dev.values()), within)
        for name, judged in test.items():
            if kind in judged.tasks.values():
                rows.append({"left_out": kind, "judge": name} | figures(judged, chosen, [kind]))
    return rows


def figures(judged: Judged, label: str, kinds: list[str] | None = None) -> dict[str, Any]:
    """What a choice gives where it is published; only its name where it was not asked there."""
    if label not in judged.methods:
        return {"chosen": label}
    pair = judged.pair(label, "full", kinds)
    return {
        "chosen": label,
        "lost": round(pair.points, 2),
        "p": round(pair.p, 4),
        "questions": pair.questions,
        "kv": round(judged.share(label), 4),
    }


def main(
    candidate: Annotated[list[str], typer.Option(help="A label as tables have it; repeat for several.")],
    within: Annotated[float, typer.Option(help="Points that the choice may lose where it is made.")] = 1.0,
    json: Annotated[Path, typer.Option(help="Where to write the figures.")] = RESULTS / "judges_choice.json",
) -> None:
    """Choose, print and write."""
    record = Record(RESULTS / "judges")
    dev, test = record.judges("dev"), record.judges("test")
    dev = {k: v for k, v in dev.items() if all(c in v.methods for c in candidate)}
    test = {k: v for k, v in test.items() if k in dev}
    values = {
        "candidates": candidate,
        "within": within,
        "judges": without_judge(dev, test, candidate, within),
        "kinds": without_kind(dev, test, candidate, within),
    }
    console = Console()
    for row in [*values["judges"], *values["kinds"]]:
        console.print(", ".join(f"{key} {value}" for key, value in row.items()))
    write_json(json, values)


if __name__ == "__main__":
    typer.run(main)
