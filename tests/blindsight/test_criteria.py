"""What a head loses by a category, against transformers' own attention weights and layers."""

import pytest
import torch

from capsight.blindsight import Category, MaskOptions, reference_mask
from capsight.blindsight.calibrate import criteria
from capsight.blindsight.calibrate.capture import watching
from capsight.blindsight.calibrate.criteria import distribution, later_rows, mass, output
from capsight.blindsight.calibrate.samples import Prompt
from capsight.blindsight.categories import SPARSE
from capsight.blindsight.flops import layer_rules
from capsight.layout import build_layout
from tiny import FAMILIES

DENSE = Category.DENSE
OPTIONS = MaskOptions(own_window=4)


@pytest.fixture(scope="module")
def vlm():
    return FAMILIES["qwen2_5_vl"]()


def sample(vlm, seed=0, images=2):
    return dict(vlm.inputs([([vlm.picture(seed + i) for i in range(images)], f"what is it {seed}")]))


@pytest.fixture(scope="module")
def samples(vlm):
    return [sample(vlm, seed) for seed in range(4)]


def ready(vlm, inputs):
    return Prompt(dict(inputs), build_layout(inputs, vlm.config))


def eager_weights(vlm, inputs):
    """Attention weights as transformers itself computes them: per layer `[B, Hq, S, S]`."""
    before = vlm.config.get_text_config()._attn_implementation
    vlm.model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad():
            return vlm.model(**inputs, use_cache=False, output_attentions=True).attentions
    finally:
        vlm.model.set_attn_implementation({"text_config": before})


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_mass_is_what_the_masks_cut_off(family):
    vlm = FAMILIES[family]()
    inputs = sample(vlm, images=3)
    layout = build_layout(inputs, vlm.config)
    found = mass(vlm.model, ready(vlm, inputs), OPTIONS)
    rows, rules = later_rows(layout.rows[0]), layer_rules(vlm.config, len(found))
    for layer, weights in enumerate(eager_weights(vlm, inputs)):
        for index, category in enumerate(SPARSE):
            hidden = ~reference_mask(layout, OPTIONS, category, rules[layer])[0]
            expected = (weights[0] * hidden)[:, rows].sum(-1).mean(-1)
            assert torch.allclose(found[layer, index], expected, atol=1e-5)


def test_output_is_the_change_through_w_o(vlm, samples):
    layout = build_layout(samples[0], vlm.config)
    found = output(vlm.model, ready(vlm, samples[0]), OPTIONS)
    rows = later_rows(layout.rows[0])
    layer, head = 1, 2
    seen = {}

    def observe(call):
        out = call.attend_uniform(layout, DENSE, OPTIONS)
        if call.layer == layer:
            for category in SPARSE:
                one = tuple(category if h == head else DENSE for h in range(4))
                seen[category] = (call.module.o_proj, out, call.attend(layout, one, OPTIONS))
        return out

    with watching(vlm.model, observe):
        vlm.model(**samples[0], use_cache=False)
        for index, category in enumerate(SPARSE):
            project, *outs = seen[category]
            a, b = (project(out.transpose(1, 2).flatten(2))[0, rows] for out in outs)
            assert torch.allclose(found[layer, index, head], (a - b).norm() / a.norm(), atol=1e-4)


@pytest.mark.parametrize("together", [2, 4])
def test_output_of_heads_switched_together(vlm, samples, together):
    """A key-value group or a layer at once: errors of heads add up before the norm is taken."""
    prompt = ready(vlm, samples[0])
    layout, rows = prompt.layout, later_rows(prompt.layout.rows[0])
    found = output(vlm.model, prompt, OPTIONS, together)
    checked = []

    def observe(call):
        dense = call.attend_uniform(layout, DENSE, OPTIONS)
        for index, category in enumerate(SPARSE):
            for first in range(0, 4, together):
                some = tuple(category if first <= h < first + together else DENSE for h in range(4))
                outs = dense, call.attend(layout, some, OPTIONS)
                a, b = (call.module.o_proj(out.transpose(1, 2).flatten(2))[0, rows] for out in outs)
                expected = ((a - b).norm() / a.norm()).expand(together)
                checked.append((found[call.layer, index, first : first + together], expected))
        return dense

    with watching(vlm.model, observe):
        vlm.model(**samples[0], use_cache=False)
    assert len(checked) == 3 * 3 * 4 // together
    for ours, expected in checked:
        assert torch.allclose(ours, expected, atol=1e-4)


def test_mass_of_heads_switched_together_is_the_largest(vlm, samples):
    prompt = ready(vlm, samples[0])
    alone, pairs = (mass(vlm.model, prompt, OPTIONS, together) for together in (1, 2))
    largest = alone.view(3, 3, 2, 2).amax(-1, keepdim=True).expand(3, 3, 2, 2).reshape(3, 3, 4)
    assert torch.allclose(pairs, largest)


def test_distribution_is_zero_only_where_nothing_is_lost(vlm, samples):
    prompt = ready(vlm, samples[0])
    found = distribution(vlm.model, prompt, MaskOptions(own_window=4))
    assert found.shape == (3, 3, 4)
    assert (found > -1e-6).all()
    assert found[0].max() > 1e-7
    assert found[-1].abs().max() < 1e-5  # the last layer's image rows reach no later token
    layers = distribution(vlm.model, prompt, MaskOptions(own_window=4), 4)
    assert torch.equal(layers, layers[..., :1].expand_as(layers))
    assert layers[0].max() > found[0].max() / 4


def one_by_one(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no gradients\nat all")

    monkeypatch.setattr(criteria, "first_order", fails)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "cohere2_vision"])
@pytest.mark.parametrize("together", [1, 2])
def test_first_order_is_near_what_each_switch_does(family, together, monkeypatch):
    """In a batch of two prompts, one left-padded; small masks, so that little moves."""
    vlm = FAMILIES[family]()
    pictures = [vlm.picture(i) for i in range(4)]
    prompt = ready(vlm, vlm.inputs([(pictures[:2], "hi?"), (pictures[2:], "what is it")]))
    wanted = {name for name, weight in vlm.model.named_parameters() if weight.requires_grad}
    found = distribution(vlm.model, prompt, OPTIONS, together)
    assert {name for name, weight in vlm.model.named_parameters() if weight.requires_grad} == wanted
    one_by_one(monkeypatch)
    with pytest.warns(RuntimeWarning, match="one by one.*: no gradients$"):
        exact = distribution(vlm.model, prompt, OPTIONS, together)
    assert torch.corrcoef(torch.stack((found.flatten(), exact.flatten())))[0, 1] > 0.95
    assert 0.3 < (found.sum() / exact.sum()) < 1.5  # random models: three tokens are not all


def test_switches_that_move_logits_far_are_measured(vlm, samples, monkeypatch):
    prompt = ready(vlm, samples[0])
    monkeypatch.setattr(criteria, "SMALL", -1.0)
    found = distribution(vlm.model, prompt, OPTIONS)
    one_by_one(monkeypatch)
    with pytest.warns(RuntimeWarning):
        assert torch.equal(found, distribution(vlm.model, prompt, OPTIONS))
