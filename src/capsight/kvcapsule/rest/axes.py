"""Axes as coarse as images at rest allow: bytes of a capsule's file beside bytes of images.

Images rebuild products of latents and axes, and both are rounded. An axis has as many numbers as the keys and
values of a token (F), a coordinate as many as there are tokens (T). Of all ways to lose as much, fewest bytes
are taken where the error by an axis is F / T times that by a coordinate. An axis is kept where its coordinate
varies by more than that.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from capsight.kvcapsule.codecs.joint_axes import AXIS_BITS, numbers
from capsight.kvcapsule.codecs.levels import GROUP, rate_of

Layers = Mapping[int, Mapping[str, Tensor]]
_TOP = 2 ** (AXIS_BITS - 1) - 1
_TOWARD_ZERO = 0.1  # by so much more than a half: fewer bits at the same error
_UNUSED = 0.25  # of a step's error: variance up to which coordinates are left out, see `rate_of`


def coarse(layers: Layers, quality: float, tokens: int) -> dict[int, dict[str, Tensor]]:
    """The axes that images of a quality need, in steps that are alike for all layers.

    Args:
        layers: the buffers of each layer's codec, all axes.
        quality: share of the variance that comes back of images.
        tokens: vision tokens at rest that share the file (T).

    Returns:
        The buffers with the first axes alone, each of length 1 over all layers.
    """
    first = next(iter(layers.values()))
    step, _ = rate_of(first["lost"], quality)
    count = sum(buffers["mean"].numel() for buffers in layers.values())  # F
    error = step**2 / 12
    by_axis = error * count / tokens
    variance = first["lost"][:, 0] / GROUP  # of a coordinate
    rank = GROUP * max(int((variance > _UNUSED * error + by_axis).sum()), 1)
    rank = min(rank, len(first["axes"]))
    steps = (12 * by_axis / count / variance.repeat_interleave(GROUP)[:rank]).sqrt().float()
    largest = torch.stack([_axes(buffers, rank).abs().amax((1, 2, 3)) for buffers in layers.values()]).amax(0)
    steps = torch.maximum(steps, largest / _TOP).clamp_min(1e-30)
    integers = {
        i: _rounded(_axes(buffers, rank) / steps[:, None, None, None]).to(torch.int8)
        for i, buffers in layers.items()
    }
    squares = torch.stack([x.float().square().sum((1, 2, 3)) for x in integers.values()])
    scale = squares.sum(0).clamp_min(1).rsqrt().bfloat16().float()
    return {
        i: {**buffers, "axes": integers[i], "steps": scale / buffers["weight"][:, None]}
        for i, buffers in layers.items()
    }


def _rounded(x: Tensor) -> Tensor:
    return x.sign() * (x.abs() + 0.5 - _TOWARD_ZERO).floor()


def _axes(buffers: Mapping[str, Tensor], rank: int) -> Tensor:
    """A layer's part of U^T: float32 `[R, 2, H, D]`."""
    steps = buffers["steps"][:, :rank] * buffers["weight"][:, None]
    return numbers(buffers["axes"][:rank], steps, torch.float32)
