"""What `capsight eval` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from capsight.cli.output import human_bytes

_SCORES = {"exact": "exact match", "normalised": "match", "anls": "ANLS", "relaxed": "relaxed accuracy"}


def print_report(console: Console, report: dict[str, Any], title: str, metric: str = "exact") -> None:
    """The methods in one table, then scores by image count and by task.

    Args:
        console: where to.
        report: of `capsight.evaluation.summary`.
        title: of the first table.
        metric: how answers were scored.
    """
    score, unscored = _SCORES[metric], report["full"]["unscored"]
    if unscored:
        console.print(f"{unscored} questions have no right answer; they are in agreement and KL only")
    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    stateful = any(row["state_bytes"] for row in report.values())
    for column in (
        *(f"{score} %", "drop (p)", "agree %", "KL", "KV cache"),
        *(["states"] if stateful else []),
    ):
        table.add_column(column, justify="right")
    for name, row in report.items():
        share = row["kv_bytes"] / row["kv_bytes_full"] if row["kv_bytes_full"] else 1.0
        (low, high), scored = row["interval"], row["questions"]
        table.add_row(
            name,
            f"{row['exact_match']:.1f} ({low:.0f}-{high:.0f})" if scored else "",
            f"{row['drop']:+.1f} ({row['p_value']:.3f})" if scored and name != "full" else "",
            f"{row['agreement']:.1f}",
            f"{row['kl']:.4f}",
            f"{human_bytes(row['kv_bytes'])} ({share:.2f}x)",
            *([human_bytes(row["state_bytes"])] if stateful else []),
        )
    console.print(table)
    for label in ("images", "task"):
        _print_groups(console, report, label, score)


def _print_groups(console: Console, report: dict[str, Any], label: str, score: str) -> None:
    """Scores by a grouping, a row per method; in slices that fit the width of a terminal."""
    groups = list(report["full"]["by"].get(label, {}).items())
    for start in range(0, len(groups), 6):
        part = groups[start : start + 6]
        detail = Table(title=f"{score} by {label}, %")
        detail.add_column("method", no_wrap=True)
        for value, _ in part:
            detail.add_column(value, justify="right")
        for name, row in report.items():
            cells = (row["by"][label][value]["exact_match"] for value, _ in part)
            detail.add_row(name, *(f"{cell:.1f}" for cell in cells))
        detail.add_row("questions", *(str(cell["questions"]) for _, cell in part))
        console.print(detail)


def print_pairs(console: Console, pairs: list[dict[str, Any]]) -> None:
    """The first method against the others at the same budget, where there are others.

    Args:
        console: where to.
        pairs: of `capsight.evaluation.paired`.
    """
    if not pairs:
        return
    table = Table(title="paired, same questions; points, 95 % interval, exact McNemar p")
    for column in ("method", "against"):
        table.add_column(column, no_wrap=True)
    for column in ("difference", "interval", "only one right", "p"):
        table.add_column(column, justify="right")
    for row in pairs:
        low, high = row["interval"]
        table.add_row(
            row["method"],
            row["against"],
            f"{row['difference']:+.1f}",
            f"{low:+.1f} to {high:+.1f}",
            f"{row['only'][0]} : {row['only'][1]}",
            f"{row['p_value']:.4f}",
        )
    console.print(table)
