"""Sections of the judges' page on all judges: means, smallest bytes, choices left out, long answers."""

from __future__ import annotations

from typing import Any

from judges_choice import best, size_of
from judges_record import FEW, Judged
from page_parts import human_bytes, p_value, table

from capsight.evaluation import FULL, split_label

Report = dict[str, Any]
SHARES = (0.4, 0.2, 0.1, 0.05)
PRETRAINED = ("smol",)
"""Judges whose language model was pretrained: they have a table with intervals, too."""
WITHIN = 1.0
"""Points that the smallest cache may lose on any judge."""


def means(judges: dict[str, Judged]) -> list[str]:
    """Every method's points lost, the mean over judges, and the kind of question that loses most."""
    names = list(dict.fromkeys(split_label(x)[0] for j in judges.values() for x in j.methods if x != FULL))
    rows = []
    for name in names:
        cells = []
        for share in SHARES:
            label = f"{name} {share:g}" if split_label(f"{name} {share:g}")[0] == name else name
            label = label if any(label in j.methods for j in judges.values()) else name
            if label == name and share != SHARES[0]:
                cells.append("")
                continue
            if not all(label in j.methods for j in judges.values()):
                break
            lost = [j.lost(label).points for j in judges.values()]
            cells.append(f"{round(sum(lost) / len(lost), 1) + 0.0:.1f} ({max(lost):.1f})")  # no "-0.0"
        if len(cells) == len(SHARES):
            label = f"{name} 0.1" if any(f"{name} 0.1" in j.methods for j in judges.values()) else name
            worst = max(((*j.worst(label), key) for key, j in judges.items()), key=lambda w: w[1])
            rows.append([f"`{name}`", *cells, f"{worst[0]} of {worst[2]}, {worst[1]:.1f}"])
    heads = ["points lost, mean (worst judge)", *(f"{s:g}" for s in SHARES), "loses most at 0.1 on"]
    return [
        "## Mean over the judges\n",
        f"{', '.join(f'`{name}`' for name in judges)}. Methods without a budget stand in the first column. A "
        "kind of question counts from 5 questions on, so that one answer is up to 20 points.\n",
        *table(heads, rows),
    ]


def pretrained(judges: dict[str, Judged]) -> list[str]:
    """Points lost on judges with a pretrained language model, with intervals of the paired difference."""
    lines: list[str] = []
    for name, judged in judges.items():
        if name not in PRETRAINED:
            continue
        lines += [
            f"`{name}`, whose language model was pretrained (SmolLM2-135M), of photographs, icons, shapes, "
            f"pages: {judged.lost(FULL).questions} questions, full cache "
            f"{judged.percent(FULL):.1f} %. Points lost, with the 95 % interval of the paired difference:\n",
        ]
        rows = []
        for method in dict.fromkeys(split_label(x)[0] for x in judged.methods if x != FULL):
            labels = [f"{method} {share:g}" for share in SHARES]
            labels = labels if any(x in judged.methods for x in labels) else [method]
            cells = [_interval(judged, x) if x in judged.methods else "" for x in labels]
            rows.append([f"`{method}`", *cells, *[""] * (len(SHARES) - len(cells))])
        lines += [*table(["points lost", *(f"{s:g}" for s in SHARES)], rows), ""]
    return lines[:-1]


def _interval(judged: Judged, label: str) -> str:
    low, high = judged.lost_interval(label)
    return f"{judged.lost(label).points:.1f} ({low:.1f} to {high:.1f})"


def smallest(dev: dict[str, Judged], test: dict[str, Judged]) -> list[str]:
    """The smallest `joint` within a point on every judge: chosen on `dev`, asked on `test`."""
    judges = [name for name in dev if name in test]
    labels = [x for x in dev[judges[0]].methods if split_label(x)[0] == "joint"] if judges else []
    labels = [x for x in labels if all(x in dev[j].methods for j in judges)]
    if not labels:
        return []
    labels.sort(key=lambda label: -(split_label(label)[1] or 0))
    chosen = best(
        labels,
        lambda label: max(dev[j].lost(label).points for j in judges),
        size_of(dev[j] for j in judges),
        WITHIN,
    )
    rows = []
    for label in labels:
        mark = "**" if label == chosen else ""
        cells = [f"{dev[j].lost(label).points:.1f}, {_points(test[j], label)}" for j in judges]
        kv = [f"{1 / dev[j].share(label):.1f}x" for j in judges]
        rows.append([f"{mark}`{label}`{mark}", *cells, *kv])
    heads = ["", *(f"{j}: lost on dev, on test" for j in judges), *(f"{j}: all KV" for j in judges)]
    published = [j for j in judges if chosen in test[j].methods]
    told = ", ".join(
        f"`{j}` {test[j].lost(chosen).points:.1f} points (p {p_value(test[j].lost(chosen).p)})"
        for j in published
    )
    share = split_label(chosen)[1] or 1.0
    modules = ", ".join(
        f"`{j}` {human_bytes(test[j].values['methods'][chosen]['module_bytes'])} (with them one "
        f"prompt takes {test[j].share(chosen, modules=True):.0%} of its full cache)".replace("%", " %")
        for j in published
    )
    return [
        "## Smallest bytes within a point\n",
        f"The smallest fraction of `joint` that loses at most {WITHIN:g} point on the `dev` split of every "
        f"judge is {share:g}: vision tokens in 1/{1 / share:.0f} of their 16-bit bytes. On `test` it loses "
        f"{told}. Text stays in 16 bits and is counted in the last columns. What was learnt is resident once "
        f"per model and not counted there: {modules}. These models are so small that modules weigh more than "
        "a prompt.\n",
        *table(heads, rows),
    ]


