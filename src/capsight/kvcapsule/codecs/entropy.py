"""Small integers in few bytes: range coding with normal distributions.

The mean magnitude of a number is a power of two: its column's times its row's. Numbers of the same magnitude
are a class, and a class has a width. All are coded beside the numbers, so data needs no table that was fitted
elsewhere. Range coding: Martin, 1979; the coder is the library `constriction`. Probabilities come of
additions, products, quotients and square roots of doubles alone, which are the same on every machine; whoever
decodes compares a checksum all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capsight.errors import CapsuleFileError, OptionError

MOST = 2**15 - 1
"""Largest magnitude that is coded."""
_CLASSES = 24
"""A column of class c > 0 has magnitudes of mean 2^(c - 9); of class 0 it is all zeros and takes nothing."""
_FINEST = 9
_ROWS, _LOWEST = 16, -6
"""A row of class c has magnitudes 2^c times as large as others; so many classes, from this one on."""
_TURN = 0.6, 1.0
"""Mean difference between the classes of neighbouring columns, and rows."""
_WIDTHS, _NARROWEST = 96, -20
"""So many widths: of width w, n is as likely as t^(n^2), t = v / (1 + v), v = 2^((w - 20) / 2)."""

Integers = NDArray[np.int32]


def encode(rows: Integers) -> bytes:
    """Code integers `[T, R]` of magnitude `MOST` at most.

    Raises:
        OptionError: the coder is not installed.
    """
    coder = _library().stream.queue.RangeEncoder()
    columns, of_rows = _classes(np.abs(rows))
    for classes, count, turn in ((columns, _CLASSES, _TURN[0]), (of_rows, _ROWS, _TURN[1])):
        coder.encode((np.diff(classes, prepend=0) % count).astype(np.int32), _differences(count, turn))
    top = _up(int(np.abs(rows).max(initial=0)))
    flat = rows.ravel()
    for kind, places in _used(_together(columns, of_rows)):
        numbers = flat[places]
        square = np.log2(max(np.square(numbers, dtype=np.float64).mean(), 1e-9))
        width = int(np.abs(_squares(top) - square).argmin())
        coder.encode(np.array([(width - _usual(kind)) % _WIDTHS], np.int32), _differences(_WIDTHS, 1.0))
        coder.encode((numbers + top).astype(np.int32), _model_of(width, top))
    return bytes(coder.get_compressed().astype("<u4").tobytes())


def decode(data: bytes, tokens: int, rank: int, top: int) -> Integers:
    """The integers `[tokens, rank]` that `encode` coded, `top` their largest magnitude.

    Raises:
        OptionError: the coder is not installed.
        CapsuleFileError: `data` is none that `encode` gave.
    """
    library, top = _library(), _up(top)
    rows = np.zeros((tokens, rank), np.int32)
    try:
        coder = library.stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
        columns = np.cumsum(coder.decode(_differences(_CLASSES, _TURN[0]), rank)) % _CLASSES
        of_rows = np.cumsum(coder.decode(_differences(_ROWS, _TURN[1]), tokens)) % _ROWS
        flat = rows.ravel()
        for kind, places in _used(_together(columns, of_rows)):
            width = int(coder.decode(_differences(_WIDTHS, 1.0), 1)[0] + _usual(kind)) % _WIDTHS
            flat[places] = coder.decode(_model_of(width, top), len(places)) - top
    except (ValueError, AssertionError) as error:
        raise CapsuleFileError(f"coded latents cannot be read ({error}); encapsulate again") from error
    return rows


def _classes(magnitudes: Integers) -> tuple[Integers, Integers]:
    """Of columns `[R]` and of rows `[T]`, counted from 0, of magnitudes `[T, R]`."""

    def nearest(means: NDArray[np.float64], lowest: int, count: int) -> Integers:
        powers = np.rint(np.log2(np.maximum(means, 2.0**lowest))).astype(np.int32) - lowest
        return powers.clip(0, count - 1)

    means = magnitudes.mean(0) if len(magnitudes) else np.zeros(magnitudes.shape[1])
    rows = nearest(magnitudes.sum(1) / max(means.sum(), 1e-9), _LOWEST, _ROWS)
    means = magnitudes.sum(0) / max((2.0 ** (rows + _LOWEST)).sum(), 1e-9)
    columns = nearest(means, 1 - _FINEST, _CLASSES - 1) + 1
    return np.where(magnitudes.any(0), columns, 0).astype(np.int32), rows


def _together(columns: Integers, rows: Integers) -> NDArray[np.uint8]:
    """The class of each number `[T, R]`."""
    both = (columns + (rows[:, None] + _LOWEST)).clip(1, _CLASSES - 1)
    return np.where(columns > 0, both, 0).astype(np.uint8)


def _used(classes: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """The classes of numbers that are coded, ascending, and where those lie, counted by row."""
    order = classes.ravel().argsort(kind="stable")
    ends = np.bincount(classes.ravel(), minlength=_CLASSES).cumsum().tolist()
    for kind in range(1, _CLASSES):
        if ends[kind - 1] < ends[kind]:
            yield kind, order[ends[kind - 1] : ends[kind]]


def check_coder() -> None:
    """Refuse to go on without the coder.

    Raises:
        OptionError: it is not installed.
    """
    _library()


@lru_cache(maxsize=512)
def _model_of(width: int, top: int) -> Any:
    """Of integers from -top to top of a width."""
    powers = _powers(width, top)
    return _model(np.concatenate((powers[:0:-1], powers)))


def _powers(width: int, top: int) -> NDArray[np.float64]:
    """t^(n^2) of a width, n from 0 to top, as products: t^(n^2) = t^((n-1)^2) t^(2n-1)."""
    half, odd = divmod(width + _NARROWEST, 2)
    variance = 2.0**half * math.sqrt(2.0) ** odd
    base = variance / (1 + variance)
    factors = np.full(top + 1, base * base)
    factors[:2] = (1, base)[: top + 1]
    factors[1:] = np.cumprod(factors[1:])
    return np.cumprod(factors)


@lru_cache
def _squares(top: int) -> NDArray[np.float64]:
    """Logarithm, to the base 2, of the mean square of integers up to top of every width."""
    n = np.arange(top + 1.0)
    squares = []
    for width in range(_WIDTHS):
        powers = _powers(width, top)
        squares.append(2 * (powers * n * n).sum() / (2 * powers.sum() - 1))
    return np.log2(np.maximum(squares, 1e-30))


def _usual(kind: int) -> int:
    """About the width of a class."""
    octave = kind - _FINEST  # of the mean magnitude
    return max(2 * octave - 2, 4 * octave + 3) - _NARROWEST


def _up(top: int) -> int:
    """A largest magnitude that many share, so that few models are made: the next power of two, less one."""
    return 2 ** top.bit_length() - 1


@lru_cache
def _differences(count: int, mean: float) -> Any:
    """Of differences between neighbouring classes, modulo their number."""
    powers = np.cumprod(np.full(count, mean / (1 + mean)))
    return _model(powers + powers[(count - np.arange(count)) % count])


def _model(weights: NDArray[np.float64]) -> Any:
    return _library().stream.model.Categorical(weights, perfect=False)


def _library() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise OptionError(
            'capsules at rest need the entropy coder `constriction`: pip install "capsight[rest]"'
        ) from error
    return constriction
