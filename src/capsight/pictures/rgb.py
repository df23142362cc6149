"""A PIL image of any mode as 8-bit RGB, as a viewer shows it."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps

from capsight.errors import OptionError
from capsight.pictures.colour import managed
from capsight.pictures.levels import eight_bits

_WIDE = ("I", "F")
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2
_FEW_BITS = {"L;2": 85, "L;4": 17}
"""How Pillow names grey of few bits, and what it multiplies them by."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn it upright, scale to 8 bits, take colours to sRGB, and lay it over white.

    Raises:
        OptionError: numbers of more than 8 bits have no range that could be told.
        Exception: whatever Pillow raises for a damaged file.
    """
    tiles = getattr(image, "tile", None)
    stored = str(tiles[0].args) if tiles else ""  # gone after load
    image.load()
    colour, alpha = _parts(_clear_colour(_upright(image), stored), image)
    shown = managed(colour, image.info)
    if alpha is None:
        return shown
    return Image.composite(shown, Image.new("RGB", shown.size, "white"), alpha)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # metadata that cannot be read say nothing; viewers show the picture as it lies
        return image


def _clear_colour(image: Image.Image, stored: str) -> Image.Image:
    """The image with the colour of a PNG that is transparent in the numbers that Pillow gives its pixels.

    Raises:
        OptionError: of 16 bits Pillow keeps 8, among which that colour cannot be told from its neighbours.
    """
    clear = image.info.get("transparency")
    if stored in _FEW_BITS and isinstance(clear, int):
        image.info["transparency"] = clear * _FEW_BITS[stored]
    if stored.startswith("RGB;16") and clear is not None:
        raise OptionError("it has 16 bits a channel and a colour that is transparent; save it with 8 bits")
    return image


def _parts(image: Image.Image, source: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours, 8 bits each, and the opacity if there is any (mode L); `source` knows its format."""
    if image.mode.startswith(_WIDE):
        return _wide(image, source)
    if image.mode == "L" and _tag(getattr(source, "tag_v2", {}), _SAMPLE_FORMAT) == _SIGNED:
        return Image.fromarray(eight_bits(np.asarray(image).view(np.int8))), None
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        colour = image.getchannel("L") if image.mode == "LA" else rgba.convert("RGB")
        return colour, rgba.getchannel("A")
    if image.mode in ("P", "1"):
        image = image.convert("RGB")
    return image, None


def _tag(tags: Any, tag: int) -> Any:
    """The first number of a TIFF tag; None where there is none."""
    value = tags.get(tag)
    return value[0] if isinstance(value, tuple) else value


def _wide(image: Image.Image, source: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    values: np.ndarray[Any, Any] = np.asarray(image)
    tags = getattr(source, "tag_v2", {})
    if image.mode == "I":
        if source.format == "PPM":  # Pillow scales these to 16 bits
            values = values.astype(np.uint16)
        elif _tag(tags, _SAMPLE_FORMAT) == _UNSIGNED:
            values = values.view(np.uint32)
        elif _tag(tags, _BITS) == 16:
            values = values.astype(np.int16)
    elif values.dtype.kind == "u":
        values = values.astype(np.uint16)  # in this machine's byte order
        if _tag(tags, _BITS) == 12:
            values = values << 4
    levels = eight_bits(values)
    if _tag(tags, _PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow turns those of 8 bits only
        levels = 255 - levels
    colour, clear = Image.fromarray(levels), image.info.get("transparency")
    return colour, None if clear is None else Image.fromarray(eight_bits(values != clear))
