"""The build of native decode attention: without a compiler, with one that fails, and cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

from capsight.kvcapsule.attention.native import build, missing, supports

pytestmark = pytest.mark.skipif(bool(missing()), reason="no C++ compiler")
MADE = build.library() if not missing() else None


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing compiled yet, and a folder of its own for what is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for each in (build.missing, build.library, build._folder):
        each.cache_clear()
    yield tmp_path / "capsight"
    for each in (build.missing, build.library, build._folder):
        each.cache_clear()


def test_without_a_compiler_torch_takes_over_and_says_so(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match="in torch, more slowly: no C\\+\\+ compiler"):
        assert "no-such-compiler" in build.missing()
    assert not supports(torch.randn(1, 2, 1, 8))


def test_a_compiler_that_fails_is_quoted(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.warns(RuntimeWarning, match="false failed"):
        assert build.missing()
    assert not list(fresh.iterdir())


def test_the_switch(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv(build.SWITCH, "1")
    with pytest.raises(build.NativeBuildError, match="no C\\+\\+ compiler"):
        build.missing()
    monkeypatch.setenv(build.SWITCH, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.missing() == "CAPSIGHT_NATIVE is 0"


@pytest.fixture
def compiler(fresh, monkeypatch, tmp_path):
    """Stands in for a compiler: takes as long as SLOW says and gives what was compiled before."""
    monkeypatch.setenv("LIBRARY", MADE._name)
    monkeypatch.setenv("SLOW", "0")
    script = tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\nsleep "$SLOW"\nfor last; do\n'
        '[ "$last" = "$UNKNOWN" ] && echo "error: what is $UNKNOWN?" >&2 && exit 1\n'
        'done\ncp "$LIBRARY" "$last"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return fresh


def test_a_compiler_that_does_not_know_the_processor_is_told(compiler, monkeypatch, caplog):
    monkeypatch.setenv("UNKNOWN", "-mamx-tile")
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    build.library("AVX2")
    assert not caplog.records
    build.library("AMX")
    assert "slower native code than this processor runs: error: what is -mamx-tile?" in caplog.text


@pytest.mark.slow
def test_this_processor_gets_its_own_code(fresh, caplog):
    build.library()
    assert not caplog.records


def test_nothing_waits_for_a_build_that_was_cut_off(compiler, monkeypatch):
    monkeypatch.setenv("SLOW", "60")
    code = "from capsight.kvcapsule.attention.native import build; build.library()"
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
        while not list(compiler.glob("build-*")):
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    monkeypatch.setenv("SLOW", "0")
    assert not list(compiler.glob("*.so"))
    build.library()
    assert list(compiler.glob("*.so"))


def test_a_file_that_is_no_library_is_compiled_again(compiler, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(build, "_compile", lambda *given: given[-1].write_bytes(b"no library"))
        with pytest.raises(build.NativeBuildError, match="cannot be loaded"):
            build.library()
    build.library()
    (made,) = compiler.glob("*.so")
    assert made.stat().st_size > 10000
