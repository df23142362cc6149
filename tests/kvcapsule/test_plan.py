from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capsight.errors import OptionError
from capsight.kvcapsule.cache.placement import Placement
from capsight.kvcapsule.plan import CapsulePlan, Run
from capsight.layout import PromptLayout
from kvcapsule.conftest import layouts, row

CPU = torch.device("cpu")


def test_runs_tails_and_neighbouring_images():
    layout = PromptLayout((row(40, 2, (4, 15), (15, 20)), row(40, 0)))
    plan = CapsulePlan.from_layout(layout, 4)
    assert plan.runs == (Run(0, 4, 4), Run(0, 8, 4), Run(0, 15, 4))
    assert plan.complete(12) == (Run(0, 4, 4), Run(0, 8, 4))
    assert plan.capsule_tokens == 12
    assert plan.real_tokens(40) == 78
    assert plan.real_tokens(1) == 1


@given(layouts(), st.integers(2, 9), st.data())
def test_every_token_is_padding_exact_or_in_one_run(layout, size, data):
    plan = CapsulePlan.from_layout(layout, size)
    seen = data.draw(st.integers(0, layout.length))
    placement = Placement.build(plan.complete(seen), plan.pads, size, seen, CPU)
    marks = torch.zeros(layout.batch_size, seen, dtype=torch.int64)
    marks.view(-1)[placement.exact_slots(seen)] += 1
    marks.view(-1)[placement.run_slots(seen)] += 2
    for index, layout_row in enumerate(layout.rows):
        for position in range(seen):
            block = layout_row.block_at(position)
            expected = 0 if position < layout_row.pad_left else 1
            if block is not None:
                start = block.start + (position - block.start) // size * size
                expected = 2 if start + size <= min(block.end, seen) else 1
            assert marks[index, position] == expected


@given(layouts(), st.data())
def test_select_is_the_placement_of_the_selected_rows(layout, data):
    rows = data.draw(st.lists(st.integers(0, layout.batch_size - 1), min_size=1, max_size=5))
    seen = layout.length
    plan, chosen = (CapsulePlan.from_layout(x, 4) for x in (layout, layout.select(rows)))
    old = Placement.build(plan.complete(seen), plan.pads, 4, seen, CPU)
    new, runs, exact = old.select(rows)
    fresh = Placement.build(chosen.complete(seen), chosen.pads, 4, seen, CPU)
    assert new.runs == fresh.runs
    assert torch.equal(new.exact_slots(seen), fresh.exact_slots(seen))
    assert torch.equal(old.run_starts[runs], fresh.run_starts)
    assert torch.equal(old.exact_cols[exact], fresh.exact_cols)
    assert [rows[i] for i in fresh.run_rows.tolist()] == old.run_rows[runs].tolist()


def test_block_size_must_hold_a_token():
    for size in (0, -3):
        with pytest.raises(OptionError, match="block_size"):
            CapsulePlan.from_layout(PromptLayout((row(9, 0, (1, 5)),)), size)
