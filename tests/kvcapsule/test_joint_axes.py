"""Axes of the joint codec: in 8 bits, those that get bits in memory, all of them in the file."""

from __future__ import annotations

import copy
import shutil
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capsight.errors import CapsightError, CapsuleFileError
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.attention.native import missing
from capsight.kvcapsule.capsule_file import KIND
from capsight.kvcapsule.codecs import joint, levels
from capsight.kvcapsule.codecs.gathered import Gathered
from capsight.kvcapsule.codecs.joint import JointCodec
from capsight.kvcapsule.codecs.joint_axes import in_steps, numbers
from capsight.kvcapsule.codecs.levels import GROUP, Levels, pack, unpack
from capsight.kvcapsule.rest.parts import learnt_fingerprint
from capsight.kvcapsule.store import read_folder, write_folder
from kvcapsule.conftest import fitted


@given(st.integers(0, 99), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]))
def test_steps_are_as_plain_rounding_gives_them(seed, count, dtype):
    axes = torch.randn(count, 2, 3, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    axes[0, 1] = 0
    whole, steps = in_steps(axes)
    assert whole.dtype == torch.int8
    for k in range(count):
        for kind in range(2):
            own = axes[k, kind].float()
            assert float(steps[kind, k]) == pytest.approx(float(own.abs().max()) / 127)
            expected = (own / steps[kind, k]).round() if steps[kind, k] > 0 else own
            assert torch.equal(whole[k, kind].float(), expected)
    error = (numbers(whole, steps, torch.float32) - axes.float()).abs().amax((2, 3))
    assert (error <= steps.T * 0.501).all()


def test_memory_holds_the_axes_that_get_bits_and_the_file_all(qwen, tmp_path):
    made = fitted(qwen, 0.9, codec="joint")
    few = made.with_retained(0.2)
    few.save_pretrained(tmp_path / "few")
    loaded = KVCapsule.from_pretrained(tmp_path / "few")
    codec = loaded.codecs[0]
    assert len(codec.axes) == codec.levels.rank < made.codecs[0].levels.rank
    assert loaded.module_nbytes == few.module_nbytes < made.module_nbytes
    with pytest.raises(CapsightError, match="load the capsule again"):
        codec.at(0.9)
    more = loaded.with_retained(0.9)
    for index, own in more.codecs.items():
        for name, tensor in made.codecs[index].state_dict().items():
            assert torch.equal(own.state_dict()[name], tensor)
    copy.deepcopy(more).with_retained(0.2).save_pretrained(tmp_path / "again")
    first, second = (next((tmp_path / name).glob("*.safetensors")) for name in ("few", "again"))
    assert first.read_bytes() == second.read_bytes()
    assert len({learnt_fingerprint(each) for each in (made, few, loaded, more)}) == 1


def test_a_file_that_is_gone_or_another_one_is_named(qwen, tmp_path):
    fitted(qwen, 0.5, codec="joint").save_pretrained(tmp_path / "x")
    loaded = KVCapsule.from_pretrained(tmp_path / "x")
    fitted(qwen, 0.5, codec="joint", rank=64).save_pretrained(tmp_path / "x")
    with pytest.raises(CapsuleFileError, match="another capsule"):
        loaded.with_retained(0.9)
    shutil.rmtree(tmp_path / "x")
    with pytest.raises(CapsuleFileError, match="missing"):
        loaded.with_retained(0.9)
    with pytest.raises(CapsuleFileError, match="missing"):
        loaded.save_pretrained(tmp_path / "y")


def test_files_with_axes_in_16_bits_are_read(qwen, tmp_path):
    capsule = fitted(qwen, 0.5, codec="joint")
    capsule.save_pretrained(tmp_path)
    header, tensors = read_folder(tmp_path, KIND)
    constants = {name: x for name, x in header["constants"].items() if name != "axis_bits"}
    old = {name: x for name, x in tensors.items() if not name.endswith(("steps", "rounded"))}
    for index, codec in capsule.codecs.items():
        own = codec.whole()
        old[f"layers.{index}.axes"] = numbers(own["axes"], own["steps"], torch.bfloat16)
    header = {name: x for name, x in header.items() if name not in ("sha256", "tensors", "header_sha256")}
    write_folder(tmp_path, KIND, header | {"constants": constants}, old)
    for index, codec in KVCapsule.from_pretrained(tmp_path).whole_codecs().items():
        own = in_steps(old[f"layers.{index}.axes"])
        assert torch.equal(codec.whole()["axes"], own[0])
        assert torch.equal(codec.whole()["steps"], own[1])
    write_folder(tmp_path, KIND, header | {"constants": constants | {"axis_bits": 4}}, tensors)
    with pytest.raises(CapsuleFileError, match="constants"):
        KVCapsule.from_pretrained(tmp_path)


@given(st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))
def test_latents_are_sums_over_layers_up_to_rounding(seed, dtype):
    """Coordinates of little variance, which stored bits resolve, included: against float64."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, -2.5, 192)
    turned = torch.linalg.qr(torch.randn(192, 192, generator=g))[0]
    x = (torch.randn(50, 192, generator=g) * sizes) @ turned.T
    held = Gathered.none(x, 50, 96)
    for layer in range(6):  # more than are projected together
        own = slice(layer * 32, layer * 32 + 32)
        held.add(x[:, own].to(dtype), x[:, own].square().sum(), turned[own, :96].T)
    exact = x.double() @ turned.double()[:, :96]
    error = (held.sum() - exact).square().mean(0)
    assert (error < 2e-5 * exact.square().mean(0).sum()).all()
    assert (error < (3e-3 if dtype == torch.bfloat16 else 1e-9) * exact.square().mean(0)).all()
    assert float(held.energy) == pytest.approx(float(x.double().square().sum()), rel=1e-5)


@pytest.mark.skipif(bool(missing()), reason="no C++ compiler")
@given(st.data())
def test_native_code_centres_as_torch_does(data):
    draw, g = data.draw, torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tokens, heads, size = draw(st.integers(0, 5)), draw(st.integers(1, 3)), draw(st.integers(2, 40))
    pairs, work = draw(st.integers(1, size // 2)), draw(st.sampled_from([torch.float32, torch.bfloat16]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    turning = torch.tensor([float(draw(st.booleans())), 1.25, 2])
    x, mean = (torch.randn(n, 2, heads, size, generator=g) for n in (tokens, 1))
    codec = JointCodec(
        {
            "mean": mean[0],
            "axes": torch.zeros(GROUP, 2, heads, size, dtype=torch.int8),
            "steps": torch.zeros(2, GROUP),
            "weight": torch.rand(2, generator=g) + 0.1,
            "lost": torch.tensor([[1.0, 0.1, 0.01, 0.0]]).double(),
            "typical": torch.zeros(1),
            "frequencies": torch.rand(pairs, generator=g).double(),
            "pairs": torch.randint(0, 3, (pairs,), generator=g),
            "turning": turning,
        }
    )
    codec._dtype = work
    keys, values = x.to(dtype).unbind(1)
    tables = codec.rotary.back(*codec.rotary.tables(torch.randint(0, 99, (3, tokens), generator=g)))
    found = codec._centred(keys, values, tables)
    with mock.patch.object(joint, "supports", return_value=False):
        expected = codec._centred(keys, values, tables)
    assert found[0].dtype == expected[0].dtype == work
    close = 1e-5 if work == torch.float32 else 1e-2
    torch.testing.assert_close(found[0], expected[0], atol=close, rtol=close)
    torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(bool(missing()), reason="no C++ compiler")
@given(st.integers(0, 99), st.tuples(*[st.integers(0, 2)] * 3).filter(any), st.integers(0, 5))
def test_native_code_packs_latents_as_torch_does(seed, groups, tokens):
    """Coordinates of any size, of nothing and of no number; columns beyond those that get bits are left."""
    chosen, g = Levels(*(GROUP * n for n in groups)), torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, chosen.rank + 32, generator=g) * torch.logspace(1, -6, chosen.rank + 32)
    x[:1], x[1:2, 0] = 0, (torch.nan, torch.inf)[seed % 2]
    codes, scales = pack(x, chosen)
    with mock.patch.object(levels, "supports", return_value=False):
        expected = pack(x, chosen)
    assert (codes.shape, codes.dtype) == (expected[0].shape, expected[0].dtype)
    torch.testing.assert_close(scales, expected[1], atol=0, rtol=2e-3, equal_nan=True)
    ours, theirs = (unpack(*each, chosen, torch.float32) for each in ((codes, scales), expected))
    torch.testing.assert_close(ours.nan_to_num(7, 7, 7), theirs.nan_to_num(7, 7, 7), atol=1e-7, rtol=2e-2)
