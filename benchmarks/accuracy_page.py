"""Accuracy tables, from the JSON of `capsight eval`."""

from __future__ import annotations

from typing import Any

from page_parts import GENERATED, human_bytes, machine, p_value, table

from capsight.evaluation import FULL, split_label

Report = dict[str, Any]


def budget_table(report: Report) -> list[str]:
    """Exact match and drop of every method at every budget: the README's table."""
    methods = report["methods"]
    labels = {name: split_label(name) for name in methods if name != FULL}
    budgets = sorted({rho for _, rho in labels.values() if rho is not None}, reverse=True)
    by_name: dict[str, dict[float | None, Report]] = {}
    for label, (name, rho) in labels.items():
        by_name.setdefault(name, {})[rho] = methods[label]
    full = methods[FULL]
    rows = [["full cache", *[f"{full['exact_match']:.1f}"] * max(1, len(budgets))]]
    fixed = []
    for name, found in by_name.items():
        if None in found:
            row = found[None]
            fixed.append(f"`{name}` {_cell(row)} at {_share(row)} of the bytes")
        else:
            rows.append([f"`{name}`", *(_cell(found[rho]) if rho in found else "" for rho in budgets)])
    rows[1:] = sorted(rows[1:], key=lambda row: -_number(row[-1]))
    heads = ["exact match % (points lost) at retained", *(f"{rho:g}" for rho in budgets)]
    lines = table(heads, rows)
    if fixed:
        lines += ["", "Methods whose bytes cannot be chosen: " + "; ".join(fixed) + "."]
    return lines


def page(
    report: Report, title: str = "Accuracy against bytes", note: str = "", command: str = "make accuracy"
) -> str:
    """The whole page; `note` is a sentence about what is compared, `command` what measures it."""
    methods, full = report["methods"], report["methods"][FULL]
    counts = ", ".join(f"{cell['questions']} at {n}" for n, cell in full["by"]["images"].items())
    lines = [
        GENERATED,
        "",
        f"# {title}",
        "",
        *([note, ""] if note else []),
        f"Model `{report['model']}` in {report.get('dtype', 'its own dtype')}, "
        f"protocol [`{report['protocol']}`](../evaluation.md#protocols), "
        f"{full['questions']} questions (by image count: {counts}). {machine(report['machine'])}",
        f"`{command}` makes this page. [How to read the columns](../evaluation.md#how-to-read-the-tables).",
        "",
        *budget_table(report),
        "",
        "## Every method at every budget",
        "",
        *_methods(methods),
        "",
    ]
    if report.get("paired"):
        lines += ["## The first method against the others, on the same questions", "", *_pairs(report), ""]
    for label, title in (("images", "By image count"), ("task", "By task")):
        lines += [f"## {title}", "", "Exact match, %.", "", *_groups(methods, label), ""]
    return "\n".join(lines)


def _methods(methods: dict[str, Report]) -> list[str]:
    heads = ["method", "KV bytes", "modules", "right %", "95 %", "lost", "95 %", "p", "same %", "KL"]
    rows = []
    for name, row in methods.items():
        against = ["", "", "", "", ""]
        if name != FULL:
            low, high = row["drop_interval"]
            against = [
                f"{row['drop']:+.1f}",
                f"{low:+.1f} to {high:+.1f}",
                p_value(row["p_value"]),
                f"{row['agreement']:.1f}",
                f"{row['kl']:.4f}",
            ]
        low, high = row["interval"]
        modules = human_bytes(row["module_bytes"]) if row["module_bytes"] else ""
        cells = [f"`{name}`", _share(row), modules, f"{row['exact_match']:.1f}", f"{low:.1f}-{high:.1f}"]
        rows.append([*cells, *against])
    return table(heads, rows)


def _pairs(report: Report) -> list[str]:
    heads = ["method", "against", "points", "95 %", "only the one right", "only the other", "p"]
    rows = [
        [
            f"`{row['method']}`",
            f"`{row['against']}`",
            f"{row['difference']:+.1f}",
            "{:+.1f} to {:+.1f}".format(*row["interval"]),
            *(str(count) for count in row["only"]),
            p_value(row["p_value"]),
        ]
        for row in report["paired"]
    ]
    return table(heads, rows, 2)


def _groups(methods: dict[str, Report], label: str) -> list[str]:
    values = list(methods[FULL]["by"][label])
    rows = [
        [f"`{name}`", *(f"{row['by'][label][value]['exact_match']:.1f}" for value in values)]
        for name, row in methods.items()
    ]
    questions = [str(methods[FULL]["by"][label][value]["questions"]) for value in values]
    return table(["method", *values], [*rows, ["questions", *questions]])


def _cell(row: Report) -> str:
    return f"{row['exact_match']:.1f} ({-row['drop']:+.1f})"


def _share(row: Report) -> str:
    return f"{100 * row['kv_bytes'] / row['kv_bytes_full']:.0f} %"


def _number(cell: str) -> float:
    return float(cell.split()[0]) if cell else -1.0
