"""A PIL image of any mode as 8-bit RGB, as a viewer shows it."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps

from capsight.pictures.colour import managed
from capsight.pictures.levels import eight_bits

_WIDE = ("I", "F")
_SAMPLE_FORMAT, _UNSIGNED = 339, 1  # TIFF tag


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn it upright, scale to 8 bits, take colours to sRGB, and lay it over white.

    Raises:
        OptionError: numbers of more than 8 bits have no range that could be told.
        Exception: whatever Pillow raises for a damaged file.
    """
    image.load()
    colour, alpha = _parts(_upright(image), image)
    shown = managed(colour, image.info)
    if alpha is None:
        return shown
    return Image.composite(shown, Image.new("RGB", shown.size, "white"), alpha)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # metadata that cannot be read say nothing; viewers show the picture as it lies
        return image


def _parts(image: Image.Image, source: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours, 8 bits each, and the opacity if there is any (mode L); `source` knows its format."""
    if image.mode.startswith(_WIDE):
        return _wide(image, source)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        colour = image.getchannel("L") if image.mode == "LA" else rgba.convert("RGB")
        return colour, rgba.getchannel("A")
    if image.mode in ("P", "1"):
        image = image.convert("RGB")
    return image, None


def _wide(image: Image.Image, source: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    values: np.ndarray[Any, Any] = np.asarray(image)
    if image.mode == "I":
        if source.format == "PPM":  # Pillow scales these to 16 bits
            values = values.astype(np.uint16)
        elif getattr(source, "tag_v2", {}).get(_SAMPLE_FORMAT, (None,))[0] == _UNSIGNED:
            values = values.view(np.uint32)
    elif values.dtype.kind == "u":
        values = values.astype(np.uint16)  # in this machine's byte order
    colour, clear = Image.fromarray(eight_bits(values)), image.info.get("transparency")
    return colour, None if clear is None else Image.fromarray(eight_bits(values != clear))
