"""The page of decode attention, from the JSON of `decode_attention.py`."""

from __future__ import annotations

from typing import Any

from page_parts import GENERATED, table

Report = dict[str, Any]


def page(report: Report) -> str:
    """The whole page."""
    setup, where = report["setup"], report["machine"]
    names = list(report["rows"][0]["seconds"])
    ours = list(report["rows"][0]["speedup"])
    heads = ["vision tokens", "batch", "dtype", "retained", *names]
    heads += [f"{name} {what}" for name in ours for what in ("faster", "smaller")]
    lines = [
        GENERATED,
        "",
        "# Attention of a decode step",
        "",
        f"One layer of {setup['heads']} query and {setup['kv_heads']} KV heads of {setup['head_dim']} "
        f"channels, {setup['text_tokens']} exact tokens a row; "
        f"medians of {report['rows'][0]['repeats']} runs, all taking turns. *sdpa* reads the full cache as "
        "transformers does (`enable_gqa`), *sdpa, grouped* with the query heads of a KV head as rows; "
        "*heads*: each KV head reads the tokens that it kept. *adaptive*: scores and sums over all tokens "
        "follow from those over the kept ones, with stored weights. *faster* is against the faster of the "
        "two, *smaller* the bytes of keys and values against the full cache's. The largest difference of an "
        f"output from SDPA under a mask, or over rebuilt tokens, is {_largest(report, 'float32'):.0e} in "
        f"float32 and {_largest(report, 'bfloat16'):.0e} in bfloat16. "
        f"Measured on {where['gpu'] or where['cpu']}, {where['threads']} threads, torch {where['torch']}. "
        "`python benchmarks/decode_attention.py` measures it.",
        "",
        *table(heads, [_cells(row, names, ours) for row in report["rows"]]),
        "",
    ]
    return "\n".join(lines)


def _largest(report: Report, dtype: str) -> float:
    rows = [row for row in report["rows"] if row["dtype"] == dtype]
    return max((x for row in rows for x in row["largest_difference"].values()), default=0.0)


def _cells(row: Report, names: list[str], ours: list[str]) -> list[str]:
    cells = [str(row["tokens"]), str(row["batch"]), row["dtype"], f"{row['retained']:g}"]
    cells += [f"{row['seconds'][name] * 1e3:.2f} ms" for name in names]
    for name in ours:
        smaller = row["bytes"]["full"] / row["bytes"][name]
        cells += [f"{row['speedup'][name]:.2f}x", f"{smaller:.2f}x"]
    return cells
