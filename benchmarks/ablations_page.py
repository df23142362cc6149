"""The page of ablations, from the JSON of `ablations.py`."""

from __future__ import annotations

from typing import Any

from page_parts import GENERATED, human_bytes, machine, p_value, table

from capsight.evaluation import FULL

Report = dict[str, Any]

HEADS = (
    "", "retained", "right %", "95 %", "points", "95 %", "p", "same %", "key error", "logit error",
    "value error", "KV bytes", "modules",
)  # fmt: skip

NOTES = {
    "Who shares what `heads` keeps": "All rows keep r tokens of a block and head on average and evict "
    "the rest.",
    "How far a token stands out": "Distances are of the whitened key and value of one head. What those "
    "chosen before predict: as `adaptive` chooses.",
    "What becomes of what `heads` does not keep": "Both rows keep the same tokens. The bytes of the rebuilt "
    "row are those of what it was rebuilt to, not of what would have to be stored.",
    "What is kept, and what becomes of the rest": "Evicted rows keep the tokens of the row above them and "
    "hide the rest from attention: the difference is what rebuilding is worth.",
    "Which token is predicted worst": "All rows rebuild alike; the measure decides what is kept. Mahalanobis "
    "distance: channels are whitened by their covariance over the calibration blocks.",
    "MLP for keys": "The MLP corrects the linear map along the token axis; it starts at zero, and held-out "
    "calibration prompts decide when its training stops.",
    "Which fixed positions": "Values go through PCA in all rows. Farthest point: distance of average keys. "
    "Most attention: from the question of a calibration prompt to each position of a block.",
    "Keys before or after RoPE": "Before: keys are turned back by their M-RoPE angles before they are "
    "stored, and turned again when they are rebuilt.",
    "Blocks: runs of tokens or tiles of 8 x 8": "The two differ on pages of 16 columns only: there a run of "
    "64 tokens is 4 rows of 16.",
    "Shared, or one for each": "Per head, the modules take as many times the bytes as there are KV heads.",
    "Asymmetry: what for keys / what for values": "PCA and retention store the same number of numbers.",
}
"""What a reader has to know of a table."""


def page(report: Report) -> str:
    """The whole page."""
    full, seen = report["methods"][FULL], report["calibration"]
    images = " and ".join(str(n) for n in report["images"])
    lines = [
        GENERATED,
        "",
        "# KVCapsule: what was chosen, and its alternatives",
        "",
        f"Model `{report['model']}`, protocol [`{report['protocol']}`](../evaluation.md#protocols): "
        f"{full['questions']} test questions over {images} images, {report['samples']} prompts each. "
        f"Everything is fitted to the same {seen['prompts']} calibration prompts ({seen['blocks']} blocks), "
        f"none of them a test prompt. {machine(report['machine'])}",
        "`python benchmarks/ablations.py` makes this page.",
        "",
        f"Full cache: {full['exact_match']:.1f} % right ({_interval(full)}).",
        "",
        "**points**: against the first row at the same retained fraction, on the same questions, with a "
        "paired bootstrap interval and McNemar's p. **same**: answers equal to the full cache's. **Errors**: "
        "`|x^ - x| / |x|` of rebuilt keys, of the logits that queries after the images have on them, and of "
        "values; the mean over layers. **KV bytes**: of the full cache, text and block tails (exact "
        "everywhere) included. **modules**: what was learnt, resident once per model. Many rows are "
        "compared: a p of 0.04 among them says little.",
        "",
    ]
    for title, rows in report["tables"].items():
        note = [NOTES[title], ""] if title in NOTES else []
        lines += [f"## {title}", "", *note, *_table(report, rows), ""]
    return "\n".join(lines)


def _table(report: Report, rows: list[Report]) -> list[str]:
    first = {row["retained"]: row["method"] for row in reversed(rows)}
    return table(HEADS, [_cells(row, report["methods"][row["method"]], first) for row in rows])


def _cells(row: Report, method: Report, first: dict[float, str]) -> list[str]:
    against = ["", "", ""]
    if first[row["retained"]] != row["method"]:
        low, high = row["interval"]
        against = [f"{row['difference']:+.1f}", f"{low:+.1f} to {high:+.1f}", p_value(row["p_value"])]
    wrong = [f"{method[e]:.3f}" if e in method else "" for e in ("key_error", "logit_error", "value_error")]
    return [
        row["label"],
        f"{row['retained']:g}",
        f"{method['exact_match']:.1f}",
        _interval(method),
        *against,
        f"{method['agreement']:.1f}",
        *wrong,
        f"{100 * method['kv_bytes'] / method['kv_bytes_full']:.1f} %",
        human_bytes(method["module_bytes"]),
    ]


def _interval(method: Report) -> str:
    low, high = method["interval"]
    return f"{low:.1f}-{high:.1f}"
