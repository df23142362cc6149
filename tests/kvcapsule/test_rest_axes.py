"""Capsules for images at rest: coarse axes, how coarse, and what their files hold."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import capsight
from capsight.errors import CapsightError, CapsuleFileError, OptionError
from capsight.evaluation import reference_items
from capsight.evaluation.asking import process
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.calibration.joint_fit import vision_tokens
from capsight.kvcapsule.capsule_file import KIND
from capsight.kvcapsule.codecs import joint_tensors
from capsight.kvcapsule.codecs.joint_coarse import least_squares
from capsight.kvcapsule.codecs.joint_tensors import for_file
from capsight.kvcapsule.codecs.levels import GROUP
from capsight.kvcapsule.rest import for_rest
from capsight.kvcapsule.store import read_folder, write_folder


def reference_inputs():
    model, processor = capsight.load_reference_vlm()
    (item,) = reference_items("calibration", 2, 1, first=2000)
    return model, process(processor, item, [item.asks[0].question])


def test_a_capsule_for_rest_is_small_and_reads_what_the_whole_one_wrote(tmp_path):
    model, inputs = reference_inputs()
    whole = KVCapsule.from_pretrained("reference")
    for_rest(whole, 0.97).save_pretrained(tmp_path / "small")
    small = KVCapsule.from_pretrained(tmp_path / "small")
    folders = whole.origin.folder, tmp_path / "small"
    sizes = [next(folder.glob("*.safetensors")).stat().st_size for folder in folders]
    assert sizes[1] < sizes[0] / 3
    found = []
    for index, capsule in enumerate((whole, small)):
        with capsight.enable(model, capsule=capsule) as fast:
            fast.encapsulate(**inputs)
            fast.save(tmp_path / f"{index}", quality=0.97)
            for written in range(index + 1):
                layer = fast.load(tmp_path / f"{written}").capsule_layers[0]
                found.append(layer.codec.decode(layer.payload)[1])
    for other in found[1:]:
        assert float((other - found[0]).norm() / found[0].norm()) < 0.2
    with pytest.raises(OptionError, match="quality"):
        for_rest(whole, 1.0)
    with pytest.raises(OptionError, match="joint"):
        for_rest(KVCapsule.from_pretrained("reference-heads"), 0.97)


@given(st.integers(0, 99), st.integers(1, 3), st.sampled_from([1, 7, 63, 127]))
def test_coarse_axes_are_entropy_coded_in_files(seed, groups, top):
    g = torch.Generator().manual_seed(seed)
    axes = torch.randint(-top, top + 1, (GROUP * groups, 2, 3, 4), generator=g).to(torch.int8)
    axes[-1, 0, 0, 0], steps = top, torch.ones(2, len(axes))
    held = for_file({"axes": axes, "steps": steps, "weight": torch.ones(2)})
    assert ("rounded" in held) == (top < 127)
    assert torch.equal(joint_tensors._opened(held, (2, 3, 4))["axes"], axes)
    if top < 127:
        held["rounded"][len(held["rounded"]) // 2] ^= 255
        with pytest.raises(CapsightError):
            joint_tensors._opened(held, (2, 3, 4))


def test_a_layer_that_has_no_part_in_an_axis_needs_no_coder():
    axes = torch.full((GROUP, 2, 3, 4), 127, dtype=torch.int8)
    axes[-1] = 0
    assert "rounded" not in for_file({"axes": axes, "steps": torch.ones(2, GROUP), "weight": torch.ones(2)})


def test_files_that_more_tokens_share_have_finer_axes(tmp_path):
    """Whitened error of what a cache rebuilds, and bytes of the file, by tokens."""
    model, inputs = reference_inputs()
    whole = KVCapsule.from_pretrained("reference")
    vectors = vision_tokens(model, inputs)
    errors, sizes = [], []
    for tokens in (1000, 10_000, 100_000):
        for_rest(whole, 0.97, tokens).save_pretrained(tmp_path / f"{tokens}")
        small = KVCapsule.from_pretrained(tmp_path / f"{tokens}")
        sizes.append(next((tmp_path / f"{tokens}").glob("*.safetensors")).stat().st_size)
        with capsight.enable(model, capsule=small) as fast:
            payload = next(iter(fast.encapsulate(**inputs).capsule_layers.values())).payload
        total = lost = 0.0
        for layer, codec in small.codecs.items():
            values = vectors[layer][1].float() - codec.mean[1]
            weight = float(codec.weight[1])
            rebuilt = codec.decode(payload)[1][:, :, 0] - codec.mean[1]
            total += float(values.square().sum()) * weight**2
            lost += float((values - rebuilt).square().sum()) * weight**2
        errors.append(lost / total)
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.25


@given(st.integers(0, 99))
def test_latents_of_coarse_axes_are_least_squares(seed):
    g = torch.Generator().manual_seed(seed)
    axes = torch.randint(-2, 3, (GROUP, 2, 2, 40), generator=g).to(torch.int8)
    axes[3] = 0  # a layer, or all of them, may have no part in an axis
    layer = mock.Mock(axes=axes, inverse=None, unit_axes=lambda: axes.flatten(1).float() / 10)
    x = torch.randn(9, 160, generator=g)
    found = least_squares(x @ layer.unit_axes().T, [layer])
    left = x - found @ layer.unit_axes()
    assert float((left @ layer.unit_axes().T).abs().max()) < 1e-3
    assert least_squares(x @ layer.unit_axes().T, [layer]).equal(found)
    fine = mock.Mock(axes=torch.full_like(axes, 127))
    assert least_squares(x, [fine]) is x


def test_a_capsule_for_rest_is_the_same_after_its_file(tmp_path):
    small = for_rest(KVCapsule.from_pretrained("reference"), 0.96, 5000)
    small.save_pretrained(tmp_path / "a")
    loaded = KVCapsule.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    for index, codec in loaded.whole_codecs().items():
        for name, tensor in small.codecs[index].whole().items():
            assert torch.equal(tensor, codec.whole()[name]), name
    first, second = (next((tmp_path / name).glob("*.safetensors")) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert not [name for name in read_folder(tmp_path / "a", KIND)[1] if name.endswith((".steps", ".axes"))]


@pytest.mark.parametrize("tokens", [0, -5, True, 2.5, "many", None])
def test_tokens_that_are_no_number_are_refused(tokens):
    with pytest.raises(OptionError, match="tokens"):
        for_rest(KVCapsule.from_pretrained("reference"), 0.97, tokens)


def test_files_for_too_few_tokens_are_refused():
    with pytest.raises(OptionError, match="give more tokens"):
        for_rest(KVCapsule.from_pretrained("reference"), 0.97, 1)


def test_axes_as_they_once_were_coded_are_refused(tmp_path):
    for_rest(KVCapsule.from_pretrained("reference"), 0.97).save_pretrained(tmp_path)
    header, tensors = read_folder(tmp_path, KIND)
    header = {name: x for name, x in header.items() if name not in ("sha256", "tensors", "header_sha256")}
    old = {name.replace("rounded", "coded"): x for name, x in tensors.items()}
    write_folder(tmp_path, KIND, header, old)
    with pytest.raises(CapsuleFileError, match="for_rest"):
        KVCapsule.from_pretrained(tmp_path)


def test_a_capsule_for_rest_is_not_rounded_again():
    with pytest.raises(OptionError, match="the whole one"):
        for_rest(for_rest(KVCapsule.from_pretrained("reference"), 0.97), 0.99, 10**6)
