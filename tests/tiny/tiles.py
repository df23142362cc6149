"""Stand-ins for image processors that need torchvision: pictures cut into square tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature


class Tiles:
    """Cuts each picture into as many tiles as its sides hold; several are followed by the whole, scaled.

    Attributes:
        side: of a tile, in pixels; sides of pictures are multiples of it.
    """

    def __init__(self, side: int) -> None:
        self.side = side

    def fetch_images(self, images: Any) -> Any:
        return images

    def grid(self, picture: Image.Image) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return max(picture.height // self.side, 1), max(picture.width // self.side, 1)

    def cut(self, picture: Image.Image, whole: tuple[int, int]) -> list[torch.Tensor]:
        """Tiles and, where there are several, the picture scaled to `whole` (width, height): `[3, H, W]`."""
        rows, columns, side = *self.grid(picture), self.side
        found = [
            picture.crop((c * side, r * side, (c + 1) * side, (r + 1) * side))
            for r in range(rows)
            for c in range(columns)
        ]
        found += [picture.resize(whole)] if len(found) > 1 else []
        return [torch.from_numpy(np.asarray(p) / 127.5 - 1).float().permute(2, 0, 1) for p in found]


class StackedTiles(Tiles):
    """As Command A Vision's: all tiles of all pictures in one stack."""

    model_input_names = ("pixel_values", "num_patches")

    def __init__(self, side: int, patch_size: int) -> None:
        super().__init__(side)
        self.patch_size = patch_size  # tokens along a tile, whatever the name says

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        tiles = [self.cut(p, (self.side, self.side)) for p in _flat(images)]
        stack = torch.stack([tile for own in tiles for tile in own])
        return BatchFeature({"pixel_values": stack, "num_patches": [len(own) for own in tiles]})


class PatchedTiles(Tiles):
    """As LFM2-VL's: the patches of each tile, padded to as many as any may have."""

    model_input_names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    use_thumbnail = True

    def __init__(self, side: int, patch: int, factor: int) -> None:
        super().__init__(side)
        self.tile_size, self.encoder_patch_size, self.downsample_factor = side, patch, factor

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        pictures, half = _flat(images), self.side // 2
        tiles = [tile for p in pictures for tile in self.cut(p, (self.side, half))]
        shapes = [[n // self.encoder_patch_size for n in tile.shape[1:]] for tile in tiles]
        most = (self.side // self.encoder_patch_size) ** 2
        patches = torch.zeros(len(tiles), most, 3 * self.encoder_patch_size**2)
        mask = torch.zeros(len(tiles), most, dtype=torch.int32)
        for tile, (h, w), own, seen in zip(tiles, shapes, patches, mask, strict=True):
            cut = tile.reshape(3, h, self.encoder_patch_size, w, self.encoder_patch_size)
            own[: h * w] = cut.permute(1, 3, 2, 4, 0).reshape(h * w, -1)
            seen[: h * w] = 1
        grids = [self.grid(p) for p in pictures]
        several = [rows * columns > 1 for rows, columns in grids]
        return BatchFeature(
            {
                "pixel_values": patches,
                "pixel_attention_mask": mask,
                "spatial_shapes": torch.tensor(shapes),
                "image_rows": [rows for rows, _ in grids],
                "image_cols": [columns for _, columns in grids],
                "image_sizes": [[half if many else self.side, self.side] for many in several],
            }
        )


def _flat(images: Any) -> list[Image.Image]:
    return [p for row in images for p in (row if isinstance(row, list | tuple) else [row])]
