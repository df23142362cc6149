"""Latents in 8, 4 or 2 bits: groups of coordinates with one scale each, and which group gets which."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from capsight.errors import OptionError
from capsight.execution import own_precision
from capsight.kvcapsule.attention import native
from capsight.kvcapsule.attention.native import supports

GROUP = 32
"""Coordinates that share a scale."""
BITS = (8, 4, 2)
"""Bits of a stored coordinate, first groups first; what follows is not stored."""
_SCALE = torch.float16
#: Points of two bits in standard deviations: the best four of a normal distribution (Max, 1960).
POINTS = _INNER, _OUTER = 0.4528, 1.5104


@dataclass(frozen=True, slots=True)
class Levels:
    """How many leading coordinates of a latent are stored in 8, then 4, then 2 bits; multiples of `GROUP`."""

    eight: int
    four: int
    two: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """Coordinates in 8, 4 and 2 bits."""
        return self.eight, self.four, self.two

    @property
    def rank(self) -> int:
        """Coordinates that are stored (R)."""
        return self.eight + self.four + self.two

    @property
    def nbytes(self) -> int:
        """Bytes of a token, scales included."""
        return self.eight + self.four // 2 + self.two // 4 + self.rank // GROUP * _SCALE.itemsize

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """(bits, coordinates) of each part that is not empty."""
        return tuple((b, n) for b, n in zip(BITS, self.counts, strict=True) if n)


def pack(latents: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Store latents `[T, >= R]`.

    Returns:
        Codes uint8 `[T, C]` and scales float16 `[T, R / GROUP]`.
    """
    if supports(latents) and latents.dtype == torch.float32 and latents.stride(1) == 1:
        return native.pack(latents, levels.counts, GROUP, (_INNER + _OUTER) / 2)
    codes, scales, first = [], [], 0
    for bits, count in levels.parts:
        groups = latents[:, first : first + count].float().unflatten(1, (-1, GROUP))  # [T, G, GROUP]
        first += count
        if bits == 2:
            scale = (groups.square().mean(-1, keepdim=True).sqrt()).to(_SCALE)
            unit = groups / scale.float().clamp_min(1e-30)
            code = (unit >= 0).to(torch.uint8) * 2 + (unit.abs() > (_INNER + _OUTER) / 2).to(torch.uint8)
        else:
            top = 2 ** (bits - 1) - 1
            scale = (groups.abs().amax(-1, keepdim=True) / top).to(_SCALE)
            unit = groups / scale.float().clamp_min(1e-30)
            code = (unit.round().clamp(-top, top) + top).to(torch.uint8)
        codes.append(_squeeze(code.flatten(1), bits))
        scales.append(scale[..., 0])
    with own_precision(latents.device):  # on a CPU autocast has no float16 to put side by side
        return torch.cat(codes, 1), torch.cat(scales, 1)


def unpack(codes: Tensor, scales: Tensor, levels: Levels, dtype: torch.dtype) -> Tensor:
    """Latents `[T, R]` of what `pack` gave."""
    out = torch.empty(len(codes), levels.rank, dtype=dtype, device=codes.device)
    first = column = 0
    for bits, count in levels.parts:
        width = count * bits // 8
        code = _spread(codes[:, column : column + width], bits)
        column += width
        if bits == 2:
            points = torch.tensor((-_INNER, -_OUTER, _INNER, _OUTER), dtype=dtype, device=codes.device)
            unit = points[code.long()]
        else:
            unit = code.to(dtype) - (2 ** (bits - 1) - 1)
        scale = scales[:, first // GROUP : (first + count) // GROUP, None].to(dtype)
        torch.mul(
            unit.unflatten(1, (-1, GROUP)), scale, out=out[:, first : first + count].unflatten(1, (-1, GROUP))
        )
        first += count
    return out


def distortions(latents: Tensor) -> Tensor:
    """What each group of coordinates of latents `[T, K]` loses by its bits.

    Returns:
        float64 `[K / GROUP, 4]`, mean squared error of a group over the tokens in 0, 2, 4 and 8 bits.
    """
    groups = latents.shape[1] // GROUP
    lost = [latents.double().square().mean(0)]
    for bits in reversed(BITS):
        levels = Levels(*(groups * GROUP * (bits == b) for b in BITS))
        error = unpack(*pack(latents, levels), levels, torch.float32) - latents
        lost.append(error.double().square().mean(0))
    return torch.stack(lost, 1).unflatten(0, (groups, GROUP)).sum(1)


def share_bits(lost: Tensor, nbytes: float, floor: float = 0.0) -> Levels:
    """Bits of each group for at most `nbytes` a token: reverse water-filling over measured losses.

    The step that removes most error for its bytes is taken first. Groups come most variance first, and so
    do their bits.

    Args:
        lost: of `distortions`.
        nbytes: bytes that a token may take.
        floor: error of all groups together below which nothing more is spent.

    Raises:
        OptionError: not even one group in two bits fits.
    """
    price = [0.0] + [GROUP * bits / 8 + _SCALE.itemsize for bits in reversed(BITS)]
    table = lost.tolist()
    state, left, error = [0] * len(table), float(nbytes), float(lost[:, 0].sum())

    def step(group: int) -> tuple[float, int, int]:
        now, row = state[group], table[group]
        gains = [
            ((row[now] - row[j]) / (price[j] - price[now]), group, j) for j in range(now + 1, len(price))
        ]
        gain, _, to = max(gains, default=(0.0, group, now))
        return -gain, group, to

    heap = [step(group) for group in range(len(table))]
    heapq.heapify(heap)
    while heap and error > floor:
        gain, group, to = heapq.heappop(heap)
        cost = price[to] - price[state[group]]
        if gain >= 0:
            continue
        if cost > left:
            if to > state[group] + 1 and price[state[group] + 1] - price[state[group]] <= left:
                to, cost = state[group] + 1, price[state[group] + 1] - price[state[group]]
            else:
                continue
        error -= table[group][state[group]] - table[group][to]
        left -= cost
        state[group] = to
        heapq.heappush(heap, step(group))
    counts = [GROUP * sum(s == at for s in state) for at in (3, 2, 1)]
    if not any(counts):
        raise OptionError(f"{nbytes:.0f} bytes a token hold no latent; use a larger retained fraction")
    return Levels(*counts)


def rate_of(lost: Tensor, quality: float) -> tuple[float, int]:
    """The step, alike for all coordinates, at which calibration images keep a share of the variance.

    Args:
        lost: of `distortions`; its first column is the variance of each group.
        quality: that share, in (0, 1).

    Returns:
        It, and how many coordinates are coded: the first ones, all groups that vary a quarter as much as its
        error. The variance of a group is an average: some of its coordinates vary more than the error.
    """
    variance = (lost[:, 0] / GROUP).tolist()  # of a coordinate
    level = left = (1 - quality) * math.fsum(variance)
    for at, least in enumerate(sorted(variance)):  # water-filling: sum of min(variance, level) = left
        level = left / (len(variance) - at)
        if level <= least:
            break
        left -= least
    return math.sqrt(12 * level), GROUP * max(sum(own > level / 4 for own in variance), 1)


def _squeeze(code: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[T, n]` below 2^bits, 8 / bits of them in a byte."""
    if bits == 8:
        return code
    each = 8 // bits
    packed = code[:, ::each].clone()
    for place in range(1, each):
        packed |= code[:, place::each] << bits * place
    return packed


def _spread(packed: Tensor, bits: int) -> Tensor:
    """What `_squeeze` packed."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(1)
