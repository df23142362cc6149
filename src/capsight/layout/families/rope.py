"""How families number their tokens for rotary embeddings: one number a token, or three (M-RoPE)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from capsight.layout.row_layout import RowLayout, VisionBlock


class AnyConfig:
    """An adapter that takes every model of its types."""

    def refusal(self, config: Any) -> str | None:
        """See `Family.refusal`."""
        return None


class PlainRope(AnyConfig):
    """One position a token, whatever it shows."""

    position_rows: int = 1

    def row_positions(self, row: RowLayout, config: Any) -> NDArray[np.int64]:
        """See `Family.row_positions`."""
        return np.tile(np.maximum(np.arange(row.length) - row.pad_left, 0), (3, 1))


class MRope(AnyConfig):
    """Multimodal RoPE (Qwen2-VL, arXiv 2409.12191): vision tokens by time, height and width.

    A vision block starts at the position that a text token would have there, and the text after it
    goes on behind its longer side, however long the block lasts.
    """

    position_rows: int = 3

    def frame_step(self, block: VisionBlock, config: Any) -> float:
        """Positions from one t of a block to the next."""
        return 1.0

    def row_positions(self, row: RowLayout, config: Any) -> NDArray[np.int64]:
        """See `Family.row_positions`."""
        positions = np.zeros((3, row.length), np.int64)
        token, position = row.pad_left, 0
        for block in row.blocks:
            text = block.start - token
            positions[:, token : block.start] = position + np.arange(text)
            position += text
            t, h, w = np.indices(block.grid)
            # In float32, as the models have it: a time between two integers falls to the same side.
            t = (t.astype(np.float32) * np.float32(self.frame_step(block, config))).astype(np.int64)
            positions[:, block.start : block.end] = position + np.stack((t, h, w)).reshape(3, -1)
            token, position = block.end, position + max(block.grid[1:])
        positions[:, token:] = position + np.arange(row.length - token)
        return positions