def _points(judged: Judged, label: str) -> str:
    return f"{judged.lost(label).points:.1f}" if label in judged.methods else "not asked"


def left_out(choice: Report | None) -> list[str]:
    """What a choice gives on the judge, or the kind of question, that it did not see."""
    if choice is None:
        return []
    candidates = " ".join(f'--candidate "{label}"' for label in choice["candidates"])
    asked = [row for row in choice["judges"] if "lost" in row]
    by_judge = [
        [row["left_out"], f"`{row['chosen']}`", f"{row['lost']:.1f}", p_value(row["p"]), f"{row['kv']:.3f}x"]
        for row in asked
    ]
    known = [row for row in choice["kinds"] if row.get("questions", 0) >= FEW]
    kinds = sorted(known, key=lambda row: -row["lost"])
    by_kind = [
        [f"{row['left_out']} ({row['judge']})", f"`{row['chosen']}`", str(row["questions"]),
         f"{row['lost']:.1f}", p_value(row["p"])]
        for row in kinds[:8]
    ]  # fmt: skip
    ahead = sum(row["lost"] > 0 for row in kinds)
    return [
        "## Choices without what they are judged by\n",
        f"`python benchmarks/judges_choice.py {candidates}`: the fewest bytes within {choice['within']:g} "
        "points on the `dev` split of all other judges; the figure is the `test` split of the judge left "
        "out.\n",
        *table(["left out", "chosen", "points lost there", "p", "KV"], by_judge, 2),
        "",
        f"Over kinds of question, each left out of the choice on all judges: {ahead} of {len(kinds)} kinds "
        "and judges lose anything; those that lose most:\n",
        *table(["left out", "chosen", "questions", "points lost there", "p"], by_kind, 2),
    ]


def variance(report: Report | None) -> list[str]:
    """Captured variance against rank."""
    if report is None:
        return []
    ranks = list(dict.fromkeys(rank for row in report["judges"].values() for rank in row["kept"]))
    rows = [
        [f"`{name}`", str(row["numbers"]), *(f"{100 * row['kept'].get(rank, 1):.1f}" for rank in ranks)]
        for name, row in report["judges"].items()
    ]
    return [
        "## How much R coordinates keep\n",
        "Share (%) of the variance of a vision token's keys before RoPE and values, all layers together and "
        "weighted as the codec weighs them, that its first R coordinates keep, on calibration pictures that "
        "no part was fitted to (`python benchmarks/variance.py`). These are small models on drawn pictures: "
        "a real one has to be looked at itself.\n",
        *table(["judge", "numbers a token", *(f"R = {rank}" for rank in ranks)], rows),
    ]


def long_answers(report: Report | None) -> list[str]:
    """Long answers and many questions over one cache."""
    if report is None:
        return []
    told = {
        "own": "10 questions, each on its own",
        "chain": "the same 10 in one conversation",
        "describe": "4 descriptions in one conversation",
    }
    rows = []
    for name, row in report["judges"].items():
        for part, own in row["parts"].items():
            rows.append(
                [f"`{name}`", told[part], str(own["questions"]), str(own["tokens"]), f"{own['full']:.1f}",
                 f"{own['joint']:.1f}", p_value(own["p"]), f"{own['agreement']:.1f}"]
            )  # fmt: skip
        long = row["long"]
        rows.append(
            [f"`{name}`", f"{long['tokens']} tokens without an end (equal up to {long['before']}, median)",
             str(row["prompts"]), str(long["tokens"]), "", "", "", f"{long['same']:.1f}"]
        )  # fmt: skip
    first = next(iter(report["judges"].values()))
    heads = [
        "judge", f"over one cache of {first['pictures']} pictures", "questions", "tokens a prompt",
        "full cache %", f"`joint {first['retained']:g}` %", "p", "equal to the full cache's %",
    ]  # fmt: skip
    return [
        "## Many questions, long answers\n",
        "`python benchmarks/long_answers.py`. No judge was trained for conversations of several questions, "
        "and the full cache fails at most of them, too: there the last column is the figure.\n",
        *table(heads, rows, 2),
    ]
