"""Stores of images: what is found, and what is read anew."""

from __future__ import annotations

import pytest
import torch

import capsight
from capsight.errors import OptionError
from capsight.kvcapsule.rest import CapsuleStore
from capsight.kvcapsule.rest.parts import can_reread
from capsight.layout import build_layout
from capsight.runtime import stored
from capsight.runtime.text_pass import can_read_text
from tiny import FAMILIES

from .test_enable import greedy
from .test_rest import joint, tiny

QWEN = "qwen2_5_vl"


def prompt(vlm, *seeds, text="what is it?"):
    return vlm.inputs([([vlm.picture(seed) for seed in seeds], text)])


class Counted:
    """How many images a model's vision tower was given."""

    def __init__(self, model):
        self.images = 0
        self._hook = model.model.visual.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.images += len(kwargs["grid_thw"] if "grid_thw" in kwargs else args[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._hook.remove()

    def since(self) -> int:
        seen, self.images = self.images, 0
        return seen


def fitted_qwen():
    joint(QWEN)  # fitted before any picture is counted
    return tiny(QWEN)


vlm = pytest.fixture(fitted_qwen)


def test_a_prefix_is_read_once(vlm, tmp_path):
    store = CapsuleStore(tmp_path, quality=0.99)
    with Counted(vlm.model) as seen, capsight.enable(vlm.model, capsule=joint(QWEN), store=store) as fast:
        first = greedy(fast.generate, **prompt(vlm, 1, 2))
        assert seen.since() == 2
        again = greedy(fast.generate, **prompt(vlm, 1, 2, text="and now?"))
        assert seen.since() == 0
        fast.generate(**prompt(vlm, 1, 2, 3), max_new_tokens=2)
        assert seen.since() == 1
        fast.generate(**prompt(vlm, 2, 1), max_new_tokens=2)  # another order: what they saw is another
        assert seen.since() == 2
        fast.generate(**prompt(vlm, 1, 2, 3), max_new_tokens=2)
        assert seen.since() == 0
    assert len(store.files()) == 5
    assert first.sequences.shape[1] > 0
    assert again.sequences.shape[1] > 0


def test_anywhere_reads_each_picture_once(vlm, tmp_path):
    store = CapsuleStore(tmp_path, quality=0.99, reuse="anywhere")
    with Counted(vlm.model) as seen, capsight.enable(vlm.model, capsule=joint(QWEN), store=store) as fast:
        for seeds, new in (((1, 2), 2), ((2, 1), 0), ((3, 2, 1, 2), 1), ((2,), 0)):
            fast.generate(**prompt(vlm, *seeds), max_new_tokens=2)
            assert seen.since() == new
    assert len(store.files()) == 3


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("reuse", ["prefix", "anywhere"])
def test_one_picture_from_the_store_is_as_good_as_read(name, reuse, tmp_path):
    vlm, capsule = tiny(name), joint(name)
    store = CapsuleStore(tmp_path, quality=0.9999, reuse=reuse)
    inputs = prompt(vlm, 90)
    if not can_read_text(vlm.config):
        with (
            pytest.raises(OptionError, match="states or sliding"),
            capsight.enable(vlm.model, capsule=capsule, store=store),
        ):
            pass
        return
    with capsight.enable(vlm.model, capsule=capsule, store=store) as fast:
        read = fast.encapsulate(**inputs)
        kept = [layer._packed.clone() for layer in read.capsule_layers.values()]
        found = fast.encapsulate(**inputs)
        assert found.get_seq_length() == read.get_seq_length()
        for layer, old in zip(found.capsule_layers.values(), kept, strict=True):
            assert float((layer._packed - old).norm() / old.norm()) < 0.2
        out = fast.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert out.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_pictures_at_other_places_turn_their_keys(name, tmp_path):
    """Where nothing of other pictures has been seen yet, keys are those of a prefill of all pictures."""
    vlm, capsule = tiny(name), joint(name)
    if not can_read_text(vlm.config):
        pytest.skip("its layers hold more of an image than latents do")
    store = CapsuleStore(tmp_path, quality=0.9999, reuse="anywhere")
    inputs = prompt(vlm, 90, 91)
    row = build_layout(inputs, vlm.config).rows[0]
    if not can_reread(build_layout(inputs, vlm.config), inputs["input_ids"]):
        pytest.skip("it has image tokens outside images, and is read as without a store")
    with capsight.enable(vlm.model, capsule=capsule, store=store) as fast:
        fast.encapsulate(**prompt(vlm, 91))
        cache = fast.encapsulate(**inputs)
        layer = cache.capsule_layers[0]
        places = cache._ledger.positions(layer.placement.runs, torch.device("cpu"))
        keys, _ = layer.codec.decode_at(layer.payload, places, torch.float32)
    with capsight.enable(vlm.model) as plain:
        full = plain.encapsulate(**inputs)
    vision = torch.cat([torch.arange(b.start, b.end) for b in row.blocks])
    exact = full.layers[0].keys[0][:, vision].transpose(0, 1)  # layer 0 has seen no other picture
    error = float((keys[:, :, 0] - exact).norm() / exact.norm())
    swapped = keys[:, :, 0].roll(len(keys) // 2, 0)  # as if they stood at each other's places
    assert error < min(0.25, float((swapped - exact).norm() / exact.norm()) / 2)


def test_a_pixel_more_is_another_picture(vlm):
    inputs = prompt(vlm, 1)
    layout, ids = build_layout(inputs, vlm.config), inputs["input_ids"][0]
    changed = dict(inputs) | {"pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][-1, -1] += 0.5
    hashes = {stored._image_hash(x, layout, 0, ids, way) for x in (inputs, changed) for way in ("", "sparse")}
    assert len(hashes) == 4


def test_places_that_are_no_folders(vlm):
    store = CapsuleStore("memory://capsules", quality=0.99)
    with Counted(vlm.model) as seen, capsight.enable(vlm.model, capsule=joint(QWEN), store=store) as fast:
        for new in (1, 0):
            fast.encapsulate(**prompt(vlm, 5))
            assert seen.since() == new
    assert store.evict(0) == 1
    with pytest.raises(OptionError, match="no store"):
        CapsuleStore("nowhere://x")


def test_batches_are_read_as_without_a_store(vlm, tmp_path):
    store = CapsuleStore(tmp_path)
    inputs = vlm.inputs([([vlm.picture(1)], "one"), ([vlm.picture(2)], "another one")])
    with capsight.enable(vlm.model, capsule=joint(QWEN), store=store) as fast:
        with_store = greedy(fast.generate, **inputs)
    assert with_store.sequences.shape[0] == 2
    assert not store.files()


def test_images_that_are_read_in_a_way_of_their_own_go_past_the_store(tmp_path, vlm):
    told = {"vision_feature_layer": -1}
    llava, store = tiny("llava"), CapsuleStore(tmp_path)
    inputs = prompt(llava, 1)
    assert llava.config.vision_feature_layer != -1
    with capsight.enable(llava.model, capsule=joint("llava")) as fast:
        cache = fast.encapsulate(**inputs, **told)
        expected = greedy(fast.generate, past_key_values=cache, **inputs)
    with capsight.enable(llava.model, capsule=joint("llava"), store=store) as fast:
        fast.encapsulate(**inputs)
        for _ in range(2):
            found = greedy(fast.generate, **inputs, **told)
            assert torch.allclose(found.logits[0], expected.logits[0], atol=1e-5)
        assert len(store.files()) == 1
    inputs = prompt(vlm, 1)
    positions = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    with Counted(vlm.model) as seen, capsight.enable(vlm.model, capsule=joint(QWEN), store=store) as fast:
        for _ in range(2):
            fast.encapsulate(**inputs, position_ids=positions)
        assert seen.since() == 2
