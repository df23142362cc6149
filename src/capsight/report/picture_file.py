"""A PNG of `capsight attention`, read and checked."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from capsight.blindsight.draw import ATTENTION_TITLE
from capsight.errors import CapsuleFileError


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of what chosen heads attend to.

    Attributes:
        png: the file.
        heads: such as "layer 3, head 5 (intra_image)".
        width: in pixels.
        height: in pixels.
    """

    png: bytes
    heads: tuple[str, ...]
    width: int
    height: int

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return f"data:image/png;base64,{b64encode(self.png).decode('ascii')}"


def read_picture(path: Path) -> Picture:
    """Read a file.

    Raises:
        CapsuleFileError: it cannot be read, or `capsight attention` did not write it.
    """
    try:
        png = path.read_bytes()
        with Image.open(BytesIO(png), formats=["PNG"]) as image:
            image.load()
            text = dict(image.info)
            width, height = image.size
    except UnidentifiedImageError as error:
        raise CapsuleFileError(f"{path} is no PNG; write it again with `capsight attention`") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CapsuleFileError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    heads = str(text.get("Description", ""))
    if text.get("Title") != ATTENTION_TITLE or not heads:
        raise CapsuleFileError(f"{path} is no picture of `capsight attention`; write it again with that")
    return Picture(png, tuple(heads.split("; ")), width, height)
