"""Writes the README's table of figures from the JSON files under benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- numbers", "<!-- /numbers -->"


def load(name: str) -> dict[str, Any] | None:
    """One result file, or None where it has not been made."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def accuracy_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of `make accuracy`."""
    command, methods = "`make accuracy`", report["methods"]
    full = methods["full"]
    by_images = ", ".join(f"{c['exact_match']:.1f} % at {n}" for n, c in full["by"]["images"].items())
    found = [(f"exact match, full cache, by image count ({full['questions']} questions)", by_images, command)]
    for name, row in methods.items():
        if name != "full":
            low, high = row["interval"]
            value = f"{row['exact_match']:.1f} % ({low:.1f}-{high:.1f}), drop {row['drop']:+.1f} points"
            found.append((f"`{name}`, question asked over capsules", value, command))
            ratio = row["kv_bytes_full"] / row["kv_bytes"]
            found.append((f"`{name}`, KV cache after the images", f"{ratio:.2f}x smaller", command))
    return found


def demo_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of `make demo`."""
    full, ours = report["sides"].values()
    ratio = full["kv_bytes"] / (ours["kv_bytes"] + ours["module_bytes"])
    ttft, speed = ours["ttft_s"] / full["ttft_s"], ours["tokens_per_s"] / full["tokens_per_s"]
    return [
        ("KV cache at six images, modules counted", f"{ratio:.2f}x smaller", "`make demo`"),
        ("time to first token", f"{ttft:.2f} of the full cache's", "`make demo`"),
        ("decode tokens/s, one row, `materialise`", f"{speed:.2f} of the full cache's", "`make demo`"),
    ]


def rows() -> list[tuple[str, str, str]]:
    """(figure, value, command) of every result there is."""
    accuracy, demo = load("accuracy.json"), load("demo.json")
    return (accuracy_rows(accuracy) if accuracy else []) + (demo_rows(demo) if demo else [])


def main() -> None:
    """Replace what stands between the markers in README.md."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    start = text.index("\n", text.index(BEGIN)) + 1
    lines = ["| figure | measured | command |", "|---|---|---|"]
    lines += [f"| {figure} | {value} | {command} |" for figure, value, command in rows()]
    readme.write_text(text[:start] + "\n".join(lines) + "\n" + text[text.index(END) :])


if __name__ == "__main__":
    main()
