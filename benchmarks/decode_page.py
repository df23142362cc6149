"""The page of decode speed, from the JSONs of the `decode_*.py` benchmarks."""

from __future__ import annotations

from typing import Any

import decode_reference
from decode_joint import HEADS, cells
from page_parts import GENERATED, human_bytes, machine, speed, table

from capsight.evaluation.stock import COMPILED

Report = dict[str, Any]


def page(
    attention: Report | None,
    model: Report | None,
    joint: Report | None,
    reference: Report | None,
    attention_elsewhere: Report | None,
    elsewhere: Report | None,
) -> str:
    """The whole page, of what there is; the last two are `attention` and `reference` on other processors."""
    lines = [GENERATED, "", "# Decode steps", ""]
    kept = (_attention, attention), (_attention_elsewhere, attention_elsewhere)
    parts = (_joint, joint), (_model, model), (_reference, reference), (_elsewhere, elsewhere)
    for part, report in (*kept, *parts):
        lines += [] if report is None else part(report)
    return "\n".join(lines)


def _model(report: Report) -> list[str]:
    setup = report["setup"]
    heads = [
        "vision tokens",
        "batch",
        "cache",
        "tokens/s",
        "against the fastest",
        "against the default",
        "KV",
    ]
    has = any(row["variant"] == COMPILED for row in report["rows"])
    compiled = " (*compiled*: steps in a graph of `torch.compile`, once that is made)" if has else ""
    first: dict[tuple[int, int], float] = {}  # transformers' default comes first
    for row in report["rows"]:
        first.setdefault((row["tokens"], row["batch"]), row["tokens_per_s"])
    rows = [
        [
            str(row["tokens"]),
            str(row["batch"]),
            row["variant"],
            f"{row['tokens_per_s']:.2f}",
            speed(row["speedup"]),
            speed(row["tokens_per_s"] / first[row["tokens"], row["batch"]]),
            human_bytes(row["cache_nbytes"]),
        ]
        for row in report["rows"]
    ]
    return [
        "## A whole model",
        "",
        f"Tokens per second of a model with random weights ({setup['parameters'] / 1e9:.2f} B, the language "
        f"model of Qwen2.5-0.5B, {setup['dtype']}) after prompts of images of {setup['image_tokens']} "
        "tokens, all rows together: "
        f"medians of {setup['runs']} runs of {setup['new_tokens'] - 1} steps, all taking turns. *against the "
        f"fastest* of transformers' own caches here{compiled}, *against the default*: "
        "`DynamicCache`, which `generate` makes. "
        "A step includes weights and other layers, so at "
        f"few tokens all take about the same time. {machine(report['machine'])} "
        "`python benchmarks/decode_model.py` measures it.",
        "",
        *table(heads, rows, 3),
        "",
    ]


def _attention(report: Report) -> list[str]:
    """Of one layer."""
    setup, where = report["setup"], report["machine"]
    names = list(report["rows"][0]["seconds"])
    ours = list(report["rows"][0]["speedup"])
    heads = ["vision tokens", "batch", "dtype", "retained", *names, *(f"{name} faster" for name in ours)]
    heads += [f"{name} smaller" for name in ours if name in report["rows"][0]["bytes"]]
    worst = {d: _largest(report, d) for d in sorted({row["dtype"] for row in report["rows"]})}
    return [
        "## Attention",
        "",
        f"One layer of {setup['heads']} query and {setup['kv_heads']} KV heads of {setup['head_dim']} "
        f"channels, {setup['text_tokens']} exact tokens a row; "
        f"medians of {report['rows'][0]['repeats']} runs, all taking turns. *sdpa* reads the full cache as "
        "transformers does (`enable_gqa`), *sdpa, grouped* with the query heads of a KV head as rows; "
        "*heads*: each KV head reads the tokens that it kept. *adaptive*: scores and sums over all tokens "
        "follow from those over the kept ones, with stored weights. *native*: kept tokens in 16, 8 or 4 bits "
        "read where they lie by one call of native code, which is what `heads` runs on CPUs; *native, full*: "
        "the full cache read by the same code. *faster* is against the faster SDPA, *smaller* the bytes of "
        "keys and values against the full cache's. The largest difference of an output of *heads* and "
        "*adaptive* from SDPA under a mask, or over rebuilt tokens: "
        f"{', '.join(f'{x:.0e} in {d}' for d, x in worst.items())}. "
        f"Measured on {where['gpu'] or where['cpu']}, {where['threads']} threads, torch {where['torch']}. "
        "`python benchmarks/decode_attention.py` measures it.",
        "",
        *table(heads, [_cells(row, names, ours) for row in report["rows"]]),
        "",
    ]


