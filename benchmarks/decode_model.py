"""Decode speed of a whole model whose images are long: tokens per second over full caches and over capsules.

    python benchmarks/decode_model.py

A model with random weights of the size of Qwen2.5-0.5B (see `ttft.py`) decodes after caches that are filled
with random keys and values, since prefilling 32,768 tokens says nothing about decoding. The baselines are
transformers' own caches (`evaluation/stock.py`) and quanto's; speedup is over the fastest stock cache of the
same run, all taking turns. What compiling takes is left out: a first run of every variant does not count.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from attention_measuring import layout_of, machine
from option_kinds import fractions, integers, one_of
from page_parts import table
from rich.console import Console
from torch import Tensor
from ttft import large_model, prompt

from capsight import KVCapsule, enable, load_reference_vlm
from capsight.baselines.quantized import QuantoInt4
from capsight.evaluation.asking import process
from capsight.evaluation.cache_bytes import CacheBytes
from capsight.evaluation.stock import GRAPH, STOCK, options_of, stock_cache
from capsight.evaluation.timing import time_once
from capsight.runtime import FastModel

RESULT = Path(__file__).parent / "results" / "decode_model.json"
IMAGE = 1024
"""Vision tokens of an image."""

BLOCK = 64
"""Tokens over which random keys and values are alike."""


class Variant(NamedTuple):
    """A cache to decode over: a stock one of that name, or that of a method."""

    name: str
    method: Any = None

    @property
    def options(self) -> dict[str, Any]:
        """What `generate` has to be told."""
        return options_of(self.name)


def smooth(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Random `[B, H, S, D]` whose neighbouring tokens are alike; rows are the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(shape[1:], generator=generator)
    steps = one.unflatten(1, (-1, BLOCK)).cumsum(2).flatten(1, 2) / BLOCK**0.5
    return (steps + 0.2 * one).to(dtype).expand(shape)


def fill(cache: Any, config: Any, batch: int, length: int, dtype: torch.dtype) -> None:
    """Give every layer of an empty cache keys and values of so many tokens."""
    head_dim, heads = config.hidden_size // config.num_attention_heads, config.num_key_value_heads
    whole = -(-length // BLOCK) * BLOCK
    for layer in range(config.num_hidden_layers):
        pair = (smooth((batch, heads, whole, head_dim), 2 * layer + i, dtype)[:, :, :length] for i in (0, 1))
        cache.update(*pair, layer)


@contextmanager
def filled(
    model: Any, variant: Variant, tokens: int, batch: int, room: int
) -> Iterator[tuple[FastModel, Any, dict[str, Tensor]]]:
    """The model at work, a cache of `batch` prompts of `tokens` vision tokens, and inputs that go on."""
    layout = layout_of(tokens + 256 + 2 * (tokens // IMAGE), tokens // IMAGE).repeat(batch)
    ids = torch.full((batch, layout.length + 1), 5)
    with enable(model, capsule=variant.method) as fast, torch.inference_mode():
        if variant.name in STOCK:
            cache = stock_cache(variant.name, model.config, layout.length + room)
        else:
            cache = variant.method.cache(layout, model.config)
            cache.honours_key_bias = True
        fill(cache, model.config.get_text_config(), batch, layout.length, model.dtype)
        yield fast, cache, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tokens_per_second(
    model: Any, variants: list[Variant], tokens: int, batch: int, new: int, runs: int
) -> list[dict[str, Any]]:
    """All variants at one size, taking turns; a run goes on from a cache that is filled anew."""
    speeds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    sizes: dict[str, int] = {}
    for run in range(1 + runs):
        for variant in variants:
            with filled(model, variant, tokens, batch, 2 * new + 2) as (fast, cache, inputs):
                sizes[variant.name] = CacheBytes.of(cache).kv
                given = {**inputs, **variant.options, "past_key_values": cache}
                timing = time_once(fast, given, new)
            speeds[variant.name] += [timing.tokens_per_s] if run else []
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    best = max(medians[name] for name in STOCK)
    return [
        {
            "tokens": tokens,
            "batch": batch,
            "variant": name,
            "tokens_per_s": speed,
            "speedup": speed / best,
            "cache_nbytes": sizes[name],
        }
        for name, speed in medians.items()
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    heads = ["cache", "vision tokens", "batch", "tokens/s", "faster", "cache, MB"]
    cells = [
        [
            *(str(row[name]) for name in ("variant", "tokens", "batch")),
            *(f"{row['tokens_per_s']:.2f}", f"{row['speedup']:.2f}x", f"{row['cache_nbytes'] / 1e6:.0f}"),
        ]
        for row in rows
    ]
    return "\n".join(table(heads, cells))


def main(
    tokens: Annotated[
        Any, typer.Option(parser=integers(IMAGE), help="Vision tokens of a row, comma-separated.")
    ] = "8192",
    batches: Annotated[Any, typer.Option(parser=integers(), help="Rows, comma-separated.")] = "1,8",
    retained: Annotated[
        Any, typer.Option(parser=fractions, help="Retained fractions, comma-separated.")
    ] = "0.4,0.15",
    new: Annotated[int, typer.Option(min=2, help="Tokens decoded in a run.")] = 9,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each; the median counts.")] = 3,
    dtype: Annotated[str, typer.Option(parser=one_of("float32", "bfloat16"))] = "bfloat16",
    json_file: Annotated[Path, typer.Option("--json", help="Write the numbers here.")] = RESULT,
) -> None:
    """Measure and print a table in markdown."""
    json_file.parent.mkdir(parents=True, exist_ok=True)
    reference, processor = load_reference_vlm()
    model = large_model(reference.config, getattr(torch, dtype))
    item = prompt(4, 0)
    sample = process(processor, item, [item.asks[0].question])
    capsule, joint = (
        KVCapsule.fit(model, None, [sample], codec=c, progress=False) for c in ("heads", "joint")
    )
    variants = [*map(Variant, STOCK), Variant("quanto-int4", QuantoInt4())]
    variants += [Variant(f"heads {r:g}", capsule.with_retained(r)) for r in retained]
    variants += [Variant(f"heads-int4 {r:g}", capsule.with_retained(r).with_bits(4)) for r in retained]
    variants.append(Variant(f"joint {joint.retained:.2g}", joint))
    least, most = min(retained), max(retained)
    variants.append(Variant(f"heads {most:g}{GRAPH}", capsule.with_retained(most)))
    variants.append(Variant(f"heads-int4 {least:g}{GRAPH}", capsule.with_retained(least).with_bits(4)))
    variants.append(Variant(f"joint {joint.retained:.2g}{GRAPH}", joint))
    size, began, rows = sum(p.numel() for p in model.parameters()), time.perf_counter(), []
    for count in tokens:
        for batch in batches:
            rows += tokens_per_second(model, variants, count, batch, new, runs)
            print(f"{count} tokens, batch {batch}: {time.perf_counter() - began:.0f} s so far", flush=True)
    setup = {"parameters": size, "dtype": dtype, "new_tokens": new, "runs": runs, "image_tokens": IMAGE}
    json_file.write_text(
        json.dumps({"machine": machine("cpu"), "setup": setup, "rows": rows}, indent=1) + "\n"
    )
    Console().print(markdown(rows), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
