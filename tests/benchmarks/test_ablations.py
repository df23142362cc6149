"""The ablation script on a tiny model, and its page."""

from __future__ import annotations

import json

import ablations
import ablations_page
import pytest
import torch
from ablation_calibration import Blocks, calibrate
from ablation_heads import TABLES as HEADS_TABLES
from ablation_metrics import MEASURES, output_moments
from ablation_places import BeforeRope, Tiles
from ablation_variants import BEFORE, RUNS, TABLES, TILES, VALUE_TILES, variants, variants_of_heads

import capsight
from benchmarks.made_up import MACHINE, tables_are_square
from capsight.evaluation import MethodResult, Outcome, summary
from capsight.kvcapsule.codecs import AdaptiveCodec
from tiny import FAMILIES

SIZE, KEPT = 16, 6


@pytest.fixture(scope="module")
def qwen():
    return FAMILIES["qwen2_5_vl"]()


def prompt(qwen, seed):
    return qwen.inputs([([qwen.picture(seed), qwen.picture(seed + 50, (96, 64))], "hi")])


@pytest.fixture(scope="module")
def seen(qwen):
    arrangements = {
        RUNS: None,
        BEFORE: BeforeRope(qwen.model.get_decoder().rotary_emb),
        TILES: Tiles(4, 4, keys=True),
        VALUE_TILES: Tiles(4, 4, keys=False),
    }
    prompts = (Blocks.prefilled(qwen.model, prompt(qwen, n), SIZE) for n in range(4))
    seen = calibrate(prompts, arrangements, output_moments(qwen.model))
    assert (seen.prompts, seen.blocks) == (4, 4 * (4 + 6))
    return seen


@pytest.fixture(scope="module")
def fitted(seen):
    with pytest.MonkeyPatch.context() as patch:  # how long MLPs train is no matter here
        patch.setattr("capsight.kvcapsule.calibration.key_mlp.MOST_STEPS", 40)
        return {variant.name: variant for variant in variants(seen, KEPT)}


def test_every_row_of_every_table_is_fitted_and_nothing_else(fitted):
    named = {name for rows in TABLES.values() for name in rows.values()}
    assert named == set(fitted)


def test_every_variant_answers_and_has_the_same_bytes(qwen, fitted):
    inputs, sizes = prompt(qwen, 9), {}
    for name, variant in fitted.items():
        with capsight.enable(qwen.model, capsule=variant) as fast:
            fast.generate(**inputs, max_new_tokens=3, do_sample=False)
            sizes[name] = fast.cache.nbytes
    plain = sizes["static"]
    assert {name: size - plain for name, size in sizes.items() if size != plain} == {
        # positions of the kept tokens in 3 layers of 10 blocks, and 16 bytes where a block's place is stored
        **dict.fromkeys(("adaptive", "evict", "adaptive apart", *MEASURES), 3 * 10 * KEPT),
        "adaptive, two sets": 2 * 3 * 10 * KEPT,
        **dict.fromkeys(("adaptive before RoPE", "adaptive tiles"), 3 * 10 * (KEPT + 16)),
        **dict.fromkeys(("static before RoPE", "static tiles", "static value tiles"), 3 * 10 * 16),
    }


def test_heads_are_varied_at_equal_bytes(qwen, seen):
    found, inputs = {variant.name: variant for variant in variants_of_heads(seen, KEPT)}, prompt(qwen, 9)
    assert {name for rows in HEADS_TABLES.values() for name in rows.values()} == set(found)
    kept = {}
    for name, variant in found.items():
        with capsight.enable(qwen.model, capsule=variant) as fast:
            fast.generate(**inputs, max_new_tokens=3, do_sample=False)
        payload = fast.cache.capsule_layers[0].payload
        if name not in ("evict", "heads rebuilt"):
            assert payload.nbytes == found["heads"].codecs[0].payload_nbytes(2, 16, 4) * 10
            kept[name] = payload.mask(SIZE)
    assert all(mask.sum() == KEPT * 2 * 10 for mask in kept.values())
    assert (kept["heads, by head"].sum((0, 2)) == KEPT * 10).all()
    assert (kept["heads, by block"].sum((1, 2)) == KEPT * 2).all()
    assert (kept["heads, unshared"].sum(2) == KEPT).all()
    distinct = {tuple(mask.flatten().tolist()) for mask in kept.values()}
    assert len(distinct) == len(kept)


