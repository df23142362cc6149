"""Which pixels of a processor's outputs belong to which image, by the shapes they come in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capsight.errors import LayoutError
from capsight.layout.prompt_layout import PromptLayout

ImageKey = tuple[int, int]
"""An image or video: its row, and its number in the row."""

VISION_PREFIXES = (
    "pixel_",
    "image_",
    "video_",
    "second_per_grid",
    "batch_num_images",
    "target_sizes",
    "spatial_shapes",
    "num_frames_per_video",
)
"""What the names of the entries begin with that describe images and videos."""


_STRIPS = {"pixel_values": "target_sizes", "pixel_values_videos": "target_sizes_videos"}
"""Pixels whose patches lie side by side, however many images there are, and the patches of each image."""


def pixels_of(inputs: Mapping[str, Any], layout: PromptLayout, image: ImageKey) -> list[Tensor]:
    """The pixel tensors of one image or video, without what only pads a batch.

    Raises:
        LayoutError: the pixels are not those of the layout.
    """
    chosen = select_images(inputs, layout, {image})
    pixels = [chosen[key] for key in sorted(chosen) if key.startswith("pixel_values")]
    return [_filled(x) for x in pixels if isinstance(x, Tensor)]


def select_images(
    inputs: Mapping[str, Any], layout: PromptLayout, wanted: Collection[ImageKey]
) -> dict[str, Any]:
    """The entries of processor outputs that describe some of the images.

    Args:
        inputs: processor outputs of the whole conversation.
        layout: the layout made of them.
        wanted: images and videos, by row and number.

    Returns:
        What a model needs beside the tokens to read those images alone.

    Raises:
        LayoutError: the pixels are not those of the layout.
    """
    blocks = [(r, block) for r, row in enumerate(layout.rows) for block in row.blocks]
    keys = {
        kind: list(dict.fromkeys((r, block.image) for r, block in blocks if block.kind == kind))
        for kind in ("image", "video")
    }
    by_block = {kind: [(r, block.image) for r, block in blocks if block.kind == kind] for kind in keys}
    entries: dict[str, Any] = {}
    for name, value in inputs.items():
        if not name.startswith(VISION_PREFIXES) or value is None or name == "batch_num_images":
            continue
        kind = "video" if "video" in name or name.startswith("second_per_grid") else "image"
        grids = inputs.get(f"{kind}_grid_thw")
        owners = keys[kind]
        if name.startswith("pixel_values") and grids is not None:
            sizes = np.asarray(grids.cpu() if isinstance(grids, Tensor) else grids, dtype=np.int64)
            patches = sizes.reshape(-1, 3).prod(-1)
            if patches.sum() != len(value):
                raise LayoutError(
                    f"{name} has {len(value)} patches, {kind}_grid_thw speaks of {patches.sum()}; pass the "
                    "processor's outputs as they are"
                )
            picked = np.repeat(_chosen(owners, wanted, name, len(grids)), patches)
        elif name in _STRIPS and inputs.get(_STRIPS[name]) is not None:
            entries[name] = _strips(value, inputs[_STRIPS[name]], by_block[kind], wanted)
            continue
        elif _by_row(inputs, kind) and isinstance(value, Tensor):
            entries[name] = _tiles(inputs["pixel_values"], value, by_block["image"], wanted, layout)
            continue
        else:
            owners = owners if len(owners) == len(value) else by_block[kind]
            picked = _chosen(owners, wanted, name, len(value))
        entries[name] = _pick(value, picked)
    if inputs.get("batch_num_images") is not None:
        counts = [int(n) for n in inputs["batch_num_images"] if int(n)]
        alone = [n == 1 for n in counts for _ in range(n)]
        entries["batch_num_images"] = _counts(
            alone, _chosen(keys["image"], wanted, "batch_num_images", len(alone))
        )
    return {name: value for name, value in entries.items() if len(value)}


def _chosen(
    owners: list[ImageKey], wanted: Collection[ImageKey], name: str, entries: int
) -> NDArray[np.bool_]:
    if len(owners) != entries:
        raise LayoutError(
            f"{name} has {entries} entries, the prompts hold {len(owners)} images for them; pass the "
            "processor's outputs for the whole conversation"
        )
    return np.array([owner in wanted for owner in owners], dtype=bool)


def _pick(value: Any, picked: NDArray[np.bool_]) -> Any:
    """Of a tensor a view, where all that is picked lies side by side."""
    if isinstance(value, Tensor):
        where = np.flatnonzero(picked)
        if not len(where) or where[-1] - where[0] < len(where):
            return value[where[0] : where[-1] + 1] if len(where) else value[:0]
        return value[torch.from_numpy(picked).to(value.device)]
    return [entry for entry, use in zip(value, picked, strict=True) if use]


def _by_row(inputs: Mapping[str, Any], kind: str) -> bool:
    """Whether images are `[rows, tiles, C, H, W]`, each row padded with tiles of zeros."""
    pixels = inputs.get("pixel_values")
    stacked = isinstance(pixels, Tensor) and pixels.ndim == 5
    return kind == "image" and stacked and inputs.get("image_sizes") is None


def _tiles(
    pixels: Tensor, value: Tensor, owners: list[ImageKey], wanted: Collection[ImageKey], layout: PromptLayout
) -> Tensor:
    """The tiles of the images wanted, `[rows, tiles, ...]` again."""
    real = pixels.flatten(2).any(-1).flatten()
    picked = _chosen(owners, wanted, "pixel_values", int(real.sum()))
    tiles = value.flatten(0, 1)[real]
    by_row = [
        tiles[torch.tensor([use and owner[0] == row for owner, use in zip(owners, picked, strict=True)])]
        for row in range(layout.batch_size)
    ]
    most = max(map(len, by_row))
    if not most:
        return value.new_zeros(0)
    out = value.new_zeros(len(by_row), most, *value.shape[2:])
    for row, row_tiles in enumerate(by_row):
        out[row, : len(row_tiles)] = row_tiles
    return out


def _strips(value: Tensor, sizes: Tensor, owners: list[ImageKey], wanted: Collection[ImageKey]) -> Tensor:
    """The patches of the images wanted, side by side as in `[1, C, patch, patches * patch]`."""
    picked = _chosen(owners, wanted, "target_sizes", len(sizes))
    columns = sizes.prod(-1).cpu().numpy() * value.shape[2]
    patches = value[..., torch.from_numpy(np.repeat(picked, columns)).to(value.device)]
    return patches if patches.numel() else value.new_zeros(0)


def _counts(alone: list[bool], picked: NDArray[np.bool_]) -> list[int]:
    """Counts from which a model reads, image by image, whether it was its prompt's only one.

    It goes through the counts, n times for a count of n, and stops with the images.
    """
    flags = [flag for flag, use in zip(alone, picked, strict=True) if use]
    if all(flags):
        return [1] * len(flags)
    if any(flags):
        raise LayoutError(
            "some rows of the new turn bring their conversation's only image and others do not; ask them in "
            "batches of their own"
        )
    return [max(len(flags), 2)]


def _filled(pixels: Tensor) -> Tensor:
    """Without tiles of zeros."""
    if pixels.ndim < 5:
        return pixels
    tiles = pixels.flatten(0, 1)
    return tiles[tiles.flatten(1).any(-1)]
