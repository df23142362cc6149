"""The page of decode attention, from the JSON of `decode_attention.py`."""

from __future__ import annotations

from typing import Any

from page_parts import GENERATED, table

Report = dict[str, Any]


def page(report: Report) -> str:
    """The whole page."""
    setup, where = report["setup"], report["machine"]
    names = list(report["rows"][0]["seconds"])
    heads = ["vision tokens", "batch", "dtype", *names, "faster", "bytes", "largest difference"]
    lines = [
        GENERATED,
        "",
        "# Attention of a decode step",
        "",
        f"One layer of {setup['heads']} query and {setup['kv_heads']} KV heads of {setup['head_dim']} "
        f"channels, {setup['text_tokens']} exact tokens a row, capsules that retain {setup['retained']:g}; "
        f"medians of {report['rows'][0]['repeats']} runs, all taking turns. *sdpa* reads the full cache as "
        "transformers does (`enable_gqa`), *sdpa, grouped* with the query heads of a KV head as rows; "
        "*faster* is latent attention against the faster of the two. "
        f"Measured on {where['gpu'] or where['cpu']}, {where['threads']} threads, torch {where['torch']}. "
        "`python benchmarks/decode_attention.py` measures it.",
        "",
        *table(heads, [_cells(row, names) for row in report["rows"]]),
        "",
    ]
    return "\n".join(lines)


def _cells(row: Report, names: list[str]) -> list[str]:
    return [
        str(row["tokens"]),
        str(row["batch"]),
        row["dtype"],
        *(f"{row['seconds'][name] * 1e3:.2f} ms" for name in names),
        f"{row['speedup']:.2f}x",
        f"{row['bytes']['full'] / row['bytes']['latent']:.2f}x smaller",
        f"{row['largest_difference']:.1e}",
    ]
