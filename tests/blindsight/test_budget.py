"""Maps of a given cost: as cheap as asked, no cheaper than needed, and the heads that lose least first."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blindsight.layouts import prompt
from capsight.blindsight import SPARSE, Category, HeadMap, MaskOptions, attention_flops
from capsight.blindsight.calibrate import at_cost, cheapest_within
from capsight.errors import OptionError
from capsight.layout import PromptLayout

LAYOUT = PromptLayout((prompt(30, 20, 40),))
ORDER = (Category.SINK, Category.INTRA_IMAGE, Category.INTRA_IMAGE_SINK)


def flops(head_map):
    return attention_flops(LAYOUT, head_map, head_dim=8)


def test_the_cheapest_category_that_is_good_enough():
    lost = torch.tensor([[[0.3, 0.9, 0.9], [0.2, 0.2, 0.9], [0.1, 0.1, 0.9]]])  # [1, 3, 3]
    found = cheapest_within(lost, 0.5, ORDER)
    assert found.categories == ((Category.SINK, Category.INTRA_IMAGE, Category.DENSE),)
    assert cheapest_within(lost, 0.0, ORDER).counts()[Category.DENSE] == 3


@settings(max_examples=30)
@given(st.integers(0, 1000), st.floats(0, 1.1))
def test_cost_is_met_by_one_head_at_the_utmost(seed, share):
    lost = torch.rand(3, 3, 4, generator=torch.Generator().manual_seed(seed))
    options = MaskOptions(own_window=2)
    least = flops(HeadMap.uniform(Category.SINK, 3, 4, options))
    most = least + share * (flops(HeadMap.all_dense(3, 4)) - least)
    found = at_cost(lost, flops, most, options)
    assert found.options == options
    assert flops(found) <= most
    alphas = [0.0] if found.counts()[Category.DENSE] == 12 else sorted({0.0, *lost.flatten().tolist()})
    order = sorted(SPARSE, key=lambda c: flops(HeadMap.uniform(c, 3, 4, options)))
    maps = [cheapest_within(lost, alpha, order, options) for alpha in alphas]
    cheap = [flops(candidate) <= most for candidate in maps]
    assert found.categories == maps[cheap.index(True)].categories


def test_what_no_map_can_save_is_refused():
    with pytest.raises(OptionError, match="smaller saving"):
        at_cost(torch.rand(3, 3, 4), flops, 1.0)
