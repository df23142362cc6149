"""A build of optimum-quanto's kernels that was cut off must not stop everything without end."""

import os
import threading
import time

import pytest

import capsight
from capsight.baselines import quantized
from capsight.baselines.quantized import ABANDONED_S, QuantoInt4, wait_for_kernels
from capsight.errors import CapsightError


def make_lock(folder, age_s):
    lock = folder / "cpp" / "build" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    made = time.time() - age_s
    os.utime(lock, (made, made))
    return lock


def test_waits_for_a_build_until_it_ends(tmp_path):
    wait_for_kernels(tmp_path)
    lock = make_lock(tmp_path, 1)
    done = threading.Timer(0.3, lock.unlink)
    done.start()
    wait_for_kernels(tmp_path)
    assert not lock.exists()


def test_a_build_that_was_cut_off_is_named(tmp_path):
    lock = make_lock(tmp_path, ABANDONED_S + 1)
    with pytest.raises(CapsightError, match="delete") as caught:
        wait_for_kernels(tmp_path)
    assert str(lock) in str(caught.value)
    assert lock.exists()


def test_the_method_looks_before_it_runs(qwen, monkeypatch):
    pytest.importorskip("optimum.quanto")
    monkeypatch.setattr(quantized, "_age_s", lambda lock: ABANDONED_S + 1)
    monkeypatch.setattr("pathlib.Path.glob", lambda folder, pattern: [folder / pattern])
    with pytest.raises(CapsightError, match="cut off"), capsight.enable(qwen.model, capsule=QuantoInt4()):
        pass
