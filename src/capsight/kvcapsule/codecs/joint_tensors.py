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
_ADDED = 0.03  # error by the steps of axes, of that of images
_CODED = struct.Struct("<IB")  # checksum of axes, their largest integer
_FEW = 63  # largest integer of an axis that is not as fine as it can be
_DTYPES = {"axes": torch.int8, "lost": torch.float64, "frequencies": torch.float64, "pairs": torch.int64}


def trimmed(tensors: Mapping[str, Tensor], rank: int, loses: float) -> dict[str, Tensor]:
    """With no more than the first axes, in steps that hardly add to what images lose.

    A step moves a coordinate by what the rest of a latent has in its direction, and what is rebuilt of a
    coordinate by its size. Reverse water-filling: steps grow with the root of the two variances' inverse.

    Args:
        tensors: the buffers of a codec, all axes.
        rank: how many stay.
        loses: share of the variance that images lose by their quality.
    """
    axes, lost = numbers(tensors["axes"][:rank], tensors["steps"][:, :rank], torch.float32), tensors["lost"]
    numbers_of_a_token = axes[0].numel() * int(tensors["turning"][2])
    share = lost[:, 0].repeat_interleave(GROUP)[:rank] / GROUP / lost[:, 0].sum()  # of each coordinate
    steps = (12 * _ADDED * loses / rank / (1 + numbers_of_a_token * share)).sqrt()  # of U
    integers, narrow = in_steps(axes, least=(steps / tensors["weight"][:, None]).float())
    return {**tensors, "axes": integers, "steps": narrow}


def for_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With axes entropy coded, as "coded": uint8 `[bytes]`, where some are coarse."""
    axes = tensors["axes"].contiguous().cpu()
    rows = axes.flatten(1).int().numpy()
    largest = abs(rows).max(1, initial=0)
    if not ((largest > 0) & (largest <= _FEW)).any():
        return dict(tensors)
    head = _CODED.pack(zlib.crc32(axes.numpy().tobytes()), int(abs(rows).max()))
    coded = torch.frombuffer(bytearray(head + entropy.encode(rows)), dtype=torch.uint8)
    return {**{name: x for name, x in tensors.items() if name != "axes"}, "coded": coded}


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
    """With axes in steps; "coded" ones `[K, *shape]`."""
    opened = dict(tensors)
    coded, steps = opened.pop("coded", None), opened.get("steps")
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
