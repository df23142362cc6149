"""The codecs, selection rules and arrangements that the ablations compare."""

from __future__ import annotations

import pytest
import torch
from ablation_codecs import ApartCodec, FixedEvict, PairCodec, Retain, TokenPca
from ablation_metrics import MEASURES, by_attention, output_moments, scaled, values_by_output, white
from ablation_places import ArrangedCodec, BeforeRope, Place, Tiles, mrope_positions, places
from ablation_selection import RULES, attention_top, farthest_point, strided

from capsight.kvcapsule.calibration.fit import prefilled_blocks
from capsight.kvcapsule.codecs import EvictCodec, StaticCodec
from capsight.kvcapsule.codecs.learnt import KEY_WEIGHT
from capsight.kvcapsule.codecs.token_mlp import TokenMlp
from capsight.kvcapsule.plan import CapsulePlan, Run
from capsight.layout import build_layout
from kvcapsule.conftest import blocks, codec, moments
from tiny import FAMILIES

FLAT = torch.ones(8)


def pair(heads: int = 2):
    return blocks(5, heads, 8, 4, 7), blocks(5, heads, 8, 4, 8)


def test_rules_keep_what_they_say():
    corners = torch.tensor([[0.0, 0], [0, 1], [0.1, 0], [5, 5], [5, 5.1], [0, 4]], dtype=torch.float64)
    covariance = corners @ corners.T + 1e-6 * torch.eye(6)
    attention = torch.tensor([0.1, 0.2, 0.9, 0.0, 0.3, 0.8])
    assert strided(covariance, attention, 3).tolist() == [1, 3, 5]
    assert farthest_point(covariance, attention, 3).tolist() == [0, 4, 5]
    assert attention_top(covariance, attention, 2).tolist() == [2, 5]
    for rule in RULES.values():
        assert rule(covariance, attention, 6).tolist() == list(range(6))


