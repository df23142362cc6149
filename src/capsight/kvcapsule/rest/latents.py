"""The latents of one image at rest: uniform steps, as wide for every coordinate, and their entropy code.

One step for all coordinates is reverse water-filling: what varies less than a step's error is left out, and
all that varies more is off by as much. What is near zero is rounded to it a little further than to other
steps, which costs less error than it saves bytes. Neighbouring tokens may be coded by cosines (`spatial`).
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from hashlib import blake2b
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from capsight.errors import CapsuleFileError, OptionError
from capsight.kvcapsule.codecs import entropy
from capsight.kvcapsule.codecs.levels import rate_of
from capsight.kvcapsule.rest.spatial import transformed
from capsight.layout import Grid

DEFAULT_QUALITY = 0.98
_HEAD = struct.Struct("<IHHfIH")  # tokens, coordinates, largest integer, step, checksum, `_GRID`s that follow
_GRID = struct.Struct("<HIHH")  # blocks one after another of (t, h, w) tokens, whose cosines are coded
_DIGEST = 8
_DEAD = 0.2
"""Steps by which rounding prefers the smaller magnitude."""
_FINER = 0.86
"""Factor of steps by which they are then as far off as if rounded to the nearest (three judges)."""


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


def code(latents: Tensor, lost: Tensor, quality: float, grids: Sequence[Grid] = ()) -> bytes:
    """Latents `[T, R]` of an image in the steps of a quality, with a checksum before them.

    Args:
        latents: as they are gathered.
        lost: of the codec, see `rate_of`.
        quality: share of the variance that comes back of calibration images.
        grids: (t, h, w) of the image's blocks; none where tokens have no places.

    Raises:
        OptionError: they are far too large for the step, or the coder is not installed.
    """
    step, rank = rate_of(lost, quality)
    step *= _FINER
    plain = latents[:, :rank].double().cpu()
    pieces = [_coded(plain, step, ())]
    if math.prod(plain.shape) and grids:
        pieces.append(_coded(transformed(plain, grids), step, grids))
    body = min(pieces, key=len)
    return blake2b(body, digest_size=_DIGEST).digest() + body


def _coded(numbers: Tensor, step: float, grids: Sequence[Grid]) -> bytes:
    """Float64 `[T, R]` in steps, as it is written."""
    whole = numbers.sign() * (numbers.abs() / step + 0.5 - _DEAD).floor()
    if not bool((whole.abs() <= entropy.MOST).all()):
        raise OptionError("the latents are not finite, or too large for this quality; use a lower one")
    rows = whole.int().numpy()
    used = np.flatnonzero(np.abs(rows).sum(0))
    rows = np.ascontiguousarray(rows[:, : int(used[-1]) + 1 if len(used) else 0])
    runs = [(len(list(run)), *grid) for grid, run in groupby(grids)]
    sizes = *rows.shape, int(np.abs(rows).max(initial=0))
    head = _HEAD.pack(*sizes, step, zlib.crc32(rows.astype("<i4").tobytes()), len(runs))
    return head + b"".join(_GRID.pack(*run) for run in runs) + entropy.encode(rows)


def decode(data: bytes, tokens: int, rank: int) -> Tensor:
    """Latents float32 `[tokens, rank]` that `code` coded; those beyond what it stored are 0.

    Raises:
        CapsuleFileError: they were changed since, or are not those of so many tokens.
        OptionError: the coder is not installed.
    """
    digest, body = data[:_DIGEST], data[_DIGEST:]
    if blake2b(body, digest_size=_DIGEST).digest() != digest or len(body) < _HEAD.size:
        raise CapsuleFileError("the latents of an image were changed since they were written: wrong checksum")
    coded, stored, top, step, checksum, runs = _HEAD.unpack_from(body)
    start = _HEAD.size + runs * _GRID.size
    named = body[_HEAD.size : start]
    if len(named) != runs * _GRID.size:
        raise CapsuleFileError("the latents of an image end too early; encapsulate again")
    grids = [(t, h, w) for count, t, h, w in _GRID.iter_unpack(named) for _ in range(count)]
    if coded != tokens or not 0 < step < math.inf or (grids and sum(map(math.prod, grids)) != tokens):
        raise CapsuleFileError(f"an image has latents of {coded} tokens at rest, the prompt {tokens}")
    rows = entropy.decode(body[start:], tokens, stored, top)
    if zlib.crc32(rows.astype("<i4").tobytes()) != checksum:
        raise CapsuleFileError("the entropy coder gives other latents than were written; encapsulate again")
    whole = torch.from_numpy(rows[:, : min(stored, rank)]).double()
    numbers = (whole + whole.sign() * (_DEAD / 2)) * step
    latents = torch.zeros(tokens, rank)
    latents[:, : numbers.shape[1]] = transformed(numbers, grids, back=True) if grids else numbers
    return latents
