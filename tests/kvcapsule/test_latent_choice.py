"""Attention over capsules takes the GPU kernel where it can, and says so where it cannot."""

from __future__ import annotations

import subprocess
import sys
import types
import warnings

import pytest
import torch

from capsight.kvcapsule.attention import (
    BlockRows,
    LatentBlocks,
    LatentKernelError,
    TokenMap,
    choice,
    latent_attention,
)


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def attend(kind: type[torch.Tensor]) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    query, keys, values, slots = (torch.randn(1, n, 2, 4, generator=g) for n in (2, 1, 1, 2))
    held = LatentBlocks(
        slots.transpose(1, 2)[..., :1, :], slots.transpose(1, 2)[..., 1:, :], TokenMap(), TokenMap()
    )
    rows = BlockRows(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 1)
    return latent_attention(query.as_subclass(kind), keys, values, held, rows, None, 0.5)


@pytest.fixture(autouse=True)
def forget():
    choice.warn.cache_clear()
    yield
    choice._failed.clear()
    choice.warn.cache_clear()


def test_without_a_gpu_there_is_nothing_to_say():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(torch.Tensor)


def test_what_keeps_the_kernel_away_is_said_once():
    with pytest.warns(RuntimeWarning, match="not on cpu"):
        found = attend(OnGpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(OnGpu)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), attend(torch.Tensor))


def test_a_kernel_that_does_not_compile_is_tried_once(monkeypatch):
    tried = []

    def fail(*given):
        tried.append(given)
        raise LatentKernelError("no compiler")

    name = "capsight.kvcapsule.attention.triton_attention"
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(attend=fail))
    monkeypatch.delattr("capsight.kvcapsule.attention.triton_attention", raising=False)
    monkeypatch.setattr(choice, "missing", lambda *_: "")
    with pytest.warns(RuntimeWarning, match="no compiler"):
        found = attend(OnGpu)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), attend(torch.Tensor))
    attend(OnGpu)
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "reason"),
    [
        (torch.float64, 64, (9, 0), "float64"),
        (torch.float32, 512, (9, 0), "512"),
        (torch.float32, 64, (7, 5), "older"),
        (torch.float32, 64, (9, 0), ""),
    ],
)
def test_reasons(monkeypatch, dtype, head_dim, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda _: object())
    found = choice.missing.__wrapped__(torch.device("cuda"), dtype, head_dim)
    assert (reason in found) if reason else not found
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda _: None)
    assert "capsight[gpu]" in choice.missing.__wrapped__(torch.device("cuda"), dtype, head_dim)


def test_importing_capsight_needs_no_triton():
    code = "import sys, capsight.runtime; assert not any('latent.triton' in name for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
