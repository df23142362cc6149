"""Colours as numbers of sRGB, by a picture's ICC profile or gamma."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from itertools import product
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_MODES = {"RGB": ("RGB", "L"), "GRAY": ("L",), "CMYK": ("CMYK",), "Lab": ("LAB",)}
"""Colour space of a profile -> modes of the pictures that it can describe, the one it reads first."""

_ROUNDING = 2
"""Levels that a profile of sRGB itself may seem to move a colour by."""

_DISPLAY_GAMMA = 2.2


def managed(image: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    """The picture in sRGB.

    Args:
        image: 8 bits a channel.
        info: what the file says of it: `icc_profile`, or `gamma` without `srgb` (PNG). A profile that is
            damaged or for other channels is passed over, as viewers do.

    Returns:
        Mode RGB. A profile that moves no colour, such as that of sRGB, changes nothing.
    """
    profile = info.get("icc_profile")
    conversion = _transform(bytes(profile)) if profile else None
    if conversion is not None and image.mode in _MODES[conversion[1]]:
        transform, space = conversion
        return image.convert("RGB") if transform is None else _applied(transform, image, _MODES[space][0])
    if image.mode == "LAB":
        lab = ImageCms.buildTransform(ImageCms.createProfile("LAB"), _srgb(), "LAB", "RGB")
        return _applied(lab, image, "LAB")
    image = image.convert("RGB")
    gamma = info.get("gamma") if "srgb" not in info else None
    if not gamma or abs(exponent := 1 / (gamma * _DISPLAY_GAMMA) - 1) < 0.05:
        return image
    levels = [round(255 * (level / 255) ** (exponent + 1)) for level in range(256)]
    return image.point(levels * 3)


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image, mode: str) -> Image.Image:
    return transform.apply(image if image.mode == mode else image.convert(mode))


@lru_cache(maxsize=16)
def _transform(profile: bytes) -> tuple[ImageCms.ImageCmsTransform | None, str] | None:
    """From a profile to sRGB, None where they are the same, and its colour space; None for no profile."""
    try:
        source = ImageCms.getOpenProfile(BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space not in _MODES:
            return None
        mode, intent = _MODES[space][0], ImageCms.Intent(ImageCms.getDefaultIntent(source))
        transform = ImageCms.buildTransform(source, _srgb(), mode, "RGB", intent)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return (None if _moves_nothing(transform, mode) else transform), space


def _moves_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    if mode not in ("RGB", "L"):
        return False
    steps = range(0, 256, 17)
    colours = np.array(list(product(steps, repeat=3)) if mode == "RGB" else [steps], dtype=np.uint8)
    image = Image.fromarray(colours[None] if mode == "RGB" else colours)
    before, after = (np.asarray(x.convert("RGB"), dtype=int) for x in (image, transform.apply(image)))
    return bool(abs(after - before).max() <= _ROUNDING)


def _srgb() -> ImageCms.core.CmsProfile:
    return ImageCms.createProfile("sRGB")
