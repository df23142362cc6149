"""Calibration on tiny models: what is measured, what is decided, and that the model stays as it was."""

import pytest
import torch

from capsight.blindsight import (
    BlindSight,
    Category,
    HeadMap,
    HeldOut,
    MaskOptions,
    prompts,
)
from capsight.blindsight.calibrate.capture import following, shape_of, watching
from capsight.errors import CalibrationError, OptionError
from capsight.layout import build_layout
from tiny import FAMILIES, KINDS

DENSE, SINK = Category.DENSE, Category.SINK


@pytest.fixture(scope="module")
def vlm():
    return FAMILIES["qwen2_5_vl"]()


def sample(vlm, seed=0, images=2):
    return dict(vlm.inputs([([vlm.picture(seed + i) for i in range(images)], f"what is it {seed}")]))


@pytest.fixture(scope="module")
def samples(vlm):
    return [sample(vlm, seed) for seed in range(4)]


def state(model):
    """All that a run could have left behind in a model."""
    text = model.config.get_text_config()
    return (
        {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()},
        [(name, module.training) for name, module in model.named_modules()],
        [getattr(module, "rope_deltas", None) is None for module in model.modules()],
        text._attn_implementation,
        model.config._attn_implementation,
        model.config.vision_config._attn_implementation,
    )


@pytest.mark.parametrize("family", KINDS)
def test_all_dense_is_the_untouched_model(family):
    """The whole path, rules and layouts included, in a left-padded batch of every family."""
    vlm = FAMILIES[family]()
    pictures = [vlm.picture(i) for i in range(3)]
    inputs = vlm.inputs([(pictures[:1], "hi?"), (pictures[1:], "what is it")])
    layout = build_layout(inputs, vlm.config)
    dense = HeadMap.all_dense(*shape_of(vlm.model))
    before = state(vlm.model)
    with torch.no_grad():
        plain = vlm.model(**inputs, use_cache=False).logits
    with watching(vlm.model, following(layout, dense)):
        found = vlm.model(**inputs, use_cache=False).logits
    for row, a, b in zip(layout.rows, plain, found, strict=True):
        assert torch.allclose(a[row.pad_left :], b[row.pad_left :], atol=1e-4)
    assert state(vlm.model)[1] == before[1]
    assert state(vlm.model)[3:] == before[3:]


def test_without_an_alpha_the_tolerance_decides(vlm, samples):
    def run(tolerance):
        return BlindSight.calibrate(
            vlm.model,
            None,
            samples,
            tolerance=tolerance,
            evaluate=lambda m: 12.0 - m.counts()[DENSE],
            fingerprint="ab",
            progress=False,
        )

    loose, tight = run(12.0), run(5.0)
    assert loose.counts()[SINK] == 12
    assert 7 <= tight.counts()[DENSE] < 12
    record = tight.calibration
    assert (record.recovered, tight.model) == (0, "ab")
    assert record.measured_drop == 12 - tight.counts()[DENSE] <= 5
    assert 0 < record.thresholds["alpha_first"] == record.thresholds["alpha_last"]
    assert record.thresholds["alpha_last"] < loose.calibration.thresholds["alpha_last"]


def test_calibrate_is_deterministic_and_restores_the_model(vlm, samples):
    vlm.model(**samples[0], use_cache=False)
    before = state(vlm.model)
    deltas = vlm.model.model.rope_deltas
    maps = [
        BlindSight.calibrate(
            vlm.model, None, iter(samples), alpha=0.3, tolerance=0.2, fingerprint="ab", progress=False
        )
        for _ in range(2)
    ]
    assert maps[0] == maps[1]
    assert state(vlm.model) == before
    assert vlm.model.model.rope_deltas is deltas
    record = maps[0].calibration
    assert maps[0].model == "ab"
    assert record.prompts == 3
    assert record.measured_drop <= 0.2
    assert record.thresholds["alpha_last"] == 0.3
    assert len(record.dataset) == 64


