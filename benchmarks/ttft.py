"""Time to first token of whole models, with and without a head map, all variants taking turns in one run.

    python benchmarks/ttft.py

Two models: the reference VLM, and one with random weights of the size of Qwen2.5-0.5B with the reference
VLM's processor (what it says means nothing; what it costs does). Image encoding is part of the time.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from prefill_attention import categories_of
from rich.console import Console
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from capsight import enable, load_reference_vlm
from capsight.blindsight import Category, HeadMap, prefill_flops
from capsight.blindsight.attention.choice import mask_wins
from capsight.cli.models import reference_head_map
from capsight.cli.output import machine
from capsight.evaluation import Ask, Item, reference_items
from capsight.evaluation.asking import process
from capsight.evaluation.timing import time_once
from capsight.layout import build_layout

RESULT = Path(__file__).parent / "results" / "ttft.json"
SHARES = (0.25, 0.5)
"""Shares of Dense heads of the maps that were not calibrated; the others are Intra-Image+Sink."""


def large_model(reference: Qwen2_5_VLConfig, dtype: torch.dtype) -> Any:
    """A `Qwen2_5_VLForConditionalGeneration` with random weights: the language model of Qwen2.5-0.5B."""
    given = reference.to_dict()
    text, vision = given["text_config"], given["vision_config"]
    text |= {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [8, 12, 12],
        },
        "layer_types": None,
    }
    vision |= {"depth": 8, "hidden_size": 384, "intermediate_size": 1024, "fullatt_block_indexes": [3, 7]}
    vision |= {"out_hidden_size": 896}
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(**given)
    model: Any = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype).eval()
    ends = reference.get_text_config()
    model.generation_config.eos_token_id = ends.eos_token_id
    model.generation_config.pad_token_id = ends.pad_token_id
    return model


def prompt(images: int, side: int) -> Item:
    """Drawn pages of the test split, resized to `side` x `side` px; 0 leaves them as they are."""
    item = next(iter(reference_items("test", images, 1)))
    pictures = tuple(picture.resize((side, side)) for picture in item.images) if side else item.images
    return Item(item.name, pictures, (Ask(item.asks[0].question, ""),))


def hand_made(model: Any) -> dict[str, HeadMap | None]:
    """No map, and maps with a share of Dense heads in every layer."""
    text = model.config.get_text_config()
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    maps = {f"{s:.0%} dense": HeadMap((categories_of(s, heads),) * layers) for s in SHARES}
    return {"no head map": None, **maps}


def measured(
    model: Any, inputs: Mapping[str, Any], maps: Mapping[str, HeadMap | None], runs: int
) -> list[dict[str, Any]]:
    """Median seconds to the first token, per map; they take turns, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in maps}
    for run in range(runs + 1):
        for name, head_map in maps.items():
            with enable(model, head_map=head_map) as fast, torch.no_grad():
                timing = time_once(fast, inputs, 2)
            if run:
                times[name].append(timing.ttft_s)
    layout, text = build_layout(inputs, model.config), model.config.get_text_config()
    dense = HeadMap.uniform(Category.DENSE, text.num_hidden_layers, text.num_attention_heads)
    first = statistics.median(next(iter(times.values())))
    rows = []
    followed = mask_wins(model.device, model.dtype, layout.length)  # else `auto` reads it densely
    for name, head_map in maps.items():
        flops = prefill_flops(model, layout, head_map if head_map and followed else dense)
        seconds = statistics.median(times[name])
        rows.append(
            {
                "variant": name,
                "ttft_s": seconds,
                "speedup": first / seconds,
                "attention_saved": flops.attention_saved,
                "prefill_saved": flops.saved,
            }
        )
    return rows


def markdown(report: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| model | tokens | images | variant | first token, ms | faster | attention saved | of the LM |",
        "|---|--:|--:|---|--:|--:|--:|--:|",
    ]
    for model in report:
        for row in model["rows"]:
            cells = [f"{row['ttft_s'] * 1e3:.0f}", f"{row['speedup']:.2f}x"]
            cells += [f"{row['attention_saved']:.0%}", f"{row['prefill_saved']:.0%}"]
            front = [model["model"], str(model["tokens"]), str(model["images"]), row["variant"]]
            lines.append("| " + " | ".join([*front, *cells]) + " |")
    return "\n".join(lines)


def main(
    reference_images: Annotated[int, typer.Option(help="Images of the reference VLM's prompt.")] = 8,
    images: Annotated[int, typer.Option(help="Images of the large model's prompt.")] = 16,
    side: Annotated[int, typer.Option(help="Their sides in px; 560 makes 400 tokens.")] = 560,
    dtype: Annotated[str, typer.Option(help="Of the large model: float32 or bfloat16.")] = "bfloat16",
    runs: Annotated[int, typer.Option(help="Timed runs of the large model; the median counts.")] = 3,
    reference_runs: Annotated[int, typer.Option(help="Timed runs of the reference VLM.")] = 25,
    head_map: Annotated[str | None, typer.Option(help="For the reference VLM; else the shipped one.")] = None,
    large: Annotated[bool, typer.Option(help="Measure the large model too.")] = True,
    json_file: Annotated[Path, typer.Option("--json", help="Write the numbers here.")] = RESULT,
) -> None:
    """Measure and print a table in markdown."""
    model, processor = load_reference_vlm()
    calibrated = HeadMap.from_pretrained(head_map) if head_map else reference_head_map()
    maps = hand_made(model) | ({} if calibrated is None else {"calibrated": calibrated})
    cases = [("reference VLM, float32", model, reference_images, 0, maps, reference_runs)]
    if large:
        other = large_model(model.config, getattr(torch, dtype))
        size = sum(p.numel() for p in other.parameters())
        name = f"random weights, {size / 1e9:.2f} B, {dtype}"
        cases.append((name, other, images, side, hand_made(other), runs))
    report = []
    for name, vlm, count, pixels, variants, times in cases:
        item = prompt(count, pixels)
        inputs = process(processor, item, [item.asks[0].question])
        tokens = inputs["input_ids"].shape[1]
        rows = measured(vlm, inputs, variants, times)
        report.append({"model": name, "tokens": tokens, "images": count, "runs": times, "rows": rows})
        print(f"{name}: done", flush=True)
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps({"machine": machine(), "models": report}, indent=1) + "\n")
    Console().print(markdown(report), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
