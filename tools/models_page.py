"""Writes what the family kit finds on every family's tiny model into docs/models.md, between its two marks.

PYTHONPATH=src:tests python tools/models_page.py
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from capsight.checking import CHECKS, Case, run_checks
from tiny import FAMILIES, clip

PAGE = Path(__file__).parents[1] / "docs/models.md"
START, END = "<!-- kit: made by tools/models_page.py -->", "<!-- /kit -->"
FILMS = [([clip()], "a"), ([clip(1), clip(2)], "bb")]
MARKS = {True: "yes", False: "**no**", None: "-"}


def table() -> str:
    """One row a family, one column a check."""
    lines = [f"| tiny model | {' | '.join(CHECKS)} |", f"|---|{'---|' * len(CHECKS)}"]
    for name, build in FAMILIES.items():
        vlm = build()
        videos = partial(vlm.video_inputs, FILMS) if vlm.video_placeholder else None
        results = run_checks(Case(vlm.model, vlm.inputs, (vlm.size, vlm.other_size), videos))
        lines.append(f"| `{name}` | {' | '.join(MARKS[r.passed] for r in results)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{after}")
