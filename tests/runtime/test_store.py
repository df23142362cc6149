"""Stores of images: what is found, what is read anew, and what happens when files or disks fail."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import capsight
from capsight.errors import CapsuleFileError, CapsuleStoreWarning, OptionError
from capsight.kvcapsule.rest import CapsuleStore, ImageKey
from capsight.kvcapsule.rest.parts import can_reread
from capsight.layout import build_layout
from capsight.runtime import stored
from capsight.runtime.text_pass import can_read_text
from tiny import FAMILIES

from .test_enable import greedy
from .test_rest import joint, tiny

QWEN = "qwen2_5_vl"
KEY = ImageKey("a" * 32, "b" * 32, True)


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


@pytest.fixture
def vlm():
    joint(QWEN)  # fitted before any picture is counted
    return tiny(QWEN)


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


def test_damaged_files_are_read_anew(vlm, tmp_path):
    store = CapsuleStore(tmp_path)
    with Counted(vlm.model) as seen, capsight.enable(vlm.model, capsule=joint(QWEN), store=store) as fast:
        fast.encapsulate(**prompt(vlm, 1))
        (path,) = (tmp_path / file.path for file in store.files())
        good = path.read_bytes()
        for bad in (good[:-1], good[:40], b"", good + b"x", good[:-9] + bytes([good[-9] ^ 4]) + good[-8:]):
            path.write_bytes(bad)
            seen.since()
            with pytest.warns(CapsuleStoreWarning, match="removed"):
                fast.encapsulate(**prompt(vlm, 1))
            assert seen.since() == 1
            assert path.read_bytes() == good  # put there again


def test_other_models_capsules_and_pictures_find_nothing(vlm, tmp_path):
    store, latents = CapsuleStore(tmp_path), torch.randn(4, 32)
    store.put(KEY, latents, joint(QWEN), torch.float32)
    assert store.get(KEY, joint(QWEN), torch.float32) is not None
    assert store.get(KEY, joint(QWEN, 0.5), torch.float32) is not None  # the same latents, in fewer bits
    assert store.get(KEY, joint(QWEN, seed=80), torch.float32) is None
    assert store.get(KEY, joint(QWEN), torch.bfloat16) is None
    assert store.get(KEY, joint("qwen2_vl"), torch.float32) is None
    assert store.get(ImageKey("c" * 32, "b" * 32, True), joint(QWEN), torch.float32) is None
    assert store.get(ImageKey("a" * 32, "c" * 32, True), joint(QWEN), torch.float32) is None


def test_a_pixel_more_is_another_picture(vlm):
    inputs = prompt(vlm, 1)
    layout, ids = build_layout(inputs, vlm.config), inputs["input_ids"][0]
    changed = dict(inputs) | {"pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][-1, -1] += 0.5
    hashes = {stored._image_hash(x, layout, 0, ids, way) for x in (inputs, changed) for way in ("", "sparse")}
    assert len(hashes) == 4


def test_a_full_disk_costs_an_image_and_no_answer(vlm, tmp_path, monkeypatch):
    store = CapsuleStore(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with capsight.enable(vlm.model, capsule=joint(QWEN), store=store) as fast:
        fast.encapsulate(**prompt(vlm, 1))
        monkeypatch.setattr(os, "fsync", full)
        with pytest.warns(CapsuleStoreWarning, match="No space left"):
            out = fast.generate(**prompt(vlm, 2), max_new_tokens=2)
        assert out.shape[0] == 1
        with pytest.raises(CapsuleFileError, match="No space left"):
            store.put(KEY, torch.randn(4, 32), joint(QWEN), torch.float32)
    left = [name for _, _, names in os.walk(tmp_path) for name in names]
    assert len(left) == len(store.files()) == 1  # no half file


def test_what_was_not_used_for_longest_goes(tmp_path):
    capsule, store = joint(QWEN), CapsuleStore(tmp_path)
    keys = [ImageKey(letter * 32, "b" * 32, True) for letter in "acde"]
    for at, key in enumerate(keys):
        size = store.put(key, torch.ones(4, 32), capsule, torch.float32)
        path = next(f.path for f in store.files() if key.image in f.path)
        os.utime(path, (1000 + at, 1000 + at))
    store.get(keys[0], capsule, torch.float32)
    assert store.evict(2 * size) == 2
    held = [key for key in keys if store.get(key, capsule, torch.float32) is not None]
    assert held == [keys[0], keys[3]]
    small = CapsuleStore(tmp_path, max_bytes=size)
    small.put(keys[1], torch.ones(4, 32), capsule, torch.float32)
    assert len(small.files()) == 1


def test_looking_at_an_image_does_not_use_it(tmp_path):
    store = CapsuleStore(tmp_path)
    store.put(KEY, torch.randn(4, joint(QWEN).codecs[0].levels.rank), joint(QWEN), torch.float32)
    (file,) = store.files()
    os.utime(file.path, (1000, 1000))
    (before,) = store.files()
    assert store.about(before).tokens == 4
    assert store.files() == [before]
    assert store.get(KEY, joint(QWEN), torch.float32) is not None
    assert store.files()[0].used > before.used


def test_many_writers_and_readers_share_a_store(tmp_path):
    capsule = joint(QWEN)
    keys = [ImageKey(letter * 32, "b" * 32, True) for letter in "abcd"]
    size = CapsuleStore(tmp_path).put(keys[0], torch.full((4, 32), 3.0), capsule, torch.float32)
    faults: list[object] = []

    def work(seed: int) -> None:
        store = CapsuleStore(tmp_path, max_bytes=3 * size + 10)
        try:
            for step in range(25):
                key = keys[(seed + step) % 4]
                store.put(key, torch.full((4, 32), 3.0), capsule, torch.float32)
                found = store.get(keys[(seed + 2 * step) % 4], capsule, torch.float32)
                if found is not None and not torch.allclose(found[:, :32], torch.tensor(3.0), atol=1):
                    faults.append(found)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert sum(file.nbytes for file in CapsuleStore(tmp_path).files()) <= 4 * size


def test_places_that_are_no_folders(vlm):
    store = CapsuleStore("memory://capsules", quality=0.99)
    with Counted(vlm.model) as seen, capsight.enable(vlm.model, capsule=joint(QWEN), store=store) as fast:
        for new in (1, 0):
            fast.encapsulate(**prompt(vlm, 5))
            assert seen.since() == new
    assert store.evict(0) == 1
    with pytest.raises(OptionError, match="no store"):
        CapsuleStore("nowhere://x")


@pytest.mark.parametrize(
    "wrong",
    [{"reuse": "x"}, {"quality": 2}, *({"max_bytes": n} for n in (0, -1, True, "10GB", 1.5, float("nan")))],
)
def test_options_that_are_none_are_refused(tmp_path, wrong):
    with pytest.raises(OptionError):
        CapsuleStore(tmp_path, **wrong)


def test_stores_are_for_joint_capsules(vlm, tmp_path):
    with (
        pytest.raises(OptionError, match="capsule"),
        capsight.enable(vlm.model, store=CapsuleStore(tmp_path)),
    ):
        pass


def test_batches_are_read_as_without_a_store(vlm, tmp_path):
    store = CapsuleStore(tmp_path)
    inputs = vlm.inputs([([vlm.picture(1)], "one"), ([vlm.picture(2)], "another one")])
    with capsight.enable(vlm.model, capsule=joint(QWEN), store=store) as fast:
        with_store = greedy(fast.generate, **inputs)
    assert with_store.sequences.shape[0] == 2
    assert not store.files()


@pytest.mark.parametrize("url", ["", None, 5, b"/tmp", "zip://nothing"])
def test_places_that_are_none_are_refused(url):
    with pytest.raises(OptionError, match="store"):
        CapsuleStore(url)


@pytest.mark.parametrize("name", ["a[x]b", "st*r", "a?b", "ünï cöde", "{x}"])
def test_images_are_found_in_folders_of_any_name(name, tmp_path):
    store, other = CapsuleStore(tmp_path / name, reuse="anywhere"), CapsuleStore(tmp_path / "other")
    for one in (store, other):
        one.put(KEY, torch.randn(4, 32), joint(QWEN), torch.float32)
        assert one.get(KEY, joint(QWEN), torch.float32) is not None
        assert len(one.files()) == 1


def test_only_a_stores_own_files_are_removed(tmp_path):
    mine = [tmp_path / "mine.capsule", tmp_path / "a" / "mine.capsule", tmp_path / "a" / ".mine.capsule"]
    (tmp_path / "a").mkdir()
    for path in mine:
        path.write_bytes(b"precious")
    inner, store = CapsuleStore(tmp_path / "a"), CapsuleStore(tmp_path, max_bytes=1)
    inner.put(KEY, torch.randn(4, 32), joint(QWEN), torch.float32)
    store.put(KEY, torch.randn(4, 32), joint(QWEN), torch.float32)
    assert store.evict(0) == 0  # it took more than it may: gone at once
    assert len(inner.files()) == 1
    assert all(path.read_bytes() == b"precious" for path in mine)


def test_what_a_killed_writer_left_goes(tmp_path):
    store = CapsuleStore(tmp_path, max_bytes=1 << 20)
    store.put(KEY, torch.randn(4, 32), joint(QWEN), torch.float32)
    (folder,) = tmp_path.iterdir()
    left = [folder / f".{'a' * 32}-{'b' * 31}.{end}" for end in ("0old_x2z", "new_4y1z")]
    for path in left:
        path.write_bytes(b"half")
    os.utime(left[0], (1000, 1000))
    store.put(KEY, torch.randn(4, 32), joint(QWEN), torch.float32)
    assert [path.exists() for path in left] == [False, True]


@pytest.mark.parametrize("reuse", ["prefix", "anywhere"])
def test_files_that_lie_under_another_name_are_read_anew(reuse, tmp_path):
    """The same picture after other words, and of another capsule: good files, in the wrong place."""
    store, latents = CapsuleStore(tmp_path, reuse=reuse), torch.randn(4, 32)
    others = [(ImageKey(KEY.image, "c" * 32, True), joint(QWEN)), (KEY, joint(QWEN, seed=80))]
    store.put(KEY, latents, joint(QWEN), torch.float32)
    (good,) = store.files()
    for key, capsule in others:
        store.put(key, latents, capsule, torch.float32)
        for file in store.files():
            if file.path != good.path:
                Path(file.path).write_bytes(Path(good.path).read_bytes())
        with pytest.warns(CapsuleStoreWarning, match="something else than its name"):
            store.get(key, capsule, torch.float32)
    assert store.files()[0].path == good.path


def test_of_a_picture_after_several_prefixes_its_own_is_taken(tmp_path):
    store = CapsuleStore(tmp_path, reuse="anywhere", quality=0.999)
    for before, value in (("b", 1.0), ("c", 2.0)):
        key = ImageKey(KEY.image, before * 32, True)
        store.put(key, torch.full((4, 32), value), joint(QWEN), torch.float32)
    for before, value in (("b", 1.0), ("c", 2.0), ("d", 1.0)):
        found = store.get(ImageKey(KEY.image, before * 32, True), joint(QWEN), torch.float32)
        assert torch.allclose(found[:, :32], torch.tensor(value), atol=0.3)


def test_other_places_may_fail_in_any_way(vlm, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("the bucket is gone")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fails)
    monkeypatch.setattr(MemoryFileSystem, "ls", fails)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", fails)
    for reuse in ("prefix", "anywhere"):
        store = CapsuleStore("memory://gone", reuse=reuse, max_bytes=1)
        with (
            pytest.warns(CapsuleStoreWarning, match="the bucket is gone"),
            capsight.enable(vlm.model, capsule=joint(QWEN), store=store) as fast,
        ):
            assert len(fast.generate(**prompt(vlm, 1), max_new_tokens=2)) == 1


def test_what_no_store_can_keep_costs_no_answer(vlm, tmp_path):
    store = CapsuleStore(tmp_path, quality=1 - 1e-13)  # steps that no latents can be counted in
    with (
        pytest.warns(CapsuleStoreWarning, match="quality"),
        capsight.enable(vlm.model, capsule=joint(QWEN), store=store) as fast,
    ):
        assert len(fast.generate(**prompt(vlm, 1), max_new_tokens=2)) == 1


def test_stores_are_checked_before_anything_is_read(vlm, tmp_path, monkeypatch):
    for store in ("folder", tmp_path, 5):
        with (
            pytest.raises(OptionError, match="CapsuleStore"),
            capsight.enable(vlm.model, capsule=joint(QWEN), store=store),
        ):
            pass
    monkeypatch.setitem(__import__("sys").modules, "constriction", None)
    with (
        pytest.raises(OptionError, match=r"capsight\[rest\]"),
        capsight.enable(vlm.model, capsule=joint(QWEN), store=CapsuleStore(tmp_path)),
    ):
        pass


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
