"""Sections of evaluations, benchmarks and the demo; a section without material is no section."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from capsight.report import charts
from capsight.report.headline import chosen_row
from capsight.report.inputs import BenchFile, DemoFile, EvalFile
from capsight.report.tables import folded, group_table, human_bytes, methods_table, table

_PROTOCOLS = {
    "after": "images are read and compressed first, then the question is asked: everything the model says "
    "has come through the compressed cache",
    "within": "image and question are read together; compression is seen from the second word of an answer",
}


@dataclass(frozen=True, slots=True)
class Section:
    """One section.

    Attributes:
        key: its id on the page.
        title: plain text.
        lead: one plain sentence on how to read it.
        body: HTML.
    """

    key: str
    title: str
    lead: str
    body: str

    def html(self) -> str:
        """The section element."""
        return (
            f'<section id="{self.key}"><h2>{escape(self.title)}</h2>'
            f'<p class="lead">{escape(self.lead)}</p>{self.body}</section>'
        )


def accuracy(file: EvalFile, ours: str, suffix: str) -> Iterator[Section]:
    """Curves, the table, and the two groupings of one evaluation."""
    chosen = chosen_row(file, ours)
    questions = file.full.questions
    protocol = _PROTOCOLS.get(file.protocol, "")
    where = f" ({file.protocol})" if suffix else ""
    rows = list(file.rows) if chosen is None else charts.comparable(file, chosen)
    body = methods_table(rows, chosen)
    if len(file.rows) > 1:
        body = f"<figure>{charts.curves(file, ours, f'curves{suffix}')}</figure>{body}"
    if len(file.rows) > len(rows):
        body += folded("every method at every budget", methods_table(file.rows, chosen))
    yield Section(
        f"accuracy{suffix}",
        f"Accuracy against memory{where}",
        f"Up and to the left is better. {questions:,} questions, protocol {file.protocol}: {protocol}. Bars "
        "and the band are 95 % intervals; a coloured change is larger than chance explains (p < 0.05).",
        body,
    )
    for group, title, label in (("images", "image count", "image"), ("task", "task", "")):
        if file.full.by.get(group):
            chart = charts.by_group(file, rows, ours, group, title, f"{group}{suffix}")
            of = "" if chosen is None else f" The best methods at about the bytes of {chosen.name}."
            yield Section(
                f"by-{group}{suffix}",
                f"Accuracy by {title}{where}",
                f"Further right is better.{of}",
                f"<figure>{chart}</figure>"
                + folded("every method at every budget", group_table(file.rows, group, label)),
            )


def speed(file: BenchFile) -> Iterator[Section]:
    """Decode speed, time to first token, and the memory of the runs."""
    if charts.speed_rows(file):
        images = charts.speed_rows(file)[0].images
        yield Section(
            "speed",
            "Decode speed against batch",
            f"New tokens per second, of the whole batch; {images} images each; higher is better.",
            f"<figure>{charts.speed(file, 'speed')}</figure>",
        )
    if charts.ttft_rows(file):
        batch = charts.ttft_rows(file)[0].batch
        yield Section(
            "ttft",
            "Time to first token against prompt length",
            f"From the call to the first new token, batch {batch}; lower is better.",
            f"<figure>{charts.ttft(file, 'ttft')}</figure>",
        )
    stateful = any(row.state_bytes for row in file.rows)
    rows = [
        [
            escape(row.name),
            *(f"{n:,}" for n in (row.batch, row.images, row.prompt_tokens)),
            f"{row.ttft_s * 1e3:,.0f} ms",
            f"{row.tokens_per_s:,.0f}",
            *("" if n is None else human_bytes(n) for n in (row.kv_bytes, row.peak_bytes)),
            *([human_bytes(row.state_bytes)] if stateful else []),
        ]
        for row in file.rows
    ]
    heads = (
        "method",
        "batch",
        "images",
        "prompt tokens",
        "first token",
        "tokens/s",
        "KV cache",
        "peak memory",
        *(["states"] if stateful else []),
    )
    body = folded(f"{len(rows)} measurements", table(heads, rows))
    yield Section("bench", "All timings", "Medians, warm-up left out.", body)


def demo(file: DemoFile) -> Section:
    """The questions, and every side's answers and costs."""

    def verdict(answer: str, right: bool) -> str:
        mark, kind = ("✓", "good") if right else ("✗", "bad")
        return f'<span class="{kind}">{mark}</span> {escape(answer)}'

    sides = *file.both, file.heads
    rows = [
        [escape(asked.question), escape(asked.answer), *(verdict(s.answers[i], s.right[i]) for s in sides)]
        for i, asked in enumerate(file.questions)
    ]
    ways = [*dict.fromkeys(way for side in sides for way in side.steps)]
    costs = [
        [
            escape(side.name),
            human_bytes(side.kv_bytes),
            human_bytes(side.module_bytes) if side.module_bytes else "",
            f"{side.ttft_s * 1e3:,.0f} ms ({side.ttft_ratio:.2f}x)",
            *(
                f"{s.tokens_per_s:,.0f} ({s.speed_ratio:.2f}x)" if s else ""
                for s in map(side.steps.get, ways)
            ),
        ]
        for side in sides
    ]
    heads = ("question", "right answer", *(side.name for side in sides))
    speeds = (f"tokens/s, {escape(way)} steps" for way in ways)
    body = table(heads, rows, left=4) + table(("", "KV cache", "modules", "first token", *speeds), costs)
    return Section(
        "demo",
        "One prompt, question by question",
        f"{file.images} image{'s' * (file.images != 1)} that nobody trained on, asked with each cache. "
        "Decode speed is beside that of the full cache where it is fastest.",
        body,
    )
