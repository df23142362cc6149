"""`capsight inspect`: what is in a capsule folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from capsight.cli.models import check_out
from capsight.cli.output import human_bytes, write_json
from capsight.kvcapsule import KVCapsule


def inspect(
    path: Annotated[str, typer.Argument(help="Capsule folder, hub id, or 'reference'.")],
    json: Annotated[Path | None, typer.Option(help="Write the same to this file.")] = None,
) -> None:
    """Show a capsule: codec, sizes, layers, break-even; checks the files on the way."""
    check_out(json)
    capsule = KVCapsule.from_pretrained(path)
    info = capsule.info
    facts = {
        "codec": info.codec,
        "block size": info.block_size,
        "retained": round(capsule.retained, 4),
        "layers": len(info.layers),
        "modules": human_bytes(capsule.module_nbytes),
        "break-even": f"{capsule.break_even_tokens()} vision tokens at batch 1",
        "fitted on": f"{info.blocks} blocks",
        "model": str(info.model_config.get("model_type")),
        "fingerprint": info.fingerprint,
    }
    table = Table(title=path, show_header=False)
    for name, value in facts.items():
        table.add_row(name, str(value))
    console = Console()
    console.print(table)
    layers = Table("layer", "kept of a block", "KV heads", "head dim", title="layers")
    for layer in info.layers:
        layers.add_row(
            str(layer.index), f"{layer.kept}/{info.block_size}", str(layer.heads), str(layer.head_dim)
        )
    console.print(layers)
    write_json(json, facts)
