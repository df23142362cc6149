"""HTML tables and the escaping that everything on the page goes through."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from capsight.report.headline import SIGNIFICANT, Tile, signed
from capsight.report.inputs import FULL, MethodRow


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, ours: Iterable[int] = ()
) -> str:
    """A table of ready HTML cells.

    Args:
        heads: column titles, plain text.
        rows: cells, already escaped.
        left: how many columns are text.
        ours: rows to stress.
    """
    stressed = set(ours)
    head = "".join(f"<th{_left(i, left)}>{escape(text)}</th>" for i, text in enumerate(heads))
    body = "".join(
        f"<tr{' class=ours' if number in stressed else ''}>"
        + "".join(f"<td{_left(i, left)}>{cell}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def methods_table(rows: Sequence[MethodRow], chosen: MethodRow | None) -> str:
    """Every method and budget; what a phone shows without scrolling comes first."""
    stateful = any(row.state_bytes for row in rows)

    def cells(row: MethodRow) -> list[str]:
        if row.name == FULL:
            name, drop, p, agreement, kl = "full cache", "", "", "", ""
        else:
            name, drop = row.name, signed(-row.drop)
            real = row.p_value < SIGNIFICANT
            drop = f'<span class="{"bad" if row.drop > 0 else "good"}">{drop}</span>' if real else drop
            p = "&lt; 0.001" if row.p_value < 0.001 else f"{row.p_value:.3f}"
            agreement, kl = f"{row.agreement:.1f}", f"{row.kl:.4f}"
        interval = f"{row.interval[0]:.1f}-{row.interval[1]:.1f}"
        return [
            escape(name),
            f"{100 * row.share:.0f} %",
            f"{row.exact_match:.1f}",
            drop,
            p,
            interval,
            agreement,
            kl,
            human_bytes(row.module_bytes) if row.module_bytes else "",
            *([human_bytes(row.state_bytes)] if stateful else []),
        ]

    heads = (
        "method",
        "KV bytes",
        "right %",
        "change",
        "p",
        "95 % interval",
        "same answer %",
        "KL",
        "modules",
        *(["states"] if stateful else []),
    )
    stressed = [i for i, row in enumerate(rows) if row is chosen]
    return table(heads, (cells(row) for row in rows), ours=stressed)


def group_table(rows: Sequence[MethodRow], group: str, label: str) -> str:
    """Exact match of all methods per value of a group."""
    values = list(rows[0].by[group])
    heads = (
        "method",
        *(f"{value} {label}{'' if value == '1' else 's'}" if label else value for value in values),
    )
    body = [
        [escape("full cache" if row.name == FULL else row.name)]
        + [f"{row.by[group][value].exact_match:.1f}" if value in row.by[group] else "" for value in values]
        for row in rows
    ]
    body.append(["questions", *(f"{rows[0].by[group][value].questions:,}" for value in values)])
    return table(heads, body)


def folded(title: str, html: str) -> str:
    """What only those who look for it need; opened on paper."""
    return f"<details><summary>{escape(title)}</summary>{html}</details>"


def tiles(items: Iterable[Tile]) -> str:
    """The large numbers."""
    return '<div class="tiles">{}</div>'.format(
        "".join(
            f'<div class="tile"><b>{escape(t.value)}</b><span>{escape(t.label)}</span>'
            f"<small>{escape(t.note)}</small></div>"
            for t in items
        )
    )


def human_bytes(count: float) -> str:
    """Bytes as B, KB, MB or GB (powers of 1000)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def _left(index: int, left: int) -> str:
    return ' class="left"' if index < left else ""
