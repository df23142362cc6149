"""MkDocs hook: puts every page under docs/benchmarks into the navigation.

Scripts write those pages from benchmarks/results, so which there are is not known here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SECTION = "Benchmarks"


def on_config(config: Any) -> Any:
    """Replace the section's entries by what is in the folder, its index first."""
    folder = Path(config.docs_dir) / "benchmarks"
    names = sorted(path.name for path in folder.glob("*.md") if path.name != "index.md")
    pages = [f"benchmarks/{name}" for name in ["index.md", *names]]
    config.nav = [{SECTION: pages} if SECTION in entry else entry for entry in config.nav]
    return config
