"""Tables of the cards: how many questions were answered right, by kind."""

from collections.abc import Iterable, Mapping, Sequence


def counts(right: Mapping[str, tuple[int, int]], kinds: Iterable[str]) -> dict[str, str]:
    """`right/asked` of the kinds that were asked, in their order."""
    return {kind: "{}/{}".format(*right[kind]) for kind in kinds if kind in right}


def table(heads: Sequence[str], kinds: Iterable[str], columns: Sequence[Mapping[str, str]]) -> list[str]:
    """Lines of a Markdown table with a row for each kind: right answers in %, and how many were asked."""
    lines = ["| kind | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    return lines + [f"| {kind} | " + " | ".join(_cell(c.get(kind)) for c in columns) + " |" for kind in kinds]


def _cell(count: str | None) -> str:
    if count is None:
        return ""
    right, asked = map(int, count.split("/"))
    return f"{100 * right / asked:.1f} ({asked})"
