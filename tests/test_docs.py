"""The Python of the README and the quick start runs as it stands, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from capsight import HeadMap

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("page", "heading"), [("README.md", "## Ten lines"), ("docs/quickstart.md", "# Quick start")]
)
def test_pages_run(monkeypatch, tmp_path, page, heading):
    monkeypatch.chdir(tmp_path)
    HeadMap.from_pretrained("reference").save_pretrained("my-head-map")
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text[text.index(heading) :], re.M | re.S)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        if "calibrate(" not in block:  # which takes minutes
            exec(compile(block, page, "exec"), names)
    assert len(names["out"]) == 1
