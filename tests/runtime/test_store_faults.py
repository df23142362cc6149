"""Stores of images where files, disks and places fail: answers come all the same."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import capsight
from capsight.errors import CapsuleFileError, CapsuleStoreWarning, OptionError
from capsight.kvcapsule.rest import CapsuleStore

from .test_rest import joint
from .test_store import QWEN, Counted, fitted_qwen, prompt
from .test_store_files import KEY

vlm = pytest.fixture(fitted_qwen)


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


def test_stores_are_for_joint_capsules(vlm, tmp_path):
    with (
        pytest.raises(OptionError, match="capsule"),
        capsight.enable(vlm.model, store=CapsuleStore(tmp_path)),
    ):
        pass


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
