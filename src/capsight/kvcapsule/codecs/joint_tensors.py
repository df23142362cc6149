"""What a layer of the joint codec learnt, as files have it, and as files for images at rest do.

Memory has axes in 8 bits; files have the last ones in 4, where all of these fit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from capsight.errors import OptionError
from capsight.kvcapsule.codecs.base import take_tensors
from capsight.kvcapsule.codecs.joint_axes import in_steps, numbers
from capsight.kvcapsule.codecs.levels import GROUP

_SHAPES: dict[str, tuple[int | None, ...]] = {
    "weight": (2,),
    "lost": (None, 4),
    "typical": (1,),
    "frequencies": (None,),
    "pairs": (None,),
    "turning": (3,),
}
_DTYPES = {"axes": torch.int8, "lost": torch.float64, "frequencies": torch.float64, "pairs": torch.int64}


def trimmed(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """With no more than the first axes, the first group in 8 bits, the others in 4."""
    axes, steps = tensors["axes"][:rank], tensors["steps"][:, :rank]
    last = in_steps(numbers(axes[GROUP:], steps[:, GROUP:], torch.float32), 4)
    axes, steps = torch.cat((axes[:GROUP], last[0])), torch.cat((steps[:, :GROUP], last[1]), 1)
    return {**tensors, "axes": axes, "steps": steps}


def for_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the last pairs of axes, as many as fit in 4 bits, as "nibbles": uint8 `[pairs, 2, H, D]`."""
    axes = tensors["axes"].contiguous()
    wide = (axes.flatten(1).abs().amax(1) > 7).nonzero()
    first = 0 if not len(wide) else int(wide[-1]) // 2 * 2 + 2
    if first >= len(axes):
        return dict(tensors)
    even, odd = (axes[first + at :: 2].to(torch.uint8) & 15 for at in (0, 1))  # two's complement
    return {**tensors, "axes": axes[:first].clone(), "nibbles": even | odd << 4}


def of_file(tensors: Mapping[str, Tensor], heads: int, head_dim: int) -> dict[str, Tensor]:
    """What `for_file` was given, checked; axes in 16 bits, as files once had them, in steps.

    Raises:
        OptionError: a tensor is missing, of the wrong shape or dtype, one too many, or they do not fit.
    """
    shapes = {"mean": (2, heads, head_dim), "axes": (None, 2, heads, head_dim), "steps": (2, None), **_SHAPES}
    taken = dict(zip(shapes, take_tensors(_joined(tensors), shapes, _DTYPES), strict=True))
    count, pairs = len(taken["axes"]), len(taken["pairs"])
    fits = taken["steps"].shape[1] == count <= len(taken["lost"]) * GROUP and count > 0 and not count % GROUP
    fits = fits and pairs == len(taken["frequencies"]) and 2 * pairs <= head_dim
    known = ((taken["pairs"] >= 0) & (taken["pairs"] < 3)).all() and (taken["turning"][1:] > 0).all()
    if not fits or not known or not (taken["weight"] > 0).all():
        raise OptionError("the tensors of the joint codec do not fit together")
    return taken


def _joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    unpacked = dict(tensors)
    nibbles = unpacked.pop("nibbles", None)
    axes = unpacked.get("axes")
    if axes is None or axes.ndim != 4:
        return unpacked
    if "steps" not in unpacked and nibbles is None:
        unpacked["axes"], unpacked["steps"] = in_steps(axes)
    if nibbles is None:
        return unpacked
    if (axes.dtype, nibbles.dtype) == (torch.int8, torch.uint8) and nibbles.shape[1:] == axes.shape[1:]:
        values = torch.stack((nibbles & 15, nibbles >> 4), 1).flatten(0, 1).to(torch.int8)
        unpacked["axes"] = torch.cat((axes, torch.where(values > 7, values - 16, values)))
    return unpacked
