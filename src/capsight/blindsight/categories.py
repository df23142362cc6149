"""What an attention head may look at from inside an image, and the options that say so exactly.

The four categories and that heads have them are BlindSight's (arXiv 2507.09071); the exact masks are
this project's reading, since the paper's formulas were not available (see `masks.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from capsight.errors import OptionError


class Category(StrEnum):
    """What the rows of an image see in a head of this kind; text rows always see everything.

    Ordered in the code from most to least work where that matters: `SPARSE` lists all but DENSE.
    """

    DENSE = "dense"
    """All earlier keys: the model's own attention."""

    SINK = "sink"
    """Text, the sink keys of every image, its own too, and the nearest tokens of its own image."""

    INTRA_IMAGE = "intra_image"
    """Text and its own image."""

    INTRA_IMAGE_SINK = "intra_image_sink"
    """Text, its own image, and the sink keys of every image."""

    @property
    def sees_own_image(self) -> bool:
        """Whether an image row sees all of its own image."""
        return self is not Category.SINK

    @property
    def sees_sinks(self) -> bool:
        """Whether an image row sees the sink keys of other images."""
        return self is not Category.INTRA_IMAGE


SPARSE: tuple[Category, ...] = (Category.SINK, Category.INTRA_IMAGE, Category.INTRA_IMAGE_SINK)
"""The categories that leave something out."""


@dataclass(frozen=True, slots=True)
class MaskOptions:
    """Which keys are sinks, and how far a Sink head sees into its own image.

    An image here is what shares one `VisionBlock.image` number in a row: the tiles of one picture
    and the frames of one video belong together.

    Attributes:
        sink_delimiters: an image's delimiter tokens are sinks.
        sink_tokens: an image's first so many vision tokens are sinks too.
        own_window: a Sink head sees the tokens of its own image at a distance below this, in
            tokens; 1 is the token itself.

    Raises:
        OptionError: a number is out of range.
    """

    sink_delimiters: bool = True
    sink_tokens: int = 1
    own_window: int = 32

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.sink_tokens < 0:
            raise OptionError(f"sink_tokens must be 0 or more, not {self.sink_tokens}")
        if self.own_window < 1:
            raise OptionError(
                f"own_window must be 1 or more (a token that cannot see itself may see nothing), "
                f"not {self.own_window}"
            )