def test_retained_keys_and_values_by_pca_are_the_static_codec():
    sums, (keys, values) = moments(2, 8, 4), pair()
    ours = PairCodec(8, Retain.fit(sums.keys, 3, FLAT), TokenPca.fit(sums.values, 3))
    static = StaticCodec.fit(sums, 3)
    assert ours.encode_runs(keys, values, []).nbytes == static.encode(keys, values).nbytes
    found, expected = (
        ours.decode(ours.encode_runs(keys, values, [])),
        static.decode(static.encode(keys, values)),
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_one_head_is_shared_and_several_fit_better_on_their_own_data():
    for fit in (lambda s, p: Retain.fit(s, 3, FLAT, per_head=p), lambda s, p: TokenPca.fit(s, 3, p)):
        one = moments(1, 8, 4).values
        x = blocks(5, 1, 8, 4, 7).transpose(1, 2)
        torch.testing.assert_close(*(c.decode(c.encode(x)) for c in (fit(one, True), fit(one, False))))
        many, x = moments(2, 8, 4).keys, blocks(24, 2, 8, 4, 0).transpose(1, 2)
        errors = [float((c.decode(c.encode(x)) - x).norm()) for c in (fit(many, True), fit(many, False))]
        assert errors[0] < errors[1]


def test_an_mlp_corrects_what_is_not_kept():
    plain, x = Retain.fit(moments(2, 8, 4).keys, 3, FLAT), pair()[0].transpose(1, 2)
    mlp = TokenMlp(torch.randn(6, 3), torch.randn(6), torch.randn(5, 6))
    kept, rest = plain.index.tolist(), [i for i in range(8) if i not in plain.index.tolist()]
    expected = plain.decode(plain.encode(x))
    expected[:, rest] += mlp(x[:, kept].flatten(2)).unflatten(2, (2, 4))
    own = plain.with_mlp(mlp)
    torch.testing.assert_close(own.decode(own.encode(x)), expected)


def test_two_sets_are_the_codecs_they_are_made_of():
    keys, values = pair()
    one, two = codec("adaptive", 3), codec("adaptive", 3)
    two.whitening[0] *= 1e-6
    both = ApartCodec(one, two)
    payload = both.encode_runs(keys, values, [])
    assert not torch.equal(payload.tensors["kept"], payload.tensors["values_kept"])
    found = both.decode(payload)
    assert torch.equal(found[0], one.decode(one.encode(keys, values))[0])
    assert torch.equal(found[1], two.decode(two.encode(keys, values))[1])


def test_fixed_eviction_hides_what_it_does_not_keep():
    keys, values = pair()
    fixed = FixedEvict(8, torch.tensor([1, 4]))
    payload = fixed.encode_runs(keys, values, [])
    assert fixed.bias(payload)[2, 0].isinf().tolist() == [True, False, True, True, False, True, True, True]
    found = fixed.decode(payload)[0]
    assert torch.equal(found[:, :, [1, 4]], keys[:, :, [1, 4]])
    assert not found[:, :, [0, 2, 3, 5, 6, 7]].any()
    assert payload.nbytes == codec("evict", 2).encode(keys, values).nbytes - 2 * 5
    assert isinstance(codec("evict", 2), EvictCodec)


def test_tiles_and_back():
    at = {Run(0, start): Place(3, 4, 8, number) for number, start in enumerate((5, 21))}
    at[Run(1, 9)] = Place(0, 5, 5, 0)  # no tiles of 4 x 4 cover it
    place = torch.tensor(list(at.values()))
    token = torch.arange(48).view(3, 1, 16, 1).expand(-1, 2, -1, 4).float()
    for keys_too in (True, False):
        tiles = Tiles(4, 4, keys=keys_too)
        keys, values = tiles.there(token, token + 100, place)
        assert values[0, 0, :, 0].tolist() == [100 + 8 * row + col for row in range(4) for col in range(4)]
        assert torch.equal(values[2], token[2] + 100)
        assert torch.equal(keys, values - 100 if keys_too else token)
        back = tiles.back(keys, values, place)
        assert torch.equal(back[0], token)
        assert torch.equal(back[1], token + 100)


@pytest.fixture
def qwen():
    return FAMILIES["qwen2_5_vl"]()


def prompts(qwen):
    """Two rows: text before, between and after images of two sizes, and padding."""
    image = qwen.placeholder
    rows = [
        ([qwen.picture(0), qwen.picture(1, (96, 64))], f"ab{image}c{image}def"),
        ([qwen.picture(2)], image),
    ]
    return qwen.process([text for _, text in rows], [images for images, _ in rows])


def test_positions_are_those_of_the_model(qwen):
    inputs = prompts(qwen)
    layout = build_layout(inputs, qwen.config)
    at = places(layout, 16)
    assert list(at) == list(CapsulePlan.from_layout(layout, 16).runs)
    found = mrope_positions(torch.tensor(list(at.values())), 16)
    expected, _ = qwen.model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    for block, run in enumerate(at):
        assert torch.equal(found[:, block], expected[:, run.row, run.start : run.start + 16])


def test_keys_before_rope_are_what_the_model_projects(qwen):
    inputs, seen = prompts(qwen), []
    layout = build_layout(inputs, qwen.config)
    projection = qwen.model.get_decoder().layers[1].self_attn.k_proj
    hook = projection.register_forward_hook(lambda module, args, output: seen.append(output))
    keys, values = prefilled_blocks(qwen.model, inputs, 16)[1]
    hook.remove()
    runs = CapsulePlan.from_layout(layout, 16).runs
    projected = torch.stack([seen[0][row, start : start + 16] for row, start, *_ in runs])  # [M, N, H * D]
    before = BeforeRope(qwen.model.get_decoder().rotary_emb)
    place = torch.tensor([places(layout, 16)[run] for run in runs])
    found, same = before.there(keys, values, place)
    torch.testing.assert_close(found.transpose(1, 2).flatten(2), projected, atol=1e-4, rtol=1e-4)
    assert same is values
    torch.testing.assert_close(before.back(found, values, place)[0], keys, atol=1e-4, rtol=1e-4)


def test_an_arranged_codec_gives_blocks_back_in_their_places_also_of_repeated_rows():
    runs = [Run(0, 0), Run(0, 16), Run(1, 4)]
    at = {runs[0]: Place(0, 4, 8, 0), runs[1]: Place(0, 4, 8, 1), runs[2]: Place(4, 4, 4, 0)}
    keys, values = blocks(3, 2, 16, 4, 1), blocks(3, 2, 16, 4, 2)
    whole = Retain(torch.arange(16), torch.eye(16)[None])
    arranged = ArrangedCodec(PairCodec(16, whole, whole), Tiles(4, 4, keys=True), at)
    payload = arranged.encode_runs(keys, values, runs)
    twice = torch.tensor([0, 1, 0, 1, 2])
    for found, x in zip(arranged.decode(payload.select(twice)), (keys, values), strict=True):
        assert torch.equal(found, x[twice])
    assert payload.nbytes == 3 * (2 * 16 * 2 * 4 * 4 + 16)


def squares(measure, queries, outputs):
    """W^T W of keys and values: [2, H, D, D]."""
    packed = measure(moments(2, 8, 4), queries, outputs).double()
    low = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    rows, cols = torch.tril_indices(4, 4)
    low[:, :, rows, cols] = packed
    return low.mT @ low


def test_measures_are_what_their_names_say():
    x = torch.randn(2, 2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    queries, outputs = x.mT @ x
    sums = moments(2, 8, 4)
    covariance = torch.stack([kind.channel_covariance() for kind in (sums.keys, sums.values)])
    variance = covariance.diagonal(dim1=2, dim2=3).mean(2)[..., None, None]
    spread = (outputs * covariance[1]).sum((1, 2))[:, None, None] / 4
    own = torch.linalg.inv(covariance)
    eye = torch.eye(4, dtype=torch.float64).expand(2, 2, 4, 4)
    expected = {
        white(1.0): own,
        white(0.0): own * torch.tensor([1e-12, 1.0])[:, None, None, None],
        scaled: eye / variance,
        values_by_output: torch.stack([eye[0] / variance[0], outputs / spread]),
        by_attention: torch.stack([queries * spread, outputs]),
    }
    for measure, square in expected.items():
        found = squares(measure, queries, outputs)
        error = (found - square).flatten(2).norm(dim=2) / square.flatten(2).norm(dim=2)
        assert (error < 0.05).all(), (measure, error)
    ours = codec("adaptive", 3).whitening.double()
    torch.testing.assert_close(ours, white(KEY_WEIGHT)(sums, queries, outputs), atol=0.02, rtol=0.01)
    assert all(measure in expected or measure.__name__ == "measure" for measure in MEASURES.values())


def test_outputs_are_what_the_projection_makes_of_a_value():
    tiny = FAMILIES["qwen2_5_vl"]()
    found = output_moments(tiny.model)
    weight = tiny.model.get_decoder().layers[1].self_attn.o_proj.weight
    heads, size = found[1].shape[:2]
    group = weight.shape[1] // size // heads
    value = torch.randn(size)
    for head in range(heads):
        each = [weight[:, (head * group + g) * size :][:, :size] @ value for g in range(group)]
        expected = sum(one.square().sum() for one in each)
        torch.testing.assert_close(value @ found[1][head] @ value, expected)