def _attention_elsewhere(report: Report) -> list[str]:
    """The same on another processor."""
    where, rows = report["machine"], report["rows"]
    names, ours = ([n for n in rows[0][kind] if n not in _SLOW] for kind in ("seconds", "speedup"))
    full = [row["speedup"]["native, full"] for row in rows]
    heads = ["vision tokens", "batch", "dtype", "retained", *names, *(f"{name} faster" for name in ours)]
    return [
        f"The same on {where['cpu']}, {where['threads']} thread{'s' * (where['threads'] != 1)}. SDPA "
        f"multiplies tiles of matrices there, too: the code reads the full cache {min(full):.1f} to "
        f"{max(full):.1f} times as fast, and capsules gain beyond that what bytes they save. Native calls "
        "are those of a compiled step here, which store the new token, too; above, calls of more Python that "
        "do not.",
        "",
        *table(heads, [_cells(row, names, ours) for row in rows]),
        "",
    ]


_SLOW = "heads", "adaptive"
"""Not native: on the first processor's table alone."""


def _joint(report: Report) -> list[str]:
    """Of one layer, latents that all layers share."""
    setup, where, row = report["setup"], report["machine"], report["rows"][0]
    return [
        "## Attention over joint latents",
        "",
        f"One layer of {setup['heads']} query and {setup['kv_heads']} KV heads of {setup['head_dim']} "
        f"channels, bfloat16, images of 1024 tokens; medians of {row['repeats']} runs, both taking turns. "
        "Every layer reads all R numbers of a latent, whatever it would store by itself; positions are "
        "those of M-RoPE with the sections of Qwen2.5-VL. Measured on "
        f"{where['cpu']} ({row['code']}), {where['threads']} threads, torch {where['torch']}. "
        "`python benchmarks/decode_joint.py` measures it.",
        "",
        *table(HEADS, [cells(each) for each in report["rows"]]),
        "",
    ]


def _reference(report: Report) -> list[str]:
    """Of the reference VLM."""
    where = report["machine"]
    return [
        "## The reference VLM",
        "",
        "Prompts of eight images, about 800 tokens a row, float32; all taking turns, round by round in "
        "another order; medians of the ratios in a round, and between which half of them are. *compiled* "
        "runs its steps in a graph of `torch.compile`; *quanto-int4* is transformers' `QuantizedCache`. "
        "Measured on "
        f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}. "
        "`python benchmarks/decode_reference.py` measures it.",
        "",
        *table(decode_reference.HEADS, decode_reference.cells(report["rows"])),
        "",
    ]


def _elsewhere(report: Report) -> list[str]:
    """The same on another processor."""
    where = report["machine"]
    return [
        f"The same on {where['cpu']} (Zen 4, AVX512_BF16, no AMX), {where['threads']} threads, before "
        "steps took less of Python:",
        "",
        *table(decode_reference.HEADS, decode_reference.cells(report["rows"])),
        "",
    ]


def _largest(report: Report, dtype: str) -> float:
    rows = [row for row in report["rows"] if row["dtype"] == dtype]
    return max((x for row in rows for x in row["largest_difference"].values()), default=0.0)


def _cells(row: Report, names: list[str], ours: list[str]) -> list[str]:
    cells = [str(row["tokens"]), str(row["batch"]), row["dtype"], f"{row['retained']:g}"]
    cells += [f"{row['seconds'][name] * 1e3:.2f} ms" for name in names]
    cells += [f"{row['speedup'][name]:.2f}x" for name in ours]
    cells += [f"{row['bytes']['full'] / row['bytes'][name]:.2f}x" for name in ours if name in row["bytes"]]
    return cells
