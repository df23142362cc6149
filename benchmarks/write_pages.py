"""Writes what is generated from the JSON files under benchmarks/results: README numbers and three pages.

    python benchmarks/write_pages.py

A file that has not been made leaves its part out.
"""

from __future__ import annotations

from pathlib import Path

import ablations_page
import accuracy_page
import readme_numbers
import speed_page
from readme_numbers import load

ROOT = Path(__file__).resolve().parents[1]


def main(root: Path = ROOT) -> None:
    """Write README.md and docs/benchmarks/{accuracy,speed,ablations}.md below `root`."""
    results, pages = root / "benchmarks" / "results", root / "docs" / "benchmarks"
    pages.mkdir(parents=True, exist_ok=True)
    accuracy, bench = load(results, "accuracy.json"), load(results, "bench.json")
    prefill, ablations = load(results, "prefill.json"), load(results, "ablations.json")
    if accuracy is not None:
        (pages / "accuracy.md").write_text(accuracy_page.page(accuracy))
    if bench is not None or prefill is not None:
        (pages / "speed.md").write_text(speed_page.page(bench, prefill))
    if ablations is not None:
        (pages / "ablations.md").write_text(ablations_page.page(ablations))
    readme_numbers.main(root)


if __name__ == "__main__":
    main()
