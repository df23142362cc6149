"""The page on judges: every method on every judge at equal bytes, by kind of question, beside `joint`."""

from __future__ import annotations

from collections.abc import Iterable

from judges_record import Judged
from page_parts import p_value, table

from capsight.evaluation import FULL, split_label

OURS = "joint"
SHARES = (0.4, 0.2, 0.1, 0.05)
KINDS_AT = 0.1
"""The retained fraction of the table by kind."""
BEHIND = 0.05
"""p below which a difference counts."""

INTRO = """# Judges

The reference VLM, and small VLMs of other classes, shapes and picture styles, trained by `tools/judging`;
`smol` has a pretrained language model and [a page of its own](smol.md).
Nothing was chosen on their test split, and their questions ask about all that a picture holds: what is
usual, what is absent, counts, places, numbers, long descriptions. Protocol
[`after`](../evaluation.md#protocols).

`python benchmarks/judges.py --judge NAME --split test --method ...`, then `python benchmarks/write_pages.py`.
The answers are in `benchmarks/results/judges/NAME.json`.

Bytes: models and caches are bfloat16, and every ratio is one of 16-bit bytes. A fraction in a heading is what
vision tokens may take of theirs; "KV" is what all tokens take, text, positions, indices, scales and zero
points included, modules not. Baselines and peers take a whole picture as one run. What drops no token and has
no budget is compared with `joint` at the largest fraction that takes no more bytes, or else at the smallest.
p by the exact McNemar test on the questions that both were asked.

`keydiff`, `leverage`, `capkv`, `compactor` and `expected-attention` are written from their papers with the
constants of kvpress 0.5.5 (its own code gives the same scores, to 4e-6 of the largest); with `-pooled` the
heads of a layer share their budget. `kivi-B` has keys by channel and values by token in B bits,
`kivi-plain-B` keys before RoPE, `rotated-B` both after a Hadamard rotation: text is stored in few bits, too.
`paged` is what the [vLLM plugin](../serving.md) keeps with blocks of 16 tokens, every head equally many; in
`paged-pooled` the heads of a layer share. `diverse` and `distinct` drop tokens before the language model
reads them. They are in `benchmarks/peers`; all others are methods of `capsight eval`. """


def counterpart(judged: Judged, label: str) -> str | None:
    """The `joint` row that a method is compared with; None for `joint` itself and the full cache."""
    name, retained = split_label(label)
    if name in (OURS, FULL):
        return None
    if retained is not None:
        same = f"{OURS} {retained:g}"
        return same if same in judged.methods else None
    ours = [x for x in judged.methods if split_label(x)[0] == OURS]
    ours = sorted((x for x in ours if split_label(x)[1] in SHARES), key=judged.share)
    fitting = [x for x in ours if judged.share(x) <= judged.share(label)]
    return (fitting or ours[:1] or [None])[-1]


def verdicts(judges: dict[str, Judged]) -> list[str]:
    """Where `joint` is behind another method, plainly, and where it is level or ahead."""
    lines = ["## Is `joint` behind any of them?\n"]
    for name, judged in judges.items():
        pairs = {x: judged.pair(o, x) for x in judged.methods if (o := counterpart(judged, x)) is not None}
        behind = {x: pair for x, pair in pairs.items() if pair.points > 0 and pair.p < BEHIND}
        ahead = sum(pair.points < 0 and pair.p < BEHIND for pair in pairs.values())
        told = ", ".join(
            f"`{x}` by {pair.points:.1f} points (p {p_value(pair.p)}, {judged.share(x):.2f}x of the bytes; "
            f"`{counterpart(judged, x)}` {judged.share(counterpart(judged, x) or x):.2f}x)"
            for x, pair in behind.items()
        )
        lines.append(
            f"- `{name}`: of {len(pairs)} rows of other methods `joint` is ahead of {ahead} and behind "
            f"{len(behind)} (p < {BEHIND}), level with the others. " + (f"Behind {told}." if told else "")
        )
    return lines


def page(judges: dict[str, Judged], more: Iterable[str] = ()) -> str:
    """Markdown of the judges' files; `more` are sections that other modules write."""
    lines = [INTRO, "", *verdicts(judges), "", *more]
    for name, judged in judges.items():
        lines += ["", *_judge(name, judged)]
    return "\n".join(lines) + "\n"


def _judge(name: str, judged: Judged) -> list[str]:
    full = judged.pair(FULL, FULL).questions
    lines = [f"## {name}\n", f"{full} questions; full cache {judged.percent(FULL):.1f} %.\n"]
    names = list(dict.fromkeys(split_label(x)[0] for x in judged.methods if x != FULL))
    budgeted = [n for n in names if f"{n} {SHARES[0]:g}" in judged.methods]
    heads = ["exact match % (KV)", *(f"{share:g}" for share in SHARES), "questions"]
    lines += table(heads, ([f"`{n}`", *_across(judged, n)] for n in budgeted))
    lines += ["", "Every row:", ""]
    heads = [
        "method", "loses most on", "questions", "exact match %", "points lost", "p", "KV bytes",
        "ahead of `joint`", "p",
    ]  # fmt: skip
    wanted = [x for x in judged.methods if x != FULL and split_label(x)[1] in (*SHARES, None)]
    lines += table(heads, (_row(judged, x) for x in wanted), 2)
    kinds = list(judged.kinds(FULL))
    shown = [x for x in wanted if split_label(x)[1] in (KINDS_AT, None)]
    lines += ["", f"By kind of question, exact match % at {KINDS_AT:g} and of methods without a budget:", ""]
    lines += table(["method", *kinds], (_kinds(judged, x, kinds) for x in (FULL, *shown)))
    return lines


def _across(judged: Judged, name: str) -> list[str]:
    labels = [f"{name} {share:g}" for share in SHARES]
    cells = [
        f"{judged.percent(x):.1f} ({judged.share(x):.2f}x)" if x in judged.methods else "" for x in labels
    ]
    asked = [len(judged.right(x)) for x in labels if x in judged.methods]
    return [*cells, str(min(asked))]


def _row(judged: Judged, label: str) -> list[str]:
    lost, (kind, points), ours = judged.lost(label), judged.worst(label), counterpart(judged, label)
    against = ["", ""]
    if ours is not None:
        pair = judged.pair(ours, label)
        against = [f"{pair.points:.1f}", p_value(pair.p)]
    return [
        f"`{label}`", f"{kind}, {points:.1f}", str(lost.questions), f"{judged.percent(label):.1f}",
        f"{lost.points:.1f}", p_value(lost.p), f"{judged.share(label):.3f}x", *against,
    ]  # fmt: skip


def _kinds(judged: Judged, label: str, kinds: list[str]) -> list[str]:
    return [f"`{label}`", *(f"{judged.percent(label, [kind]):.0f}" for kind in kinds)]
