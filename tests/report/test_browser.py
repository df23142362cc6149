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


def rendered(folder: Path, page: str, width: int = 1200) -> dict[str, str]:
    """What the spy saw in a page: `asked`, `seen`, `wide`."""
    path = folder / "page.html"
    path.write_text(page.replace("</body>", SPY), encoding="utf-8")
    dom = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         f"--window-size={width},1000", "--virtual-time-budget=3000", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    found = dict(re.findall(r'data-(asked|seen|wide)="([^"]*)"', dom))
    assert set(found) == {"asked", "seen", "wide"}, "the page did not load"
    return {name: value.replace("&quot;", '"') for name, value in found.items()}


@pytest.mark.parametrize("width", [1200, 500])
def test_sections_are_visible_and_nothing_is_requested(everything, tmp_path, width):
    found = rendered(tmp_path, build_report(everything), width)
    assert json.loads(found["seen"]) == SECTIONS
    assert [url for url in json.loads(found["asked"]) if not url.startswith("data:")] == []
    assert int(found["wide"]) <= 0


def test_the_check_sees_requests(everything, tmp_path):
    page = build_report(everything).replace("<main>", '<main><img src="http://127.0.0.1:9/x.png">')
    assert json.loads(rendered(tmp_path, page)["asked"]) == ["http://127.0.0.1:9/x.png"]
