"""Small integers in few bytes: range coding with one two-sided geometric distribution per column.

Range coding: Martin, 1979; the coder is the library `constriction`. Which distribution a column has is coded
beside it, so data needs no table that was fitted elsewhere. Probabilities come of additions, products and
quotients of doubles alone, which are the same on every machine; whoever decodes compares a checksum all the
same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from capsight.errors import CapsuleFileError, OptionError

MOST = 2**15 - 1
"""Largest magnitude that is coded."""
_CLASSES = 24
"""A column of class c > 0 has magnitudes of mean 2^(c - 9); of class 0 it is all zeros and takes nothing."""
_FINEST = 9
_TURN = 0.6
"""Mean difference between the classes of neighbouring columns."""

Integers = NDArray[np.int32]


def encode(columns: Integers) -> bytes:
    """Code integers `[T, R]` of magnitude `MOST` at most.

    Raises:
        OptionError: the coder is not installed.
    """
    coder = _library().stream.queue.RangeEncoder()
    means = np.abs(columns).mean(0)
    classes = np.rint(np.log2(np.maximum(means, 2.0 ** (1 - _FINEST)))).astype(np.int32) + _FINEST
    classes = np.where(means > 0, classes.clip(1, _CLASSES - 1), 0).astype(np.int32)
    coder.encode((np.diff(classes, prepend=0) % _CLASSES).astype(np.int32), _differences())
    top = int(np.abs(columns).max(initial=0))
    for kind in np.unique(classes[classes > 0]).tolist():
        symbols = columns[:, classes == kind].T.ravel() + top
        coder.encode(np.ascontiguousarray(symbols, dtype=np.int32), _column_model(kind, top))
    return bytes(coder.get_compressed().astype("<u4").tobytes())


def decode(data: bytes, tokens: int, rank: int, top: int) -> Integers:
    """The integers `[tokens, rank]` that `encode` coded, `top` their largest magnitude.

    Raises:
        OptionError: the coder is not installed.
        CapsuleFileError: `data` is none that `encode` gave.
    """
    library = _library()
    columns = np.zeros((tokens, rank), np.int32)
    try:
        coder = library.stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
        classes = np.cumsum(coder.decode(_differences(), rank)) % _CLASSES
        for kind in np.unique(classes[classes > 0]).tolist():
            of_kind = classes == kind
            symbols = coder.decode(_column_model(kind, top), int(of_kind.sum()) * tokens)
            columns[:, of_kind] = symbols.reshape(-1, tokens).T - top
    except (ValueError, AssertionError) as error:
        raise CapsuleFileError(f"coded latents cannot be read ({error}); encapsulate again") from error
    return columns


def check_coder() -> None:
    """Refuse to go on without the coder.

    Raises:
        OptionError: it is not installed.
    """
    _library()


def _column_model(kind: int, top: int) -> Any:
    """Of integers from -top to top whose magnitudes have the mean of a class."""
    mean = 2.0 ** (kind - _FINEST)
    powers = np.cumprod(np.full(top + 1, mean / (1 + mean)))
    return _model(np.concatenate((powers[:0:-1] / 2, powers[:1], powers[1:] / 2)))


def _differences() -> Any:
    """Of differences between classes, modulo their number."""
    powers = np.cumprod(np.full(_CLASSES, _TURN / (1 + _TURN)))
    return _model(powers + powers[(_CLASSES - np.arange(_CLASSES)) % _CLASSES])


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
