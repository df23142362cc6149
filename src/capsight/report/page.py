"""`build_report`: the whole page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from capsight.blindsight.head_map import HeadMap
from capsight.errors import OptionError
from capsight.kvcapsule.info import CapsuleInfo
from capsight.report import layers, sections
from capsight.report.headline import headline
from capsight.report.inputs import BenchFile, DemoFile, EvalFile, LayerErrors
from capsight.report.picture_file import Picture
from capsight.report.sections import Section
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
        yield layers.head_map(material.head_map)
    if material.attention:
        yield layers.attention(material.attention)
    if material.capsule is not None:
        yield layers.layer_budgets(material.capsule)
    if material.errors is not None:
        yield layers.reconstruction(material.errors)
    yield _machines(material)


def _machines(material: Material) -> Section:
    machines: dict[str, dict[str, Any]] = {}
    many = len(material.evaluations) > 1
    for file in material.evaluations:
        machines[f"eval, {file.protocol}" if many else "eval"] = file.machine
    if material.bench is not None:
        machines["bench"] = material.bench.machine
    if material.demo is not None:
        machines["demo"] = material.demo.machine
    names = dict.fromkeys(name for values in machines.values() for name in values)
    rows = [
        [escape(name), *("" if v.get(name) is None else escape(str(v[name])) for v in machines.values())]
        for name in names
        if any(v.get(name) is not None for v in machines.values())
    ]
    lead = "Figures of different machines are not to be compared."
    return Section("machine", "Machine and versions", lead, table(("", *machines), rows))


_LIGHT = """
  --paper: #ffffff; --card: #f6f8fa; --ink: #1b1f24; --muted: #59636e; --grid: #d8dee4;
  --good: #1a7f37; --bad: #cf222e;
  --s0: #0550ae; --s1: #bc4c00; --s2: #1a7f37; --s3: #8250df; --s4: #bf3989; --s5: #9a6700; --s6: #0e7c86;
  --s7: #6e7781;
"""
_DARK = """
  --paper: #0d1117; --card: #161b22; --ink: #e6edf3; --muted: #9198a1; --grid: #30363d;
  --good: #3fb950; --bad: #f85149;
  --s0: #58a6ff; --s1: #f0883e; --s2: #3fb950; --s3: #bc8cff; --s4: #f778ba; --s5: #d29922; --s6: #39c5cf;
  --s7: #8b949e;
"""

CSS = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
main {{ max-width: 960px; margin: 0 auto; padding: 40px 24px 64px; }}
.kicker {{ color: var(--muted); font-size: 14px; margin: 0 0 6px; }}
h1 {{ font-size: 25px; line-height: 1.35; font-weight: 650; margin: 0 0 22px; text-wrap: pretty; }}
h2 {{ font-size: 19px; margin: 46px 0 4px; }}
p {{ margin: 4px 0 14px; max-width: 76ch; }}
.lead {{ color: var(--muted); }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px;
  margin: 0 0 20px; }}
.tile {{ background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 14px 16px; }}
.tile b {{ display: block; font-size: 31px; line-height: 1.15; font-weight: 680;
  font-variant-numeric: tabular-nums; }}
.tile span {{ display: block; font-weight: 600; }}
.tile small {{ color: var(--muted); font-size: 13px; }}
figure {{ margin: 12px 0; }}
figure img {{ max-width: 100%; height: auto; display: block; background: #fff; border-radius: 6px; }}
figcaption {{ color: var(--muted); font-size: 14px; margin-top: 4px; }}
.phone {{ display: none; }}
@media screen and (max-width: 640px) {{
  main {{ padding: 24px 20px 48px; }}
  .desk {{ display: none; }}
  .phone {{ display: block; }}
}}
svg {{ width: 100%; height: auto; display: block; }}
svg text {{ font-family: inherit !important; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums;
  margin: 8px 0 14px; }}
th, td {{ padding: 5px 12px 5px 0; text-align: right; border-bottom: 1px solid var(--grid);
  white-space: nowrap; }}
th {{ color: var(--muted); font-weight: 600; vertical-align: bottom; }}
th:first-child, td:first-child, td.left, th.left {{ text-align: left; }}
td.left {{ white-space: normal; min-width: 8em; }}
tr.ours td {{ font-weight: 650; }}
td.good, .good {{ color: var(--good); }}
td.bad, .bad {{ color: var(--bad); }}
details {{ margin: 0 0 14px; }}
summary {{ cursor: pointer; color: var(--muted); font-size: 14px; }}
.key {{ display: inline-flex; align-items: center; gap: 6px; margin-right: 18px; font-size: 14px; }}
.key i {{ width: 12px; height: 12px; border-radius: 2px; display: inline-block; }}
footer {{ margin-top: 48px; border-top: 1px solid var(--grid); padding-top: 12px; color: var(--muted);
  font-size: 14px; }}
@media print {{
  main {{ max-width: none; padding: 0; }}
  h2 {{ break-after: avoid; }}
  figure, .tile, tr {{ break-inside: avoid; }}
  body {{ font-size: 11pt; }}
  details::details-content {{ content-visibility: visible; block-size: auto; }}
  summary {{ list-style: none; }}
}}
"""