def test_rebuilt_heads_keep_what_heads_keeps_and_predict_the_rest(qwen, seen):
    found = {variant.name: variant.codecs[1] for variant in variants_of_heads(seen, KEPT)}
    blocks = Blocks.prefilled(qwen.model, prompt(qwen, 9), SIZE)
    keys, values = blocks.keys[1], blocks.values[1]
    heads, rebuilt = found["heads"], found["heads rebuilt"]
    keep = heads.encode_runs(keys, values, blocks.plan.runs).mask(SIZE)
    made = rebuilt.decode(rebuilt.encode_runs(keys, values, blocks.plan.runs))
    covariance = heads.covariance()[0]
    for x, own, mean in zip((keys, values), made, heads.mean, strict=True):
        assert torch.equal(own[keep], x[keep])
        kept = keep[3, 1].nonzero()[:, 0]
        weights = torch.linalg.solve(covariance[kept][:, kept], covariance[kept]).T
        expected = weights @ (x[3, 1, kept] - mean[1]) + mean[1]
        torch.testing.assert_close(own[3, 1][~keep[3, 1]], expected[~keep[3, 1]], atol=1e-4, rtol=1e-4)


def test_one_after_another_is_what_greedy_selection_finds_worst(seen):
    from ablation_heads import one_after_another

    heads = next(iter(variants_of_heads(seen, KEPT))).codecs[0]
    g = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(2, 2, SIZE, 16, generator=g) for _ in range(2))
    scores = one_after_another(heads, keys, values)
    x = torch.cat(list(heads.whitened(keys, values)), -1)[1, 0]  # [N, 2 D]
    covariance, chosen, worth = heads.covariance()[0], [], float("inf")
    for _ in range(SIZE):
        rest = x
        if chosen:
            rest = x - torch.linalg.solve(covariance[chosen][:, chosen], covariance[chosen]).T @ x[chosen]
        energy = rest.square().sum(1)
        energy[chosen] = -1
        chosen.append(int(energy.argmax()))
        worth = min(worth, float(energy.max()))
        assert float(scores[1, 0, chosen[-1]]) == pytest.approx(worth, rel=1e-2)


def test_errors_by_hand_and_pca_of_its_own_data_is_best(qwen, fitted):
    blocks = [Blocks.prefilled(qwen.model, prompt(qwen, 9), SIZE)]
    found = {name: ablations.errors(v, blocks) for name, v in fitted.items() if not v.needs_attention}
    static = fitted["static"]
    expected = 0.0
    for layer, codec in static.codecs.items():
        keys, values = blocks[0].keys[layer], blocks[0].values[layer]
        rebuilt = codec.decode(codec.encode(keys, values))[1]
        expected += float((rebuilt - values).norm() / values.norm()) / len(static.codecs)
    assert found["static"]["value_error"] == pytest.approx(expected, rel=1e-4)
    assert all(0 < error < 1.5 for row in found.values() for error in row.values())
    assert found["static"]["value_error"] == found["static-mlp"]["value_error"]


def test_everything_kept_has_no_error(qwen, fitted):
    whole = {i: c.resized(SIZE) for i, c in fitted["adaptive"].codecs.items()}
    assert all(isinstance(codec, AdaptiveCodec) for codec in whole.values())
    exact = type(fitted["adaptive"])("all", whole, fitted["adaptive before RoPE"].arrangement)
    found = ablations.errors(exact, [Blocks.prefilled(qwen.model, prompt(qwen, 9), SIZE)])
    assert max(found.values()) < 1e-5


def test_blocks_say_where_queries_look(qwen):
    blocks = Blocks.prefilled(qwen.model, prompt(qwen, 3), SIZE)
    assert blocks.attention[0].shape == (SIZE,)
    assert 0 < float(blocks.attention[0].sum()) * len(blocks.plan.runs) < 1
    assert torch.equal(blocks.queries[0], blocks.queries[0].mT)


def test_page():
    def result(right):
        return MethodResult(
            [Outcome(f"i{i // 2}", "find", 4, i < right, True, 0.25) for i in range(20)], 400, 1000, 77_000
        )

    names = {f"{name} 0.4" for rows in TABLES.values() for name in rows.values()}
    results = {"full": result(20)} | {name: result(10) for name in sorted(names)} | {"static 0.4": result(15)}
    methods = {name: row | {"key_error": 0.125} for name, row in summary(results).items()}
    report = {
        "model": "reference", "protocol": "after", "images": [4, 8], "samples": 5, "retained": [0.4],
        "calibration": {"prompts": 8, "blocks": 32}, "methods": methods, "machine": MACHINE,
        "tables": ablations.compared(results, TABLES, [0.4]),
    }  # fmt: skip
    text = ablations_page.page(json.loads(json.dumps(report)))
    assert tables_are_square(text)
    assert set(ablations_page.NOTES) == {*TABLES, *HEADS_TABLES}
    row = next(line for line in text.splitlines() if "fixed positions, rebuilt" in line)
    assert "| 0.4 | 75.0 |" in row
    assert "| +25.0 |" in row
    assert "| 0.125 |" in row
    assert "77.0 KB" in row
    assert "20 test questions over 4 and 8 images" in text
