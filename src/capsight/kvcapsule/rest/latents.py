"""The latents of one image at rest: uniform steps, as wide for every coordinate, and their entropy code.

One step for all coordinates is reverse water-filling: what varies less than a step's error is left out, and
all that varies more is off by as much.
"""

from __future__ import annotations

import math
import struct
import zlib

import numpy as np
import torch
from torch import Tensor

from capsight.errors import CapsuleFileError, OptionError
from capsight.kvcapsule.codecs import entropy
from capsight.kvcapsule.codecs.levels import rate_of

DEFAULT_QUALITY = 0.98
_HEAD = struct.Struct("<IHHfI")  # tokens, coordinates, largest integer, step, checksum of the integers


def check_quality(quality: float) -> float:
    """Refuse a quality that is none.

    Raises:
        OptionError: it is not between 0 and 1.
    """
    if not isinstance(quality, int | float) or isinstance(quality, bool) or not 0 < quality < 1:
        raise OptionError(
            f"quality is the share of variance that comes back, between 0 and 1 (0.98), not {quality!r}"
        )
    return float(quality)


def code(latents: Tensor, lost: Tensor, quality: float) -> bytes:
    """Latents `[T, R]` of an image in the steps of a quality, with a checksum of their integers.

    Args:
        latents: as they are gathered.
        lost: of the codec, see `rate_of`.
        quality: share of the variance that comes back of calibration images.

    Raises:
        OptionError: they are far too large for the step, or the coder is not installed.
    """
    step, rank = rate_of(lost, quality)
    integers = (latents[:, :rank].double().cpu() / step).round()
    if not bool((integers.abs() <= entropy.MOST).all()):
        raise OptionError("the latents are not finite, or too large for this quality; use a lower one")
    rows = integers.int().numpy()
    used = np.flatnonzero(np.abs(rows).sum(0))
    rows = np.ascontiguousarray(rows[:, : int(used[-1]) + 1 if len(used) else 0])
    sizes = *rows.shape, int(np.abs(rows).max(initial=0))
    return _HEAD.pack(*sizes, step, zlib.crc32(rows.astype("<i4").tobytes())) + entropy.encode(rows)


def decode(data: bytes, tokens: int, rank: int) -> Tensor:
    """Latents float32 `[tokens, rank]` that `code` coded; those beyond what it stored are 0.

    Raises:
        CapsuleFileError: they were changed since, or are not those of so many tokens.
        OptionError: the coder is not installed.
    """
    if len(data) < _HEAD.size:
        raise CapsuleFileError("the latents of an image are truncated; encapsulate again")
    coded, stored, top, step, checksum = _HEAD.unpack_from(data)
    if coded != tokens or not 0 < step < math.inf:
        raise CapsuleFileError(f"an image has latents of {coded} tokens at rest, the prompt {tokens}")
    rows = entropy.decode(data[_HEAD.size :], tokens, stored, top)
    if zlib.crc32(rows.astype("<i4").tobytes()) != checksum:
        raise CapsuleFileError("the entropy coder gives other latents than were written; encapsulate again")
    latents = torch.zeros(tokens, rank)
    columns = min(stored, rank)
    latents[:, :columns] = torch.from_numpy(rows[:, :columns]).float() * step
    return latents
