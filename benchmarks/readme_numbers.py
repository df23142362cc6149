"""Writes the README's figures from the JSON files under benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from judges_record import Record
from judges_sections import means
from page_parts import apart, human_bytes, table

from capsight.baselines import METHODS
from capsight.evaluation import FULL, split_label

ROOT = Path(__file__).resolve().parents[1]
OURS, DEFAULT_RETAINED = "joint", 0.05
"""The default codec, which the summary is about, and its default."""

SHARE = 0.1
"""The retained fraction at which the summary sets other methods beside it."""

MORE = "[more prompts](docs/benchmarks/accuracy-more.md)"

CLOSE = 1.0
"""Points that the smallest cache of the summary may lose."""

Report = dict[str, Any]
Row = tuple[str, str, str]


def load(results: Path, name: str) -> Report | None:
    """One result file, or None where it has not been made."""
    path = results / name
    return json.loads(path.read_text()) if path.exists() else None


def summary_lines(accuracy: Report, bits: Report | None) -> list[str]:
    """The first figures of the reference VLM."""
    lines = []
    rows = {} if bits is None else {n: row for n, row in bits["methods"].items() if n != FULL}
    close = {
        name: row["kv_bytes_full"] / row["kv_bytes"] for name, row in rows.items() if row["drop"] <= CLOSE
    }
    default = rows.get(f"{OURS} {DEFAULT_RETAINED:g}")
    if bits is not None and default is not None:
        smaller = default["kv_bytes_full"] / default["kv_bytes"]
        smallest = max(close, key=close.__getitem__)
        modules, least = human_bytes(default["module_bytes"]), rows[smallest]
        full = bits["methods"][FULL]["exact_match"]
        lines = [
            f"- The default, `{OURS} {DEFAULT_RETAINED:g}`, answers **{default['exact_match']:.1f} %** of "
            f"{default['questions']} test questions right, the full cache {full:.1f} %. The "
            f"{bits['dtype']} KV cache is **{smaller:.1f} times smaller**, text included; modules, "
            f"{modules} once per model, are not counted.",
            f"- The smallest cache that loses no more than {CLOSE:g} point is {close[smallest]:.1f} times "
            f"smaller (`{smallest}`, {least['exact_match']:.1f} %).",
        ]
    right = {name: row["exact_match"] for name, row in accuracy["methods"].items()}
    others = {name: value for name, value in right.items() if split_label(name)[0] in METHODS}
    others = {name: value for name, value in others.items() if split_label(name)[1] == SHARE}
    ours, floor = (f"{name} {SHARE:g}" for name in (OURS, "uniform"))
    if ours in right and floor in others:
        best = max(others, key=others.__getitem__)
        lines.append(
            f"- At {SHARE:g} `{OURS}` has {right[ours]:.1f} %, the best other method of no fewer bytes "
            f"(`{split_label(best)[0]}`) {right[best]:.1f} %, a uniform choice of tokens "
            f"{right[floor]:.1f} %."
        )
    return lines


def accuracy_lines(report: Report, more: Report | None) -> list[str]:
    """What was asked, and where the tables are."""
    full = report["methods"]["full"]
    by_images = ", ".join(f"{c['exact_match']:.1f} % at {n}" for n, c in full["by"]["images"].items())
    many = [] if more is None else [f"A larger run, by `make accuracy-more`: {MORE}."]
    return [
        f"{full['questions']} test questions of the reference task, asked over the compressed cache "
        f"(protocol `{report['protocol']}`, `make accuracy`). The full cache by image count: {by_images}. "
        "All methods of `capsight eval` at four budgets: [accuracy](docs/benchmarks/accuracy.md).",
        *many,
        "",
    ]


def demo_rows(report: Report) -> list[Row]:
    """Rows of `make demo`."""
    full, ours = report["sides"].values()
    ratio = full["kv_bytes"] / (ours["kv_bytes"] + ours["module_bytes"])
    ttft = ours["ttft_ratio"]
    rows = [
        ("KV cache at six images, modules counted", f"{ratio:.2f}x smaller", "`make demo`"),
        ("time to first token", f"{apart(ttft, 'later')} than with `DynamicCache`", "`make demo`"),
    ]
    for name, side in (("decode tokens/s, one row", ours), ("the same with `heads` 0.4", report["heads"])):
        speeds = {way: pace["speed_ratio"] for way, pace in side["steps"].items()}
        rows.append((name, _steps(speeds), "`make demo`"))
    return rows


_PROMPT = "method", "retained", "decode", "batch", "images"


def _steps(speeds: dict[str, float]) -> str:
    """Compiled steps first."""
    said = (f"{way} {apart(speeds[way])}" for way in ("compiled", "eager") if way in speeds)
    return f"{', '.join(said)} than the fastest full cache"


def bench_rows(report: Report) -> list[Row]:
    """Rows of `capsight bench` of the default codec and of `heads` in 16 bits; the page has all."""
    found = []
    for row in report["rows"]:
        if row["method"] not in (OURS, "heads") or row["compiled"]:
            continue
        ratios = row["ratios"]
        same = [r for r in report["rows"] if all(r[name] == row[name] for name in _PROMPT)]
        speeds = {"compiled" if r["compiled"] else "eager": r["ratios"]["tokens_per_s"] for r in same}
        value = (
            f"{_steps(speeds)} in tokens/s, first token {apart(ratios['ttft'], 'later')} than with "
            f"`DynamicCache`, {100 - 100 * ratios['bytes']:.0f} % fewer bytes"
        )
        found.append(
            (f"`{row['name']}`, {row['images']} images, batch {row['batch']}", value, "`make bench`")
        )
    return found


def prefill_rows(report: Report) -> list[Row]:
    """The longest prompt of prefill_attention.py."""
    row = report["rows"][-1]
    value = ", ".join(f"{name}: {ratio:.2f}x" for name, ratio in row["speedup"].items())
    return [
        (f"prefill attention at {row['tokens']} tokens against the faster dense one", value, "`make bench`")
    ]


def lines(results: Path) -> list[str]:
    """Everything between the markers."""
    made: list[Row] = []
    for name, rows in (
        ("demo.json", demo_rows),
        ("bench.json", bench_rows),
        ("prefill_longest.json", prefill_rows),
    ):
        report = load(results, name)
        made += rows(report) if report is not None else []
    accuracy = load(results, "accuracy.json")
    return [
        *([] if accuracy is None else accuracy_lines(accuracy, load(results, "accuracy_more.json"))),
        *(table(("figure", "measured", "command"), made, 3) if made else []),
    ]


def main(root: Path = ROOT) -> None:
    """Replace what stands between the markers in README.md."""
    readme, results = root / "README.md", root / "benchmarks" / "results"
    accuracy = load(results, "accuracy.json")
    first = [] if accuracy is None else summary_lines(accuracy, load(results, "bits.json"))
    text = _replaced(readme.read_text(), "summary", first)
    if judges := Record(results / "judges").judges("test"):
        text = _replaced(text, "judges", means(judges)[1:])
    readme.write_text(_replaced(text, "numbers", ["", *lines(results), ""]))


def _replaced(text: str, name: str, found: list[str]) -> str:
    """The text with these lines between the markers of this name."""
    begin, end = text.index(f"<!-- {name}"), text.index(f"<!-- /{name} -->")
    start = text.index("\n", begin) + 1
    return text[:start] + "".join(f"{line}\n" for line in found) + text[end:]


if __name__ == "__main__":
    main()
