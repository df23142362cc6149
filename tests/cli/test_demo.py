"""What the demo's tables and picture say of sides that are made up."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from capsight.blindsight import PrefillFlops
from capsight.cli import demo_picture
from capsight.cli.demo_picture import draw_demo
from capsight.cli.demo_sides import Side
from capsight.cli.demo_tables import side_costs
from capsight.evaluation import Answers, Ask, Item
from capsight.evaluation.cache_bytes import CacheBytes
from capsight.evaluation.timing import Timing


def test_text_fits_into_the_cells_of_the_picture(monkeypatch):
    tables, made = [], demo_picture._table
    monkeypatch.setattr(demo_picture, "_table", lambda *of: tables.append(made(*of)) or tables[-1])
    longest = Ask("Which has the larger total, image 10 or image 11?", "image 10", "total")
    answers = Answers(("image 10",), torch.empty(0), CacheBytes(987_600, 987_600, 0))
    names = "full cache", "heads, 41% retained", "joint, 5% retained, 8 bits", "joint + head map"
    flops = PrefillFlops(10**10, 10**11, 10**11)
    sides = [Side(name, answers, Timing(9.999, 9999.0), Timing(1.0, 1.0), 10**6, flops) for name in names]
    draw_demo(Item("a", (Image.new("RGB", (9, 9)),), (longest,)), sides)
    assert len(tables) == 2
    tables[0].get_figure(root=True).draw_without_rendering()
    for cell in (cell for table in tables for cell in table.get_celld().values()):
        text, room = cell.get_text().get_window_extent(), cell.get_window_extent()
        assert room.x0 <= text.x0 <= text.x1 <= room.x1, cell.get_text()


@pytest.mark.parametrize(("modules", "words"), [(60, "100 B (1.00x smaller)"), (210, "250 B (2.50x larger)")])
def test_what_takes_more_than_the_full_cache_is_called_larger(modules, words):
    def side(nbytes, modules, saved):
        answers = Answers((), torch.empty(0), CacheBytes(nbytes, nbytes, 0))
        return Side("", answers, *[Timing(1.0, 1.0)] * 2, modules, PrefillFlops(1000 - saved, 1000, 1000))

    rows = side_costs([side(100, 0, 0), side(40, modules, 1)])
    assert rows["KV cache"][1] == "40 B (2.50x smaller)"
    assert rows["with modules"][1] == words
    assert all("(0%)" in rows[name][1] for name in ("prefill", "of it attention"))
