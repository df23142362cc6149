"""One reader of pictures for every command and harness: 8-bit RGB, as the picture is shown."""

from capsight.pictures.source import open_image, picture

__all__ = ["open_image", "picture"]
