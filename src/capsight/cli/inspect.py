"""`capsight inspect`: what is in a capsule or head-map folder, in a cache at rest, or in a store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.bar import Bar
from rich.table import Table

from capsight.blindsight import Category, HeadMap
from capsight.blindsight.head_map_file import FILE_NAME
from capsight.cli.inspect_rest import file_facts, is_store, saved_facts, store_facts
from capsight.cli.options import JsonOption
from capsight.cli.output import console, human_bytes, write_json
from capsight.cli.target import check_out
from capsight.errors import CapsuleFileError
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.codecs import JointCodec
from capsight.kvcapsule.info import CapsuleInfo
from capsight.kvcapsule.rest import is_rest_file

LETTERS = {
    Category.DENSE: "D",
    Category.SINK: "s",
    Category.INTRA_IMAGE: "i",
    Category.INTRA_IMAGE_SINK: "+",
}
"""One letter per head in the table of a head map."""


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            help="Capsule or head-map folder, hub id or 'reference'; a store; a file of `encapsulate`."
        ),
    ],
    json: JsonOption = None,
) -> None:
    """Show a capsule (codec, sizes, budget of the layers, break-even), a head map, or images at rest."""
    check_out(json, others=[Path(path)])
    facts: dict[str, Any]
    if is_rest_file(path):
        facts = file_facts(path)
        tables = [_table(path, facts)]
    elif Path(path).is_file() and Path(path).suffix != ".json":
        facts = saved_facts(path)
        tables = [_table(path, facts)]
    elif is_store(path):
        facts = store_facts(path)
        tables = [_table(path, facts)]
    else:
        facts, tables = _head_map(path) if _is_head_map(path) else _capsule(path)
    write_json(json, facts)
    for table in tables:
        console(json).print(table)


def _is_head_map(path: str) -> bool:
    """Whether a folder, file or hub repository is a head map; where it is neither, the capsule says why."""
    local = Path(path)
    if local.exists():
        return local.is_file() or (local / FILE_NAME).is_file()
    if path == "reference":
        return False
    try:
        HeadMap.from_pretrained(path)
    except CapsuleFileError:
        return False
    return True


def _capsule(path: str) -> tuple[dict[str, Any], list[Table]]:
    capsule = KVCapsule.from_pretrained(path)
    info = capsule.info
    facts = {
        "codec": info.codec,
        "block size": info.block_size,
        "retained": round(capsule.retained, 4),
        "budget": info.budget,
        "bits": _bits(capsule),
        "weights": info.options.get("weights", "solved") if info.codec == "adaptive" else "none",
        "layers": len(info.layers),
        "modules": human_bytes(capsule.module_nbytes),
        "break-even": f"{capsule.break_even_tokens()} vision tokens at batch 1",
        "fitted on": f"{info.blocks} blocks" if info.share is None else f"{info.blocks} vision tokens",
        "model": str(info.model_config.get("model_type")),
        "fingerprint": info.fingerprint,
    }
    rows = _layers(info)
    charts = [] if info.share is not None else [_budget_chart(info, rows)]  # latents are of all layers
    return facts | {"per_layer": rows}, [_table(path, facts), *charts]


def _bits(capsule: KVCapsule) -> str | int:
    """Bits of what is stored; of latents, how many coordinates have how many."""
    first = next(iter(capsule.codecs.values()))
    if isinstance(first, JointCodec):
        return ", ".join(f"{count} coordinates in {bits}" for bits, count in first.levels.parts)
    return capsule.info.bits or "as in the cache"


def _layers(info: CapsuleInfo) -> list[dict[str, Any]]:
    """What each layer keeps, and what was measured of it (null where nothing was)."""
    needs, counts = info.needs, [layer.kept for layer in info.layers]
    unknown = [None] * len(counts)
    errors = unknown if needs is None else needs.errors_at(counts, info.block_size)
    attention = unknown if needs is None else needs.attention
    return [
        asdict(layer) | {"retained": layer.kept / info.block_size, "attention": share, "error": error}
        for layer, share, error in zip(info.layers, attention, errors, strict=True)
    ]


def _budget_chart(info: CapsuleInfo, rows: list[dict[str, Any]]) -> Table:
    """The budget as bars, one layer to a line."""
    layers = Table(
        "layer", "kept", f"of a block of {info.block_size}", "heads x dim", "attention to images", "error",
        title=f"layers, {info.budget} budget",
    )  # fmt: skip
    for row in rows:
        measured = ["" if row[name] is None else f"{row[name]:.3f}" for name in ("attention", "error")]
        bar = Bar(info.block_size, 0, row["kept"], width=24)
        layers.add_row(
            str(row["index"]), str(row["kept"]), bar, f"{row['heads']} x {row['head_dim']}", *measured
        )
    return layers


def _head_map(path: str) -> tuple[dict[str, Any], list[Table]]:
    head_map = HeadMap.from_pretrained(path)
    options, record = head_map.options, head_map.calibration
    sinks = f"first {options.sink_tokens} tokens of an image"
    facts: dict[str, Any] = {
        "layers x heads": f"{head_map.num_layers} x {head_map.num_heads}",
        **{category.value: count for category, count in head_map.counts().items()},
        "sinks": f"delimiters and {sinks}" if options.sink_delimiters else sinks,
        "own window": f"{options.own_window} tokens (Sink heads)",
        "fingerprint": head_map.model or "any model of this shape",
    }
    if record is not None:
        facts |= {
            "judged by": f"{record.criterion}, {record.unit} by {record.unit}",
            "thresholds": ", ".join(f"{name} {value:g}" for name, value in record.thresholds.items()),
            "calibrated on": f"{record.prompts} prompts, {record.dataset[:12]}",
            "returned to dense": record.recovered,
            "measured drop": "not measured"
            if record.measured_drop is None
            else f"{record.measured_drop:.4g}",
            "tolerance": "none" if record.tolerance is None else f"{record.tolerance:.4g}",
        }
    legend = ", ".join(f"{letter} {category.value}" for category, letter in LETTERS.items())
    rows = Table("layer", "heads", title=legend)
    for layer, categories in enumerate(head_map.categories):
        rows.add_row(str(layer), " ".join(LETTERS[category] for category in categories))
    named = [[category.value for category in layer] for layer in head_map.categories]
    return facts | {"categories": named}, [_table(path, facts), rows]


def _table(title: str, facts: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    for name, value in {"read from": title, **facts}.items():
        table.add_row(name, str(value))
    return table
