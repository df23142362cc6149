"""What the demo's tables and picture say of sides that are made up, and what is timed of real ones."""

from __future__ import annotations

import logging

import pytest
import torch
from PIL import Image

from capsight.baselines import METHODS
from capsight.blindsight import PrefillFlops
from capsight.cli import demo_picture, demo_sides
from capsight.cli.demo_picture import draw_demo
from capsight.cli.demo_sides import Pace, Side
from capsight.cli.demo_tables import side_costs
from capsight.evaluation import Answers, Ask, Item, reference_items
from capsight.evaluation.bench import batch_inputs
from capsight.evaluation.cache_bytes import CacheBytes
from capsight.evaluation.stock import Compiled, why_not_compiled
from capsight.evaluation.timing import Round, Timing
from capsight.kvcapsule import KVCapsule
from capsight.reference import load_reference_vlm
from capsight.runtime import enable


def test_text_fits_into_the_cells_of_the_picture(monkeypatch):
    tables, made = [], demo_picture._table
    monkeypatch.setattr(demo_picture, "_table", lambda *of: tables.append(made(*of)) or tables[-1])
    longest = Ask("Which has the larger total, image 10 or image 11?", "image 10", "total")
    answers = Answers(("image 10",), torch.empty(0), CacheBytes(987_600, 987_600, 0))
    names = "full cache", "heads, 41% retained", "joint, 5% retained, 8 bits", "joint + head map"
    flops, pace = PrefillFlops(10**10, 10**11, 10**11), Pace(Timing(9.999, 9999.0), Timing(1.0, 1.0))
    sides = [Side(name, answers, 10**6, flops, pace, pace) for name in names]
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
        return Side(
            "", answers, modules, PrefillFlops(1000 - saved, 1000, 1000), Pace(*[Timing(1.0, 1.0)] * 2)
        )

    rows = side_costs([side(100, 0, 0), side(40, modules, 1)])
    assert rows["KV cache"][1] == "40 B (2.50x smaller)"
    assert rows["with modules"][1] == words
    assert all("(0%)" in rows[name][1] for name in ("prefill", "of it attention"))


@pytest.fixture
def sides(monkeypatch):
    """Sides of the reference VLM with made-up times: (seconds to the first token, tokens/s of turns)."""

    def asked(speeds, decode="latent", compiled=True, reason=""):
        def time_together(every, inputs, rounds):
            assert len(every) == len(speeds)
            return [[Round(*speed)] for speed in speeds]

        monkeypatch.setattr(demo_sides, "time_together", time_together)

        def why_not_compiled(model, inputs):
            rebuilds = model.fast.capsule is not None and model.fast.decode == "materialise"
            return "keys are rebuilt" if rebuilds else reason

        monkeypatch.setattr(demo_sides, "why_not_compiled", why_not_compiled)
        model, processor = load_reference_vlm()
        capsule = KVCapsule.from_pretrained("reference-heads")
        both = [demo_sides.Asked("full"), demo_sides.Asked("heads", capsule, decode=decode)]
        item = next(iter(reference_items("test", 1, 1)))
        return demo_sides.ask_sides(model, processor, item, both, compiled, lambda text: None)

    return asked


def test_decode_speed_is_beside_that_of_the_full_cache_where_it_is_fastest(sides):
    full, ours = sides([(1.0, (10.0,)), (2.0, (16.0,)), (3.0, (20.0,)), (4.0, (30.0,))])
    assert [full.eager.ratios, full.compiled.ratios] == [Timing(1.0, 0.5), Timing(3.0, 1.0)]
    assert [ours.eager.ratios, ours.compiled.ratios] == [Timing(2.0, 0.8), Timing(4.0, 1.5)]
    assert [full.fastest, ours.fastest] == [full.compiled, ours.compiled]
    rows = side_costs([full, ours])
    assert rows["decode"] == ["10 tok/s (0.50x)", "16 tok/s (0.80x)"]
    assert rows["decode, compiled"] == ["20 tok/s (1.00x)", "30 tok/s (1.50x)"]


def test_eager_steps_may_be_the_fastest(sides):
    full, ours = sides([(1.0, (20.0,)), (1.0, (30.0,)), (1.0, (10.0,)), (1.0, (5.0,))])
    assert [full.fastest, ours.fastest] == [full.eager, ours.eager]
    assert ours.compiled.ratios.tokens_per_s == 0.25


def test_steps_that_rebuild_keys_are_not_compiled(sides):
    full, ours = sides([(1.0, (10.0,)), (1.0, (16.0,)), (1.0, (20.0,))], decode="materialise")
    assert ours.compiled is None
    assert ours.fastest.ratios.tokens_per_s == 0.8
    assert side_costs([full, ours])["decode, compiled"] == ["20 tok/s (1.00x)", ""]


@pytest.mark.parametrize(("compiled", "reason"), [(False, ""), (True, "no compiler")])
def test_without_compiled_steps(sides, caplog, compiled, reason):
    with caplog.at_level(logging.WARNING, "capsight"):
        full, ours = sides([(1.0, (10.0,)), (1.0, (16.0,))], compiled=compiled, reason=reason)
    assert [full.compiled, ours.compiled] == [None, None]
    assert ours.fastest.ratios.tokens_per_s == 1.6
    assert "decode, compiled" not in side_costs([full, ours])
    assert bool(reason) == bool(caplog.records)


def test_steps_that_are_not_compiled_are_told():
    model, processor = load_reference_vlm()
    inputs = batch_inputs(processor, list(reference_items("test", 1, 1)))
    with enable(model, capsule=KVCapsule.from_pretrained("reference-heads"), decode="materialise") as fast:
        assert "rebuilds keys" in why_not_compiled(Compiled(fast, 200), inputs)
    with enable(model, capsule=METHODS["snapkv"](0.4)) as fast:
        assert "no cache of a KVCapsule" in why_not_compiled(Compiled(fast, 200), inputs)


def test_a_compiler_that_does_not_work_is_told():
    model, processor = load_reference_vlm()
    inputs = batch_inputs(processor, list(reference_items("test", 1, 1)))
    torch._dynamo.reset()
    broken = {"force_disable_caches": True, "cpp.cxx": (None, "/no/such/compiler")}
    with torch._inductor.config.patch(broken), enable(model) as fast:
        reason = why_not_compiled(Compiled(fast, inputs["input_ids"].shape[1] + 4), inputs)
    torch._dynamo.reset()
    assert "compiler" in reason
    assert "\n" not in reason
