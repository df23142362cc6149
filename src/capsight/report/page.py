"""`build_report`: the whole page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from capsight.blindsight.head_map import HeadMap
from capsight.errors import OptionError
from capsight.kvcapsule.info import CapsuleInfo
from capsight.report import sections, sections_layers
from capsight.report.headline import headline
from capsight.report.inputs import BenchFile, DemoFile, EvalFile, LayerErrors
from capsight.report.picture_file import Picture
from capsight.report.sections import Section
from capsight.report.style import CSS
from capsight.report.tables import table, tiles


@dataclass(frozen=True, slots=True)
class Material:
    """What a report is made of; everything may be absent, but not all of the first three.

    Attributes:
        evaluations: of `capsight eval`, the most telling first.
        bench: of `capsight bench`.
        demo: of `capsight demo`.
        head_map: to draw.
        capsule: whose layer budgets to draw.
        errors: reconstruction errors to draw.
        attention: pictures of what chosen heads attend to.
    """

    evaluations: tuple[EvalFile, ...] = ()
    bench: BenchFile | None = None
    demo: DemoFile | None = None
    head_map: HeadMap | None = None
    capsule: CapsuleInfo | None = None
    errors: LayerErrors | None = None
    attention: tuple[Picture, ...] = ()


def build_report(material: Material, method: str = "heads") -> str:
    """The page as one HTML document that asks the network for nothing.

    Args:
        material: what to show.
        method: the method that the headline speaks of, without its retained fraction.

    Raises:
        OptionError: there is nothing to report on, or it says nothing of the method.
    """
    evaluation = material.evaluations[0] if material.evaluations else None
    if evaluation is None and material.bench is None and material.demo is None:
        raise OptionError("there is nothing to report on; give the JSON of an eval, a bench or a demo")
    top = headline(evaluation, material.bench, material.demo, method)
    if top is None:
        names = {row.method for file in material.evaluations for row in file.rows}
        names |= {row.method for row in material.bench.rows} if material.bench else set()
        raise OptionError(
            f"no file has figures of the method {method!r}; there are {', '.join(sorted(names))}"
        )
    model = f" · {evaluation.model} model" if evaluation else ""
    body = "".join(section.html() for section in _sections(material, method))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>capsight report</title><style>{CSS}</style></head><body>'
        f'<main><p class="kicker">capsight report{escape(model)}</p>'
        f'<h1 id="headline">{escape(top.sentence)}</h1>{tiles(top.tiles)}{_WHAT}{body}'
        "</main></body></html>\n"
    )


_WHAT = (
    '<p class="lead">A vision-language model remembers every image it has read as keys and values, the KV '
    "cache. It fills GPU memory and is read for every new word. capsight keeps the part of it "
    "that stands out, without retraining the model.</p>"
)


def _sections(material: Material, method: str) -> Iterator[Section]:
    for number, file in enumerate(material.evaluations):
        many = len(material.evaluations) > 1
        yield from sections.accuracy(file, method, f"-{number + 1}" if many else "")
    if material.bench is not None:
        yield from sections.speed(material.bench)
    if material.demo is not None:
        yield sections.demo(material.demo)
    if material.head_map is not None:
        yield sections_layers.head_map(material.head_map)
    if material.attention:
        yield sections_layers.attention(material.attention)
    if material.capsule is not None:
        yield sections_layers.layer_budgets(material.capsule)
    if material.errors is not None:
        yield sections_layers.reconstruction(material.errors)
    yield _machines(material)


def _machines(material: Material) -> Section:
    found: dict[str, dict[str, Any]] = {}
    many = len(material.evaluations) > 1
    for file in material.evaluations:
        found[f"eval, {file.protocol}" if many else "eval"] = file.machine
    if material.bench is not None:
        found["bench"] = material.bench.machine
    if material.demo is not None:
        found["demo"] = material.demo.machine
    names = dict.fromkeys(name for values in found.values() for name in values)
    rows = [
        [escape(name), *("" if v.get(name) is None else escape(str(v[name])) for v in found.values())]
        for name in names
        if any(v.get(name) is not None for v in found.values())
    ]
    lead = "Figures of different machines are not to be compared."
    return Section("machine", "Machine and versions", lead, table(("", *found), rows))