def test_the_criteria_lead_to_maps_and_loose_ones_to_sparse_maps(vlm, samples):
    for criterion in ("mass", "output"):
        none, some, all_ = (
            BlindSight.calibrate(
                vlm.model,
                None,
                samples[:2],
                criterion=criterion,
                alpha=alpha,
                tolerance=None,
                progress=False,
            )
            for alpha in (0.0, (0.1, 0.5), 100.0)
        )
        assert none.counts()[DENSE] == 12
        assert all_.counts()[SINK] == 12
        assert some.counts()[DENSE] <= 12


def test_a_processor_makes_the_inputs(vlm):
    text = vlm.prompt([0, 0], "what")
    raw = {"text": [text], "images": [[vlm.picture(0), vlm.picture(1)]]}
    ready = vlm.processor(return_tensors="pt", **raw)
    first, second = (
        BlindSight.calibrate(vlm.model, processor, [given], criterion="mass", tolerance=None, progress=False)
        for processor, given in ((vlm.processor, raw), (None, ready))
    )
    assert first == second
    with pytest.raises(CalibrationError, match="processor"):
        next(prompts(vlm.model, None, [raw]))


def test_a_layer_has_one_category(vlm, samples):
    """The map of the layer criterion, and recovery by output error whatever heads were judged by."""
    for criterion in ("mass", "output", "distribution"):
        found = BlindSight.calibrate(
            vlm.model,
            None,
            samples[:2],
            criterion=criterion,
            unit="layer",
            alpha=0.05 if criterion != "distribution" else 1e-4,
            evaluate=lambda head_map: 0.0 if head_map.counts()[DENSE] >= 4 else 1.0,
            tolerance=0.5,
            progress=False,
        )
        assert found.counts()[DENSE] >= 4
        assert all(len(set(layer)) == 1 for layer in found.categories)


def test_own_evaluate_own_held_out_and_tied_groups(vlm, samples):
    seen = []

    def evaluate(head_map):
        seen.append(head_map)
        return 0.0 if head_map.counts()[DENSE] >= 6 else 1.0

    tied = BlindSight.calibrate(
        vlm.model,
        None,
        samples[:2],
        alpha=9.0,
        evaluate=evaluate,
        tolerance=0.5,
        unit="kv_group",
        progress=False,
    )
    assert tied.counts()[DENSE] == 6
    assert tied.calibration.prompts == 2
    assert tied.calibration.recovered == 6
    assert tied.calibration.unit == "kv_group"
    assert seen[-1].num_heads == 4
    assert tied.tie_kv_groups(2) == tied.replaced({})
    other = BlindSight.calibrate(
        vlm.model, None, samples[:1], alpha=9.0, held_out=samples[3:], tolerance=1.0, progress=False
    )
    assert other.calibration.recovered == 0


def test_held_out_measures_zero_for_the_dense_map(vlm, samples):
    held = HeldOut(vlm.model, list(prompts(vlm.model, None, samples[:2])))
    dense = HeadMap.all_dense(3, 4)
    sink = HeadMap.uniform(SINK, 3, 4, MaskOptions(False, 0, 1))
    assert held.kl(dense) == 0
    assert held.changed(dense) == 0
    assert held.kl(sink) > 0
    assert 0 <= held.changed(sink) <= 1


def test_calibration_data_that_will_not_do(vlm, samples):
    def run(given, **kwargs):
        return BlindSight.calibrate(vlm.model, None, given, progress=False, **kwargs)

    with pytest.raises(CalibrationError, match="two images"):
        run([sample(vlm, images=1)])
    with pytest.raises(CalibrationError, match="held-out"):
        run(samples[:1])
    bad = dict(samples[0]) | {"pixel_values": samples[0]["pixel_values"] * torch.nan}
    with pytest.raises(CalibrationError, match="NaN"):
        run([bad], tolerance=None)
    with pytest.raises(OptionError, match="criterion"):
        run(samples, criterion="colour")
    with pytest.raises(OptionError, match="unit"):
        run(samples, unit="model")
    with pytest.raises(OptionError, match="tolerance"):
        run(samples, tolerance=-1)
    assert vlm.config.get_text_config()._attn_implementation == "sdpa"
