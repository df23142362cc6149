"""`capsight plan`: what capsules and a head map save on a GPU, from a model's config alone."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from capsight.blindsight import HeadMap
from capsight.cli.models import REFERENCE, load_config
from capsight.cli.options import CompressionOption, JsonOption
from capsight.cli.output import console, human_bytes, parse_bytes, write_json
from capsight.cli.target import check_out
from capsight.errors import OptionError
from capsight.kvcapsule.budget import share_to_keep
from capsight.pictures.source import MAX_RATIO
from capsight.planning import Budget, ImageGrids, Plan, grids_of_size, grids_of_tokens
from capsight.planning import plan as make_plan

_ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}


def plan(
    model: Annotated[str, typer.Option(help="'reference', a folder, a config.json or a hub id.")] = REFERENCE,
    images: Annotated[list[int] | None, typer.Option(help="Images in a request.")] = None,
    image_size: Annotated[list[str] | None, typer.Option(help="Their size, WIDTHxHEIGHT in pixels.")] = None,
    image_tokens: Annotated[list[int] | None, typer.Option(help="Or their vision tokens.")] = None,
    text_tokens: Annotated[int, typer.Option(help="Prompt tokens that are text.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated per request.")] = 128,
    batch: Annotated[int, typer.Option(help="Requests of one prefill.")] = 1,
    gpu_memory: Annotated[str, typer.Option(help="Such as 80GB or 80GiB.")] = "80GB",
    reserve: Annotated[float, typer.Option(help="Fraction of it left to activations.")] = 0.1,
    weights_gb: Annotated[float | None, typer.Option(help="GB of the weights, if quantised.")] = None,
    retained: Annotated[
        float | None, typer.Option(help="Part of the 16-bit bytes that capsules keep; 0.05 by default.")
    ] = None,
    compression_ratio: CompressionOption = None,
    dtype: Annotated[str, typer.Option(help="Of weights and KV: bfloat16, float16, float32.")] = "bfloat16",
    head_map: Annotated[str | None, typer.Option(help="A head map's file, folder or hub id.")] = None,
    dense_share: Annotated[float | None, typer.Option(help="Or the share of heads it keeps dense.")] = None,
    json: JsonOption = None,
) -> None:
    """Plan KV memory, requests per GPU and prefill FLOPs; no weights are loaded.

    For a mix of sizes repeat --images and --image-size (or --image-tokens) in pairs.
    """
    check_out(json)
    if dtype not in _ITEMSIZES:
        raise OptionError(f"dtype is {dtype!r}; use one of {', '.join(_ITEMSIZES)}")
    if head_map is not None and dense_share is not None:
        raise OptionError("give --head-map or --dense-share, not both")
    if weights_gb is not None and not math.isfinite(weights_gb):
        raise OptionError(f"weights-gb is {weights_gb}; give the size of the weights, such as 4.7")
    budget = Budget(
        gpu_bytes=parse_bytes(gpu_memory),
        itemsize=_ITEMSIZES[dtype],
        weights_bytes=None if weights_gb is None else round(weights_gb * 1e9),
        reserve=reserve,
        batch=batch,
        retained=share_to_keep(retained, compression_ratio, 0.05),
    )
    sparse = HeadMap.from_pretrained(head_map) if head_map is not None else dense_share
    config = load_config(model)
    mix = _mix(config, images or [8], image_size or [], image_tokens or [])
    planned = make_plan(config, mix, text_tokens, budget, new_tokens, sparse)
    write_json(json, {"model": model, "images": len(mix), "retained": budget.retained, **planned.to_dict()})
    _print(console(json), planned, budget, model, len(mix))


def _mix(config: Any, counts: list[int], sizes: list[str], tokens: list[int]) -> list[ImageGrids]:
    if min(counts) < 0:
        raise OptionError(f"images is {min(counts)}; it must be 0 or more")
    if sizes and tokens:
        raise OptionError("give --image-size or --image-tokens, not both")
    alone = sum(counts) == 1
    if tokens:
        kinds = [grids_of_tokens(config, n) for n in tokens]
    else:
        kinds = [grids_of_size(config, *_pixels(size), alone=alone) for size in sizes or ["448x448"]]
    if len(kinds) == 1:
        kinds *= len(counts)
    if len(kinds) != len(counts):
        raise OptionError(
            f"{len(kinds)} kinds of images for {len(counts)} counts; give one kind per --images"
        )
    return [kind for count, kind in zip(counts, kinds, strict=True) for _ in range(count)]


def _pixels(size: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if match is None:
        raise OptionError(f"image size is {size!r}; give WIDTHxHEIGHT in pixels, such as 448x224")
    width, height = int(match[1]), int(match[2])
    if max(width, height) > MAX_RATIO * min(width, height) > 0:
        raise OptionError(f"image size is {size!r}; no picture is longer than {MAX_RATIO} : 1")
    return width, height


def _print(out: Console, planned: Plan, budget: Budget, model: str, images: int) -> None:
    out.print(
        f"{model}: {planned.parameters / 1e9:.2f} B parameters, {human_bytes(planned.weights_bytes)} of "
        f"weights; a request: {images} images, {planned.prompt_tokens} prompt tokens, "
        f"{planned.vision_tokens} of vision",
        soft_wrap=True,
    )
    full, ours = planned.full, planned.capsules
    memory = Table("", "full cache", f"capsules, {budget.retained:.0%} retained", "", title="memory")
    ratio = full.kv_bytes / ours.kv_bytes
    memory.add_row(
        "KV per request", human_bytes(full.kv_bytes), human_bytes(ours.kv_bytes), f"{ratio:.2f}x smaller"
    )
    if full.state_bytes:
        states = human_bytes(full.state_bytes)
        memory.add_row("states per request", states, states, "not compressed")
    memory.add_row("scratch per request", human_bytes(0), human_bytes(ours.scratch_bytes), "while decoding")
    memory.add_row("modules", human_bytes(0), human_bytes(ours.module_bytes), "once per GPU")
    more = f"{ours.requests / full.requests:.2f}x" if full.requests else "weights leave no room"
    memory.add_row(
        f"requests in {human_bytes(budget.gpu_bytes)}", str(full.requests), str(ours.requests), more
    )
    even = planned.break_even_tokens
    memory.add_row("break-even", "", "never" if even is None else f"{even} vision tokens", "of a request")
    out.print(memory)
    dense, sparse = planned.dense, planned.sparse
    columns = ["", "dense"] if sparse is None else ["", "dense", "head map", ""]
    flops = Table(*columns, title=f"prefill at batch {budget.batch}")
    names = {"attention": "attention", "linear": "linear layers", "vision": "vision tower", "total": "whole"}
    for name, label in names.items():
        before = getattr(dense, name)
        row = [label, _human_flops(before)]
        if sparse is not None:
            after = getattr(sparse, name)
            row += [_human_flops(after), f"{1 - after / before:.1%} less" if after != before else ""]
        flops.add_row(*row)
    out.print(flops)


def _human_flops(count: float) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e6:.1f} MFLOP"
