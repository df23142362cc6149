"""What native decode attention reads: tokens with a piece for every row and KV head."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LEVELS = {8: 3, 4: 4}


@dataclass(frozen=True, eq=False)
class Steps:
    """How levels become numbers.

    keys = mean + size * (key_step * level + key_low), values = value_step * level + value_low; what is None
    is 1 for factors, else 0.

    Attributes:
        bits: 8 or 4, packed as `quantise` does.
        value_step: `[E, H or 1]`, of each token, in the dtype of all that are of tokens.
        value_low: likewise.
        key_step: likewise, or None.
        key_low: likewise, or None.
        size: `[groups, H, D]`, contiguous, of channels of keys, or None.
        mean: likewise.
        group: tokens that share a group, in their order; 0 if there is one for all.
    """

    bits: int
    value_step: Tensor
    value_low: Tensor
    key_step: Tensor | None = None
    key_low: Tensor | None = None
    size: Tensor | None = None
    mean: Tensor | None = None
    group: int = 0


@dataclass(frozen=True, eq=False)
class Source:
    """Tokens of which every row and KV head has a piece.

    Attributes:
        keys: `[E, H or 1, D]`, float32, bfloat16 or float16, or levels uint8 `[E, H or 1, D or ceil(D / 2)]`;
            channels lie together. With 1 in place of H, pieces are of one head each.
        values: likewise, with the same strides.
        starts: int64 `[B, H]`, contiguous, first token of a piece.
        counts: int64 `[B, H]`, contiguous, tokens of it; may be 0.
        steps: how levels become numbers; None if they are numbers.
        bias: float32, flat, added to scores; None if nothing is.
        bias_starts: int64 `[B, H]`, contiguous, where the bias of a piece starts.
        bias_stride: from there to that of the next of the C queries of a KV head; 0 if they share it.
    """

    keys: Tensor
    values: Tensor
    starts: Tensor
    counts: Tensor
    steps: Steps | None = None
    bias: Tensor | None = None
    bias_starts: Tensor | None = None
    bias_stride: int = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without addresses: a copy lies elsewhere."""
        return {name: value for name, value in self.__dict__.items() if name != "native"}

    @property
    def tensors(self) -> list[Tensor | None]:
        """All tensors, for `of`."""
        return [getattr(self, n) for n in _PARTS] + [getattr(self.steps, n, None) for n in _STEP_PARTS]

    @property
    def numbers(self) -> list[int]:
        """All that is no tensor, for `of`."""
        steps = self.steps
        return [self.bias_stride, *((0, 0) if steps is None else (steps.bits, steps.group))]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], numbers: Sequence[int]) -> Source:
        """That of `tensors`, empty where there is none, and `numbers`."""
        given: dict[str, Any] = dict(
            zip((*_PARTS, *_STEP_PARTS), (x if x.numel() else None for x in tensors), strict=True)
        )
        parts = {name: given.pop(name) for name in _PARTS}
        parts |= zip(_PARTS[:4], tensors, strict=False)  # even without a token
        given |= zip(_STEP_PARTS[:2], tensors[len(_PARTS) :], strict=False)
        stride, bits, group = numbers
        return cls(**parts, bias_stride=stride, steps=Steps(bits, **given, group=group) if bits else None)

    @property
    def address(self) -> Any:
        """Where `native` lies."""
        return ctypes.byref(self.native)

    @cached_property
    def native(self) -> NativeSource:
        """This as the native code has it; valid as long as this is."""
        keys, steps = self.keys, self.steps
        assert self.values.stride() == keys.stride()
        size, some = keys.element_size(), keys.shape[1] > 1
        made = NativeSource(
            keys=keys.data_ptr(),
            values=self.values.data_ptr(),
            token_stride=keys.stride(0) * size,
            head_stride=keys.stride(1) * size if some else 0,
            starts=self.starts.data_ptr(),
            counts=self.counts.data_ptr(),
            bias=_address(self.bias),
            bias_starts=_address(self.bias_starts),
            bias_stride=self.bias_stride,
            format=FORMATS[keys.dtype] if steps is None else _LEVELS[steps.bits],
        )
        if steps is not None:
            of_tokens = steps.value_step
            of_groups = steps.mean if steps.size is None else steps.size
            made.value_step, made.value_low = of_tokens.data_ptr(), steps.value_low.data_ptr()
            made.key_step, made.key_low = _address(steps.key_step), _address(steps.key_low)
            made.step_token_stride = of_tokens.stride(0)
            made.step_head_stride = of_tokens.stride(1) if of_tokens.shape[1] > 1 else 0
            made.step_format, made.group = FORMATS[of_tokens.dtype], steps.group
            if of_groups is not None:
                made.size, made.mean = _address(steps.size), _address(steps.mean)
                made.group_stride, made.group_format = of_groups.stride(0), FORMATS[of_groups.dtype]
        return made


@dataclass(frozen=True, eq=False)
class Sources:
    """Sources that are read together, time and again.

    Attributes:
        each: the sources.
    """

    each: tuple[Source, ...]

    def __getstate__(self) -> dict[str, Any]:
        """Without addresses: a copy lies elsewhere."""
        return {"each": self.each}

    @cached_property
    def native(self) -> ctypes.Array[NativeSource]:
        """These as native code has them; valid as long as these are."""
        return (NativeSource * len(self.each))(*(source.native for source in self.each))


_PARTS = "keys", "values", "starts", "counts", "bias", "bias_starts"
_STEP_PARTS = "value_step", "value_low", "key_step", "key_low", "size", "mean"


class NativeSource(ctypes.Structure):
    """`Source` of `decode.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("token_stride", "head_stride")),
        *((name, ctypes.c_void_p) for name in ("starts", "counts")),
        *((name, ctypes.c_void_p) for name in ("key_step", "key_low", "value_step", "value_low")),
        *((name, ctypes.c_int64) for name in ("step_token_stride", "step_head_stride")),
        *((name, ctypes.c_void_p) for name in ("size", "mean")),
        *((name, ctypes.c_int64) for name in ("group", "group_stride")),
        *((name, ctypes.c_void_p) for name in ("bias", "bias_starts")),
        ("bias_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("format", "step_format", "group_format")),
    ]


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
