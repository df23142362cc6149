"""What a layer of the joint codec learnt, as files have it, and as files for images at rest do.

Memory has axes in 8 bits. Files for images at rest have them in as few as the images' quality needs, entropy
coded.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from capsight.errors import OptionError
from capsight.kvcapsule.codecs import entropy
from capsight.kvcapsule.codecs.base import take_tensors
from capsight.kvcapsule.codecs.joint_axes import in_steps
from capsight.kvcapsule.codecs.joint_coarse import is_coarse
from capsight.kvcapsule.codecs.levels import GROUP

_SHAPES: dict[str, tuple[int | None, ...]] = {
    "weight": (2,),
    "lost": (None, 4),
    "typical": (1,),
    "frequencies": (None,),
    "pairs": (None,),
    "turning": (3,),
}
_CODED = struct.Struct("<IB")  # checksum of axes, their largest integer
_DTYPES = {"axes": torch.int8, "lost": torch.float64, "frequencies": torch.float64, "pairs": torch.int64}


def for_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With axes entropy coded, as "rounded": uint8 `[bytes]`, where some are coarse.

    Steps that are alike in keys and values but for their weight are there as "scale": bfloat16 `[K]`.
    """
    held, axes = dict(tensors), tensors["axes"].contiguous().cpu()
    if not is_coarse(axes):
        return held
    rows = axes.flatten(1).int().numpy()
    head = _CODED.pack(zlib.crc32(axes.numpy().tobytes()), int(abs(rows).max()))
    held["rounded"] = torch.frombuffer(bytearray(head + entropy.encode(rows)), dtype=torch.uint8)
    weight = held["weight"][:, None]
    scale = (held["steps"][0] * weight[0]).bfloat16()
    if torch.equal(scale.float() / weight, held["steps"]):
        held["scale"] = scale
        del held["steps"]
    del held["axes"]
    return held


def of_file(tensors: Mapping[str, Tensor], heads: int, head_dim: int) -> dict[str, Tensor]:
    """What `for_file` was given, checked; axes in 16 bits, as files once had them, in steps.

    Raises:
        OptionError: a tensor is missing, of the wrong shape or dtype, one too many, or they do not fit.
    """
    shapes = {"mean": (2, heads, head_dim), "axes": (None, 2, heads, head_dim), "steps": (2, None), **_SHAPES}
    opened = _opened(tensors, (2, heads, head_dim))
    taken = dict(zip(shapes, take_tensors(opened, shapes, _DTYPES), strict=True))
    count, pairs = len(taken["axes"]), len(taken["pairs"])
    fits = taken["steps"].shape[1] == count <= len(taken["lost"]) * GROUP and count > 0 and not count % GROUP
    fits = fits and pairs == len(taken["frequencies"]) and 2 * pairs <= head_dim
    known = ((taken["pairs"] >= 0) & (taken["pairs"] < 3)).all() and (taken["turning"][1:] > 0).all()
    if not fits or not known or not (taken["weight"] > 0).all():
        raise OptionError("the tensors of the joint codec do not fit together")
    return taken


def _opened(tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """With axes in steps; "rounded" ones `[K, *shape]`."""
    opened = dict(tensors)
    if "coded" in opened:
        raise OptionError("its axes are coded as an earlier capsight did; make the file again with for_rest")
    scale, weight = opened.get("scale"), opened.get("weight")
    if scale is not None and weight is not None and "steps" not in opened:
        known = scale.ndim == 1 and scale.dtype == torch.bfloat16 and weight.shape == (2,)
        if known and weight.dtype == torch.float32:
            opened["steps"] = opened.pop("scale").float() / weight[:, None]
    coded, steps = opened.pop("rounded", None), opened.get("steps")
    if coded is not None and steps is not None and steps.ndim == 2 and coded.dtype == torch.uint8:
        data = coded.numpy().tobytes().ljust(_CODED.size)
        checksum, top = _CODED.unpack_from(data)
        rows = entropy.decode(data[_CODED.size :], steps.shape[1], math.prod(shape), top).astype("int8")
        if zlib.crc32(rows.tobytes()) != checksum:
            raise OptionError("the entropy coder gives other axes than were written; make the file again")
        opened["axes"] = torch.from_numpy(rows).unflatten(1, shape)
    axes = opened.get("axes")
    if axes is not None and axes.ndim == 4 and steps is None:
        opened["axes"], opened["steps"] = in_steps(axes)
    return opened
