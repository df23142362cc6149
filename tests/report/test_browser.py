"""The page in a real browser: every section is there, and the network is asked for nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from capsight.report import build_report
from report.test_page import SECTIONS

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
SPY = """<script>addEventListener("load", () => {
  const asked = performance.getEntriesByType("resource").map(entry => entry.name);
  document.body.dataset.asked = JSON.stringify(asked);
  const seen = [...document.querySelectorAll("section")].filter(s => s.getBoundingClientRect().height > 60);
  document.body.dataset.seen = JSON.stringify(seen.map(s => s.id));
  document.body.dataset.wide = document.documentElement.scrollWidth - innerWidth;
})</script></body>"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium on the path; install it to run browser tests"),
]


PHONE = 390
"""Pixels; a window of chromium is never so narrow, a frame in one is."""

FRAMED_SPY = """<script>addEventListener("load", () => {
  const shown = [...document.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().width > 0);
  const size = (text, to) => parseFloat(getComputedStyle(text).fontSize) * Math.hypot(to.a, to.b);
  const letters = shown.flatMap(svg => [...svg.querySelectorAll("text")].map(t => size(t, t.getScreenCTM())));
  const change = [...document.querySelectorAll("th")].filter(
    th => th.textContent === "change" && th.getBoundingClientRect().width > 0);
  const cells = change.flatMap(th => [...th.closest("table").rows].map(row => row.cells[th.cellIndex]));
  const figures = [...document.querySelectorAll("figure")];
  parent.postMessage({
    inner: innerWidth, wide: document.documentElement.scrollWidth - innerWidth,
    smallest: Math.min(...letters), letters: letters.length,
    right: Math.max(...shown.map(svg => svg.getBoundingClientRect().right)),
    change: Math.max(...cells.map(cell => cell.getBoundingClientRect().right)), cells: cells.length,
    blank: figures.filter(f => f.getBoundingClientRect().height < 100).length, figures: figures.length,
    headline: document.getElementById("headline").textContent,
  }, "*");
})</script></body>"""


def framed(folder: Path, page: str, width: int) -> dict[str, float]:
    """Sizes in pixels of a page in a frame `width` wide."""
    (folder / "inner.html").write_text(page.replace("</body>", FRAMED_SPY), encoding="utf-8")
    outer = folder / "outer.html"
    outer.write_text(
        "<body><script>addEventListener('message', e => document.body.dataset.seen = JSON.stringify(e.data))"
        f"</script><iframe src='inner.html' style='width:{width}px;height:3000px;border:0'></iframe></body>",
        encoding="utf-8",
    )
    found = re.search(r'data-seen="([^"]*)"', dumped(folder, outer, 1200))
    assert found is not None, "the page did not load"
    return json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))


def rendered(folder: Path, page: str, width: int = 1200) -> dict[str, str]:
    """What the spy saw in a page: `asked`, `seen`, `wide`."""
    path = folder / "page.html"
    path.write_text(page.replace("</body>", SPY), encoding="utf-8")
    found = dict(re.findall(r'data-(asked|seen|wide)="([^"]*)"', dumped(folder, path, width)))
    assert set(found) == {"asked", "seen", "wide"}, "the page did not load"
    return {name: value.replace("&quot;", '"') for name, value in found.items()}


def dumped(folder: Path, path: Path, width: int) -> str:
    """The document as it is after its scripts have run."""
    return subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         f"--window-size={width},1000", "--virtual-time-budget=3000", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip


@pytest.mark.parametrize("width", [PHONE, 1000])
def test_charts_and_changes_are_legible(everything, tmp_path, width):
    found = framed(tmp_path, build_report(everything), width)
    assert found["inner"] == width
    assert found["wide"] <= 0
    assert found["letters"] > 50
    assert found["smallest"] >= 10
    assert found["right"] <= width
    assert found["cells"] > 3
    assert found["change"] <= width
    assert (found["figures"] > 5, found["blank"]) == (True, 0)


@pytest.mark.parametrize("width", [1200, 500])
def test_sections_are_visible_and_nothing_is_requested(everything, tmp_path, width):
    found = rendered(tmp_path, build_report(everything), width)
    assert json.loads(found["seen"]) == SECTIONS
    assert [url for url in json.loads(found["asked"]) if not url.startswith("data:")] == []
    assert int(found["wide"]) <= 0


def test_the_check_sees_requests(everything, tmp_path):
    page = build_report(everything).replace("<main>", '<main><img src="http://127.0.0.1:9/x.png">')
    assert json.loads(rendered(tmp_path, page)["asked"]) == ["http://127.0.0.1:9/x.png"]
