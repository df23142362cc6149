from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture
def root(tmp_path):
    """A repository with a README and no results."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text(
        "a\n<!-- summary: made -->\nold\n<!-- /summary -->\n"
        "<!-- numbers: made -->\nold\n<!-- /numbers -->\nb\n"
    )
    return tmp_path
