"""`Calibration`: what one pass over calibration prompts leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field

from capsight.kvcapsule.calibration.block_sample import BlockSample
from capsight.kvcapsule.calibration.token_sample import TokenSample
from capsight.kvcapsule.calibration.vision_attention import VisionAttention
from capsight.kvcapsule.codecs.moments import LayerMoments

Moments = dict[int, LayerMoments]
"""Second moments by layer index."""


@dataclass(slots=True)
class Calibration:
    """What one pass over calibration prompts leaves behind.

    Attributes:
        moments: second moments of the image blocks, for every full-attention layer.
        sample: a few of the blocks.
        attention: what each layer pays to vision tokens.
        tokens: single tokens with what all layers hold of them.
    """

    moments: Moments = field(default_factory=dict)
    sample: BlockSample = field(default_factory=BlockSample)
    attention: VisionAttention = field(default_factory=VisionAttention)
    tokens: TokenSample = field(default_factory=TokenSample)

    def join(self, other: Calibration) -> None:
        """Add what another process has seen of other calibration samples.

        Raises:
            CalibrationError: the two are of different shapes.
        """
        for index, layer in other.moments.items():
            self.moments.setdefault(index, LayerMoments(*layer.shape)).merge(layer)
        self.sample.join(other.sample)
        self.attention.join(other.attention)
        self.tokens.join(other.tokens)
