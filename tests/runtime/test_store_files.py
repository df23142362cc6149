"""A store of images by itself: keys, eviction, many writers, and files that are not its own."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from capsight.errors import CapsuleStoreWarning, OptionError
from capsight.kvcapsule.rest import CapsuleStore, ImageKey

from .test_rest import joint
from .test_store import QWEN

KEY = ImageKey("a" * 32, "b" * 32, True)


def test_other_models_capsules_and_pictures_find_nothing(tmp_path):
    store, latents = CapsuleStore(tmp_path), torch.randn(4, 32)
    store.put(KEY, latents, joint(QWEN), torch.float32)
    assert store.get(KEY, joint(QWEN), torch.float32) is not None
    assert store.get(KEY, joint(QWEN, 0.5), torch.float32) is not None  # the same latents, in fewer bits
    assert store.get(KEY, joint(QWEN, seed=80), torch.float32) is None
    assert store.get(KEY, joint(QWEN), torch.bfloat16) is None
    assert store.get(KEY, joint("qwen2_vl"), torch.float32) is None
    assert store.get(ImageKey("c" * 32, "b" * 32, True), joint(QWEN), torch.float32) is None
    assert store.get(ImageKey("a" * 32, "c" * 32, True), joint(QWEN), torch.float32) is None


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


@pytest.mark.parametrize(
    "wrong",
    [{"reuse": "x"}, {"quality": 2}, *({"max_bytes": n} for n in (0, -1, True, "10GB", 1.5, float("nan")))],
)
def test_options_that_are_none_are_refused(tmp_path, wrong):
    with pytest.raises(OptionError):
        CapsuleStore(tmp_path, **wrong)


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
