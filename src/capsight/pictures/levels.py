"""Numbers of any type as the 256 levels of a picture."""

from __future__ import annotations

from typing import Any

import numpy as np

from capsight.errors import OptionError


def eight_bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Scale by range.

    8 and 16-bit unsigned integers and booleans span their type. Others do not say what white is: theirs
    is the least of 1 (floats only), 255, 65535 and the largest number of the type (integers only) that
    none of them exceeds. Floats that exceed 1 by less than 1 are neither for certain.

    Args:
        values: any shape, booleans, integers or floats.

    Returns:
        uint8, of the same shape. Integers of more bits keep their upper 8, as Pillow reads 16-bit colour.

    Raises:
        OptionError: numbers are negative, not finite, or, in floats, above 65535 or between 1 and 2.
    """
    dtype = values.dtype
    if dtype == np.uint8:
        return values
    if dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
    floats = dtype.kind == "f"
    if floats and not np.isfinite(values).all():
        raise OptionError("it holds NaN or infinite values")
    low, high = values.min(), values.max()
    if low < 0:
        raise OptionError(
            f"it holds negative values ({low:g}); give pixels, not what processors make of them"
        )
    if floats:
        white = next((limit for limit in (1, 255, 65535) if high <= limit), None)
        if white is None:
            raise OptionError(f"it holds floats up to {high:g}; scale them to 0-1")
        if 1 < high < 2:
            raise OptionError(
                f"it holds floats up to {high:.6g}, more than 0-1 and less than 0-255 takes; clip them to 0-1"
            )
        return np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8)
    bits = np.iinfo(dtype).bits - (dtype.kind == "i")
    used = next((size for size in sorted((8, 16, bits)) if high < 2**size), bits)
    return (values >> (used - 8) if used > 8 else values << (8 - used)).astype(np.uint8)
