"""Files of saved caches: damage is noticed, and so is what was forged."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from capsight.errors import CapsightError, CapsuleFileError
from capsight.kvcapsule.cache_file import load_cache, save_cache
from capsight.kvcapsule.fingerprint import tensors_fingerprint
from kvcapsule.conftest import BLOCK, fitted
from tiny import FAMILIES


def prefilled(vlm, capsule):
    inputs = vlm.inputs([([vlm.picture(0)], "what is it?"), ([], "only text")])
    cache = capsule.cache(inputs)
    cache.honours_key_bias = True  # what is generated does not matter
    vlm.model.generate(**inputs, past_key_values=cache, max_new_tokens=2, do_sample=False)
    return cache


@pytest.fixture(
    scope="module", params=[("qwen2_5_vl", "adaptive"), ("qwen2_5_vl", "heads"), ("gemma3", "adaptive")]
)
def made(request, tmp_path_factory):
    """A file, the capsule, and what was saved; gemma3 has sliding-window layers."""
    family, codec = request.param
    vlm = FAMILIES[family]()
    capsule = fitted(vlm, codec=codec).with_bits(8)
    saved = prefilled(vlm, capsule)
    path = tmp_path_factory.mktemp("cache") / "x.safetensors"
    save_cache(path, saved, capsule)
    return path, capsule, saved


def parts(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["header"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def forge(path, header, tensors):
    """A file whose checksum is right."""
    text = header if isinstance(header, str) else json.dumps(header, sort_keys=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    about = {
        "format": "capsight.capsule_cache",
        "header": text,
        "sha256": tensors_fingerprint(tensors, text),
    }
    save_file(tensors, path, about)
    return path


def test_what_is_loaded_is_what_was_saved(made):
    path, capsule, saved = made
    again = load_cache(path, capsule)
    assert again.layout == saved.layout
    assert again.nbytes == saved.nbytes
    assert again.nbytes_full == saved.nbytes_full
    ours, theirs = again.conversation, saved.conversation
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert (ours.prompt, ours.images, ours.layout) == (theirs.prompt, theirs.images, theirs.layout)
    assert [len(row) for row in ours.images] == [1, 0]
    assert all(map(all, ours.images))
    for a, b in zip(again.layers, saved.layers, strict=True):
        assert a.get_seq_length() == b.get_seq_length()
        assert a.get_mask_sizes(3) == b.get_mask_sizes(3)
        if a.is_sliding:
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)
        else:
            assert a.placement.runs == b.placement.runs
            assert all(torch.equal(t, b.payload.tensors[name]) for name, t in a.payload.tensors.items())
            assert torch.equal(a._packed, b._packed)
            assert torch.equal(a._tail, b._tail)
    if not any(layer.is_sliding for layer in again.layers):
        again.crop(-1)
    again.reorder_cache(torch.tensor([1, 0]))
    again.reset()


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_noticed(made, tmp_path_factory, data):
    path, capsule, _ = made
    good = path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    edge = st.integers(0, 40) | st.integers(start - 40, start + 40) | st.integers(0, len(good) - 1)
    damage = data.draw(st.sampled_from(["flip", "cut", "insert", "remove", "zero"]))
    at = data.draw(edge)
    bad = bytearray(good)
    if damage == "flip":
        bad[at] ^= data.draw(st.integers(1, 255))
    elif damage == "cut":
        del bad[at:]
    elif damage == "insert":
        bad[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    elif damage == "remove":
        del bad[at : at + data.draw(st.integers(1, 9))]
    else:
        bad[at : at + 64] = bytes(len(bad[at : at + 64]))
    broken = path.with_name("broken")
    broken.write_bytes(bad)
    try:
        found = load_cache(broken, capsule)
    except CapsightError:
        return
    again = path.with_name("again")  # what was changed says nothing, as white space: the content is the same
    save_cache(again, found, capsule)
    assert again.read_bytes() == good


FORGED = [
    ("settled", None, "settled"),
    ("settled", True, "settled"),
    ("settled", -1, "settled"),
    ("settled", 1, "layers"),
    ("sliding", [], "sliding"),
    ("layout", None, "layout"),
    ("layout", {"rows": [{"length": 2, "pad_left": 0, "blocks": []}]}, "layers.0"),
    ("layout", {"rows": [{"length": "2"}]}, "not a prompt layout"),
    ("images", 7, "prompt"),
    ("images", [["a"]], "prompt"),
    ("images", [[1], []], "prompt"),
    ("prompt", "7", "prompt"),
    ("prompt", 0, "prompt"),
    ("prompt", 1 << 20, "prompt"),
    ("format_version", 1, "format version 1"),
    ("format_version", 99, "format version 99"),
    ("model", "0", "another model"),
    ("capsule", "0", "another capsule"),
]


@pytest.mark.parametrize(("field", "value", "words"), FORGED)
def test_forged_headers_are_refused(made, tmp_path, field, value, words):
    path, capsule, _ = made
    header, tensors = parts(path)
    with pytest.raises(CapsightError, match=words):
        load_cache(forge(tmp_path / "x", header | {field: value}, tensors), capsule)


@pytest.mark.parametrize("weights", ["heavy", "stored"])
def test_forged_weights_are_refused_where_there_may_be_some(made, tmp_path, weights):
    path, capsule, saved = made
    header, tensors = parts(path)
    forged = forge(tmp_path / "x", header | {"weights": weights}, tensors)
    if capsule.info.codec == "adaptive":
        with pytest.raises(CapsightError, match="weights"):
            load_cache(forged, capsule)
    else:
        assert load_cache(forged, capsule).nbytes == saved.nbytes


@pytest.mark.parametrize("text", ["", "[]", "{", "7", "[" * 100_000])
def test_headers_that_are_no_object_are_refused(made, tmp_path, text):
    path, capsule, _ = made
    with pytest.raises(CapsuleFileError, match="malformed header"):
        load_cache(forge(tmp_path / "x", text, parts(path)[1]), capsule)


def test_forged_tensors_are_refused(made, tmp_path):
    path, capsule, _ = made
    header, good = parts(path)
    for name, tensor in good.items():
        wrong = [None, tensor[None], tensor.to(torch.float64 if tensor.is_floating_point() else torch.int32)]
        wrong += [tensor[..., :0], torch.cat([tensor, tensor])]
        if tensor.is_floating_point() and tensor.numel():
            for bad in (float("nan"), float("inf")):
                broken = tensor.clone()
                broken.view(-1)[-1] = bad
                wrong.append(broken)
        if name.endswith("kept"):
            wrong += [tensor.flip(-1), torch.full_like(tensor, BLOCK), torch.zeros_like(tensor)]
        if name.endswith("counts"):
            wrong += [tensor + 1, torch.zeros_like(tensor), torch.full_like(tensor, 255)]
        for bad in wrong:
            tensors = {key: value for key, value in good.items() if key != name}
            if bad is not None:
                tensors[name] = bad
            with pytest.raises(CapsuleFileError):
                load_cache(forge(tmp_path / "x", header, tensors), capsule)
    with pytest.raises(CapsuleFileError, match="of no layer"):
        load_cache(forge(tmp_path / "x", header, {**good, "more": torch.zeros(1)}), capsule)


def test_an_empty_cache_cannot_be_saved(made, tmp_path):
    _, capsule, saved = made
    empty = capsule.cache(saved.layout)
    empty.conversation = saved.conversation
    with pytest.raises(CapsightError, match="prefilled"):
        save_cache(tmp_path / "x", empty, capsule)


@pytest.mark.parametrize("codec", ["static", "evict"])
def test_other_codecs(qwen, tmp_path, codec):
    capsule = fitted(qwen, codec=codec)
    inputs = qwen.inputs([([qwen.picture(0)], "what is it?")])
    cache = capsule.cache(inputs)
    cache.honours_key_bias = True
    with torch.no_grad():
        qwen.model(**inputs, past_key_values=cache, use_cache=True)
    save_cache(tmp_path / "x", cache, capsule)
    again = load_cache(tmp_path / "x", capsule)
    for a, b in zip(again.layers, cache.layers, strict=True):
        for x, y in zip(a.codec.decode(a.payload), b.codec.decode(b.payload), strict=True):
            assert torch.equal(x, y)


def test_stored_weights_come_back_and_serve_a_capsule_that_solves(qwen, tmp_path):
    capsule = fitted(qwen).with_weights("stored")
    save_cache(tmp_path / "x", prefilled(qwen, capsule), capsule)
    again = load_cache(tmp_path / "x", fitted(qwen))
    assert "weights" in again.capsule_layers[0].payload.tensors


def test_a_cache_of_nobody_knows_what_cannot_be_saved(qwen, tmp_path):
    capsule = fitted(qwen)
    cache = prefilled(qwen, capsule)
    cache.conversation = None
    with pytest.raises(CapsightError, match="which prompt"):
        save_cache(tmp_path / "x", cache, capsule)
