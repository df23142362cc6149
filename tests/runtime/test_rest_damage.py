"""Files at rest that were damaged, disks that fill up, several writers: refused or survived, nothing lost."""

from __future__ import annotations

import errno
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import capsight
from capsight.errors import CapsightError, CapsuleFileError, ModelMismatchError
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.rest import CapsuleStore, ImageKey, for_rest

from .test_rest import joint, tiny, two_pictures


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    vlm, capsule = tiny("qwen2_5_vl"), joint("qwen2_5_vl")
    path = tmp_path_factory.mktemp("rest") / "x"
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        fast.encapsulate(**two_pictures(vlm))
        fast.save(path, quality=0.9)
    return path, vlm, capsule


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_noticed(saved, data):
    path, vlm, capsule = saved
    good = path.read_bytes()
    bad = bytearray(good)
    at = data.draw(st.integers(0, 60) | st.integers(0, len(good) - 1))
    damage = data.draw(st.sampled_from(["flip", "cut", "insert", "remove"]))
    if damage == "flip":
        bad[at] ^= data.draw(st.integers(1, 255))
    elif damage == "cut":
        del bad[at:]
    elif damage == "insert":
        bad[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        del bad[at : at + data.draw(st.integers(1, 9))]
    broken = path.with_name("broken")
    broken.write_bytes(bad)
    with capsight.enable(vlm.model, capsule=capsule) as fast, pytest.raises(CapsightError):
        fast.load(broken)


def test_a_full_disk_leaves_the_old_file(saved, tmp_path, monkeypatch):
    path, vlm, capsule = saved
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        fast.load(path)
        fast.save(tmp_path / "x", quality=0.9)
        old = (tmp_path / "x").read_bytes()

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CapsuleFileError, match="No space left"):
            fast.save(tmp_path / "x", quality=0.5)
    assert (tmp_path / "x").read_bytes() == old
    assert os.listdir(tmp_path) == ["x"]


@contextmanager
def files_no_longer_than(nbytes: int):
    """As on a disk that fills up while a file is written."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_disk_that_fills_up_leaves_what_was_there(saved, tmp_path, share):
    _, vlm, capsule = saved
    small, store = for_rest(capsule, 0.9), CapsuleStore(tmp_path / "store")
    small.save_pretrained(tmp_path / "small")
    files = [next((tmp_path / "small").glob("*.safetensors")), tmp_path / "x"]
    with capsight.enable(vlm.model, capsule=small) as fast:
        fast.encapsulate(**two_pictures(vlm))
        fast.save(tmp_path / "x", quality=0.9)
        old = [file.read_bytes() for file in files]
        with files_no_longer_than(int(share * len(old[1]))):
            with pytest.raises(CapsuleFileError, match="too large"):
                fast.save(tmp_path / "x", quality=0.95)
            with pytest.raises(CapsuleFileError, match="too large"):
                for_rest(capsule, 0.95).save_pretrained(tmp_path / "small")
            with pytest.raises(CapsuleFileError, match="too large"):
                store.put(ImageKey("a" * 32, "b" * 32, True), torch.randn(900, 32), small, torch.float32)
        assert [file.read_bytes() for file in files] == old
        fast.load(tmp_path / "x")
    KVCapsule.from_pretrained(tmp_path / "small")
    assert not store.files()
    left = [path.name for path in tmp_path.rglob(".*")]
    assert not left


def test_of_two_writers_one_is_read_whole(saved, tmp_path):
    _, vlm, capsule = saved
    with capsight.enable(vlm.model, capsule=capsule) as fast:
        fast.encapsulate(**two_pictures(vlm))
        contents = []
        for quality in (0.5, 0.99):
            fast.save(tmp_path / "x", quality=quality)
            contents.append((tmp_path / "x").read_bytes())

        def write(quality: float) -> None:
            for _ in range(8):
                fast.save(tmp_path / "x", quality=quality)

        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(write, quality) for quality in (0.5, 0.99)]
            while not all(job.done() for job in jobs):
                assert (tmp_path / "x").read_bytes() in contents
            for job in jobs:
                job.result()
        fast.load(tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("name", ["capsule.json", "*.safetensors"])
def test_damage_to_a_capsule_for_rest_is_noticed(saved, tmp_path, name):
    """Each byte of the start, where names and sizes stand, and every 97th of the others; lengths likewise."""
    for_rest(saved[2], 0.9).save_pretrained(tmp_path)
    file = next(tmp_path.glob(name))
    good = file.read_bytes()
    for at in (*range(99), *range(99, len(good), 97)):
        for bad in (good[:at], good[:at] + bytes([good[at] ^ 255]) + good[at + 1 :]):
            file.write_bytes(bad)
            with pytest.raises(CapsightError):
                KVCapsule.from_pretrained(tmp_path)
    file.write_bytes(good)
    KVCapsule.from_pretrained(tmp_path)


def test_latents_of_a_capsule_and_of_its_smaller_ones_are_read_by_each(saved, tmp_path):
    """Capsules for rest of any size read what any other of the same fit wrote; of another fit, nothing."""
    _, vlm, capsule = saved
    capsules = [capsule, for_rest(capsule, 0.95, 10**6), for_rest(capsule, 0.9, 3000)]
    for index, own in enumerate(capsules):
        with capsight.enable(vlm.model, capsule=own) as fast:
            fast.encapsulate(**two_pictures(vlm))
            fast.save(tmp_path / f"{index}", quality=0.95)
    for own in capsules:
        with capsight.enable(vlm.model, capsule=own) as fast:
            for index in range(3):
                assert fast.load(tmp_path / f"{index}").get_seq_length()
    foreign = for_rest(joint("qwen2_5_vl", seed=80), 0.9)
    with (
        capsight.enable(vlm.model, capsule=foreign) as fast,
        pytest.raises(ModelMismatchError, match="another capsule"),
    ):
        fast.load(tmp_path / "2")
