"""Where pictures come from: files, PIL images, arrays. All end as 8-bit RGB, or are refused."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from capsight.errors import OptionError
from capsight.pictures.levels import eight_bits
from capsight.pictures.rgb import to_rgb

FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"
)  # fmt: skip
"""What is read: formats that hold a picture as it is shown, and need no program but Pillow."""

MAX_RATIO = 200
"""Most times that a picture may be as long as it is wide; Qwen-VL's processors allow as much."""

_ADDRESS = re.compile(r"(^|/)(https?|ftp|file|s3|gs|hf|data):")

_FIRST_IS_THE_PICTURE = ("MPO", "ICO")
"""Formats whose further frames are other forms of the same picture: gain maps, previews, smaller icons."""


def open_image(path: Path) -> Image.Image:
    """Read a picture file as it is shown.

    The EXIF orientation is applied, transparency lies over white, colours are those of the picture's ICC
    profile in sRGB, and numbers of more than 8 bits are scaled by their range. A file has to hold one
    frame; of MPO (phone pictures with a gain map or a preview) and ICO the picture itself is read.

    Args:
        path: of the file.

    Returns:
        A PIL image of mode RGB.

    Raises:
        OptionError: it is missing, no picture or none that can be read as one; names the file.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        Image.init()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on damaged metadata and large pictures
            with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
                return _checked(image)
    except Exception as error:  # Pillow's decoders let errors of every kind through
        if _ADDRESS.search(str(path)):
            raise OptionError(
                f"cannot read the image {path!s:.80}: it is an address; save the picture as a file"
            ) from error
        raise OptionError(f"cannot read the image {path}: {_reason(error)}") from error


def picture(source: Any) -> Image.Image:
    """The same of a path, a PIL image, or an array.

    Args:
        source: path, PIL image of any mode, or array (numpy, torch) `[H, W]`, `[H, W, C]` or `[C, H, W]`
            of 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels. 8-bit and 16-bit integers and
            booleans span the range of their type; see `eight_bits` for others.

    Returns:
        A PIL image of mode RGB.

    Raises:
        OptionError: it is none of these, or cannot be read as a picture.
    """
    if isinstance(source, str | Path):
        return open_image(Path(source))
    try:
        return _checked(source if isinstance(source, Image.Image) else _from_array(source))
    except Exception as error:
        raise OptionError(f"cannot read the image handed in: {_reason(error)}") from error


def _checked(image: Image.Image) -> Image.Image:
    """The picture in RGB, where it can be one."""
    width, height = image.size
    if min(width, height) < 1:
        raise OptionError(f"it is empty ({width} x {height} pixels)")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise OptionError(
            f"it has {width} x {height} pixels, more than the {limit:,} of PIL.Image.MAX_IMAGE_PIXELS; "
            "make it smaller"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise OptionError(f"it has {width} x {height} pixels; cut it to at most {MAX_RATIO} : 1")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in _FIRST_IS_THE_PICTURE:
        raise OptionError(f"it has {frames} frames; save the frames that you mean as files of their own")
    return to_rgb(image)


def _from_array(source: Any) -> Image.Image:
    if hasattr(source, "detach") and hasattr(source, "cpu"):  # a torch tensor
        source = source.detach().cpu()
        source = source.float() if source.is_floating_point() else source  # numpy has no bfloat16
    values = np.asarray(source)
    if values.dtype.kind not in "buif":
        raise OptionError(f"{type(source).__name__} is no path, PIL image or array of numbers")
    if values.ndim == 3 and values.shape[0] in (1, 2, 3, 4) and values.shape[2] not in (1, 2, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (2, 3, 4))):
        raise OptionError(f"an array of shape {list(values.shape)} is no picture; give [H, W, 3]")
    if not values.size:
        raise OptionError(f"it is empty (an array of shape {list(values.shape)})")
    return Image.fromarray(np.ascontiguousarray(eight_bits(values)))


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or repr(error)).splitlines()[0]
