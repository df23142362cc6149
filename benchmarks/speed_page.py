"""Tables of speed and memory, from the JSON of `capsight bench` and the scripts beside."""

from __future__ import annotations

from typing import Any

import peak_memory
from page_parts import GENERATED, human_bytes, machine, table

Report = dict[str, Any]


def page(
    bench: Report | None, prefill: Report | None, encode: Report | None = None, peak: Report | None = None
) -> str:
    """The whole page, of what there is."""
    lines = [GENERATED, "", "# Speed and memory", "", "`make bench` makes this page.", ""]
    if bench is not None:
        lines += [
            "## Generation",
            "",
            f"Model `{bench['model']}`, medians of {bench['runs']} runs, {bench['new_tokens']} new tokens a "
            "row; in brackets the ratio to the full cache (a `DynamicCache`) in the same run, of tokens/s to "
            "the full cache that decodes fastest there. *compiled*: steps in a graph of `torch.compile`, "
            "over a `StaticCache` or over capsules; how long compiling takes is not counted. "
            f"{machine(bench['machine'])} "
            "*encode* is what filling the method's cache takes once the prefill's keys and values are there. "
            "KV counts the method's modules and, of a full cache, the left padding of shorter rows, which it "
            "stores and capsules do not: with one row there is none.",
            "",
            *_generation(bench),
            "",
        ]
        if bench.get("calibration"):
            lines += ["## Calibration", "", "Fitting once, model loaded.", "", *_calibration(bench), ""]
    if encode is not None:
        lines += ["## Making capsules", "", *_encode(encode), ""]
    if peak is not None:
        lines += ["## Peak memory", "", *_peak(peak), ""]
    if prefill is not None:
        lines += ["## Prefill attention", "", *_prefill(prefill), ""]
    return "\n".join(lines)


def _generation(bench: Report) -> list[str]:
    heads = ["method", "images", "batch", "first token", "encode", "tokens/s", "KV", "peak"]
    if bench.get("kv_budget"):
        heads.append(f"largest batch in {human_bytes(bench['kv_budget'])}")
    rows = []
    for row in bench["rows"]:
        ratios = row["ratios"]
        cells = [
            f"`{row['name']}`",
            str(row["images"]),
            str(row["batch"]),
            f"{row['ttft_s'] * 1e3:.0f} ms ({ratios['ttft']:.2f})",
            f"{row['encode_s'] * 1e3:.1f} ms",
            f"{row['tokens_per_s']:.0f} ({ratios['tokens_per_s']:.2f})",
            f"{human_bytes(row['kv_bytes'] + row['module_bytes'])} ({ratios['bytes']:.2f})",
            "" if row["peak_bytes"] is None else human_bytes(row["peak_bytes"]),
        ]
        rows.append([*cells, *([str(row["largest_batch"])] if bench.get("kv_budget") else [])])
    return table(heads, rows)


def _calibration(bench: Report) -> list[str]:
    rows = [[f"`{f['method']}`", str(f["prompts"]), f"{f['seconds']:.1f} s"] for f in bench["calibration"]]
    return table(["method", "prompts", "seconds"], rows)


def _encode(encode: Report) -> list[str]:
    lead = (
        "Filling a cache from the keys and values of a prefill, eight images a row; *added* is what capsules "
        "take beyond a full cache, as a part of the time to the first token with that one. "
        f"{machine(encode['machine'])} "
        "`python benchmarks/encode_cost.py` measures it."
    )
    rows = [
        [
            row["model"],
            str(row["batch"]),
            str(row["tokens"]),
            *(f"{1e3 * row[name]:.1f} ms" for name in ("first_token_s", "full_s", "capsules_s")),
            f"{100 * row['added']:.1f} %",
        ]
        for row in encode["rows"]
    ]
    heads = ["model", "batch", "tokens", "first token", "full cache", "capsules", "added"]
    return [lead, "", *table(heads, rows)]


def _peak(peak: Report) -> list[str]:
    setup = peak["setup"]
    lead = (
        f"Resident memory of the process while {setup['new_tokens']} tokens are generated for "
        f"{setup['batch']} rows of {setup['images']} images on the reference VLM, beyond what was resident "
        "before. The vision tower runs before there is a cache, and here takes the most; *prefill and "
        "decoding* is the peak from the first text layer on, *held at the end* what stays with the cache. "
        f"{machine(peak['machine'])} `python benchmarks/peak_memory.py` measures it."
    )
    return [lead, "", *table(peak_memory.HEADS, peak_memory.cells(peak["rows"]))]


def _prefill(prefill: Report) -> list[str]:
    setup = prefill["setup"]
    lead = (
        f"One layer of {setup['heads']} query and {setup['kv_heads']} KV heads of {setup['head_dim']} "
        f"channels, {setup['device']}, {prefill['machine']['threads']} threads. The ratio "
        "is against the faster of causal SDPA and causal FlexAttention, all measured in turns."
    )
    rows = [
        [
            str(row["tokens"]),
            str(row["images"]),
            row.get("dtype", setup["dtype"]),
            name,
            f"{seconds * 1e3:.1f} ms",
            f"{row['speedup'][name]:.2f}x" if name in row["speedup"] else "",
        ]
        for row in prefill["rows"]
        for name, seconds in row["seconds"].items()
    ]
    heads = ["tokens", "images", "dtype", "variant", "time", "faster"]
    return [lead, "", *table(heads, rows, 4)]
