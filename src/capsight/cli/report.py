"""`capsight report`: one HTML page from the JSONs of the other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from capsight.blindsight import HeadMap
from capsight.cli.output import console
from capsight.cli.target import check_out, write
from capsight.evaluation import FULL
from capsight.kvcapsule import KVCapsule
from capsight.report import (
    BenchFile,
    DemoFile,
    EvalFile,
    LayerErrors,
    Material,
    build_report,
    read,
    read_picture,
)


def report(
    evaluation: Annotated[
        list[Path] | None, typer.Option("--eval", help="JSON of `capsight eval`; repeat for several.")
    ] = None,
    bench: Annotated[Path | None, typer.Option(help="JSON of `capsight bench`.")] = None,
    demo: Annotated[Path | None, typer.Option(help="JSON of `capsight demo`.")] = None,
    head_map: Annotated[str | None, typer.Option(help="Head map to draw: file, folder or hub id.")] = None,
    capsule: Annotated[
        str | None, typer.Option(help="Capsule whose layer budgets to draw: folder, hub id or 'reference'.")
    ] = None,
    attention: Annotated[
        list[Path] | None, typer.Option(help="PNG of `capsight attention`; repeat for several.")
    ] = None,
    errors: Annotated[
        Path | None,
        typer.Option(help="Reconstruction errors to draw: JSON {layers: [{index, keys, values}]}."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="The method that the headline speaks of; by default the first one.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page; - is the standard output.")] = Path(
        "capsight-report.html"
    ),
) -> None:
    """Make one self-contained HTML page: what is gained, what it costs, and every figure behind it."""
    check_out(out, others=[*(evaluation or ()), bench, demo, errors, *(attention or ())])
    material = Material(
        evaluations=tuple(read(EvalFile, path) for path in evaluation or []),
        bench=None if bench is None else read(BenchFile, bench),
        demo=None if demo is None else read(DemoFile, demo),
        head_map=None if head_map is None else HeadMap.from_pretrained(head_map),
        capsule=None if capsule is None else KVCapsule.from_pretrained(capsule).info,
        errors=None if errors is None else read(LayerErrors, errors),
        attention=tuple(read_picture(path) for path in attention or []),
    )
    page = build_report(material, method or _first_method(material))
    write(out, page.encode(errors="xmlcharrefreplace"))
    console(out).print(f"report: {out}", soft_wrap=True)


def _first_method(material: Material) -> str:
    evaluated = [row.method for file in material.evaluations for row in file.rows if row.name != FULL]
    timed = () if material.bench is None else material.bench.rows
    return next(iter([*evaluated, *(row.method for row in timed if row.name != FULL)]), "")
