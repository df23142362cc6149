"""`auto` follows the measured table, and says so when it cannot."""

import json
import warnings
from importlib.resources import files

import pytest
import torch

from blindsight.layouts import prompt
from capsight.blindsight import BaseRule, Category, MaskOptions, sparse_attention
from capsight.blindsight.attention import auto, choice, flex, segments
from capsight.blindsight.attention.work import Work
from capsight.blindsight.spans import Chunk, whole
from capsight.layout import PromptLayout

MIXED = (Category.DENSE, Category.INTRA_IMAGE_SINK, Category.SINK, Category.INTRA_IMAGE)
STEPS = {"dense": [[0, "segments"]], "own_image": [[0, "segments"], [300, "flex"]], "sink": [[0, "flex"]]}
ROW = prompt(200, 200)


@pytest.fixture
def table(monkeypatch):
    """A table of this test's own, for float32; bfloat16 is computed in float32."""
    names = ("cpu", "cpu amx")
    in_float32 = {kind: [[0, "segments_float32"]] for kind in STEPS}
    made = {name: {"float32": STEPS, "bfloat16": in_float32} for name in names}
    monkeypatch.setattr(choice, "_table", lambda: made)
    monkeypatch.setattr(auto, "_WITHOUT_FLEX", set())


def work(category, chunk=None, rule=None):
    return Work(ROW, category, MaskOptions(), rule or BaseRule(), chunk or whole(ROW))


def qkv(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 4, ROW.length, 8, generator=generator).to(dtype) for _ in range(3)]


def test_the_table_is_followed(table):
    query = torch.zeros(1, 1, ROW.length, 8)
    assert auto.choose(work(Category.DENSE), query) is segments.attend
    assert auto.choose(work(Category.INTRA_IMAGE), query) is auto.flex_or_segments
    assert auto.choose(work(Category.SINK), query) is auto.flex_or_segments
    assert auto.choose(work(Category.SINK), query[:, :, :100]) is segments.attend
    short = Chunk(0, 0, 299)
    assert auto.choose(work(Category.INTRA_IMAGE, short), query[:, :, :299]) is segments.attend
    later = Chunk(0, 10, ROW.length)
    assert auto.choose(work(Category.DENSE, later), query[:, :, 10:]) is auto.flex_or_segments
    assert auto.choose(work(Category.DENSE, rule=BaseRule(50)), query) is auto.flex_or_segments


def test_what_was_not_measured_has_a_choice(table):
    assert choice.fastest(torch.device("meta"), torch.float32, "dense", 1 << 20) == "segments"
    assert choice.fastest(torch.device("cpu"), torch.float16, "sink", 1 << 20) == "flex"
    assert choice.fastest(torch.device("cpu"), torch.float16, "sink", 1) == "segments"


def test_bfloat16_computed_in_float32_is_nearer_to_exact(table):
    layout = PromptLayout((ROW,))
    q, k, v = qkv(torch.bfloat16)
    exact = sparse_attention(q.float(), k.float(), v.float(), layout, MIXED, implementation="reference")
    ours = sparse_attention(q, k, v, layout, MIXED)
    plain = sparse_attention(q, k, v, layout, MIXED, implementation="segments")
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() <= (plain - exact).abs().mean()


def test_auto_says_so_when_it_cannot_use_flex(table, monkeypatch):
    monkeypatch.setattr(flex, "missing", lambda device, dtype: "no compiler")
    layout = PromptLayout((ROW,))
    q, k, v = qkv()
    with pytest.warns(RuntimeWarning, match="no compiler"):
        found = sparse_attention(q, k, v, layout, MIXED)
    with warnings.catch_warnings(action="error"):  # once is enough
        assert torch.equal(found, sparse_attention(q, k, v, layout, MIXED))
    assert torch.equal(found, sparse_attention(q, k, v, layout, MIXED, implementation="segments"))


def test_where_a_mask_wins(monkeypatch):
    """From so many tokens on where that was measured, and wherever it was not."""
    monkeypatch.setattr(choice, "device_name", lambda device: device.type)
    monkeypatch.setattr(choice, "_measured", lambda: {"mask_from": {"cpu": {"float32": 100}}})
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert not choice.mask_wins(cpu, torch.float32, 99)
    assert choice.mask_wins(cpu, torch.float32, 100)
    assert choice.mask_wins(cpu, torch.float16, 1)
    assert choice.mask_wins(other, torch.float32, 1)


def test_the_shipped_table_can_be_followed():
    """Every list starts at 0 keys, ascends, and names implementations that exist."""
    text = files("capsight.blindsight.attention").joinpath("choice.json").read_text()
    for dtypes in json.loads(text)["mask_from"].values():
        assert all(isinstance(tokens, int) and tokens >= 0 for tokens in dtypes.values())
    for dtypes in json.loads(text)["table"].values():
        for kinds in dtypes.values():
            assert set(kinds) == {"dense", "own_image", "sink"}
            for steps in kinds.values():
                assert [first for first, _ in steps] == sorted({first for first, _ in steps})
                assert steps[0][0] == 0
                assert {name for _, name in steps} <= {"segments", "segments_float32", "flex"}
