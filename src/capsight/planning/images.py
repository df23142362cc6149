"""From an image mix to the layout that a prompt of each family would have; sizes only, no tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from capsight.errors import OptionError
from capsight.layout import PromptLayout, RowLayout, VisionBlock
from capsight.layout.families import family_for
from capsight.layout.families.llava import base_tokens
from capsight.layout.families.llava_onevision import unpadded
from capsight.planning.vision import Grid, check_planned, merge_side, pixtral

ImageGrids = tuple[Grid, ...]
"""One image: the token grids (height, width) of its blocks; more than one where it is cut into tiles."""

_TILED_BY_PROCESSOR = ("internvl", "qianfan_ocr", "smolvlm", "idefics3", "cohere2_vision", "ovis2")
_ANY_NUMBER = ("gemma4", "gemma4_unified", "lfm2_vl", "video_llama_3", "minicpmv4_6", "minicpmv4_7")
_BARE = ("exaone4_5", "lighton_ocr", "video_llama_3")
_LLAVA = ("llava", "vipllava", "llava_next", "deepseek_vl")


def grids_of_size(config: Any, width: int, height: int, alone: bool = False) -> ImageGrids:
    """The blocks of an image of `width` x `height` pixels.

    Qwen-VL, GLM, PaddleOCR-VL, EXAONE, LightOnOCR, Pixtral: each side is rounded to a multiple of patch x
    merge (the last two: up; Pixtral: a break is added to each row); the processor's own limits on the
    number of pixels are not in the config, so give a size within them. Gemma 3, LLaVA, DeepSeek-VL: a fixed
    number of tokens. LLaVA-OneVision: a fixed number where the prompt has several images. LLaVA-NeXT: the
    picture, then in tiles.

    Args:
        config: of the whole vision-language model.
        width: pixels.
        height: pixels.
        alone: the prompt has no other image.

    Raises:
        UnsupportedModelError: the family is not known.
        OptionError: a side is not positive, or the config does not say how the image is tiled.
    """
    check_planned(config)
    if min(width, height) < 1:
        raise OptionError(f"an image of {width}x{height} pixels has no tokens; give sizes such as 448x224")
    vision, kind = config.vision_config, config.model_type
    if merge := merge_side(config):
        step = vision.patch_size * merge
        if vision.model_type == "pixtral":
            return ((math.ceil(height / step), math.ceil(width / step) + pixtral(config)),)
        return ((max(round(height / step), 1), max(round(width / step), 1)),)
    if kind == "llava_next":
        rows, columns = unpadded((height, width), vision.image_size // vision.patch_size, config)
        return squarest(tile_tokens(config)), (rows, columns + 1)
    if kind in _ANY_NUMBER:
        raise OptionError(
            f"how many tokens {kind} gives a {width}x{height} image is in its processor, not in its config; "
            "give --image-tokens instead"
        )
    if kind in _TILED_BY_PROCESSOR or (kind == "llava_onevision" and alone):
        raise OptionError(
            f"how {kind} cuts a {width}x{height} image into tiles is in its processor, not in its config; "
            f"give --image-tokens instead ({tile_tokens(config)} a tile)"
        )
    return (squarest(tile_tokens(config)),)


def grids_of_tokens(config: Any, tokens: int) -> ImageGrids:
    """The blocks of an image of `tokens` vision tokens, delimiters not counted.

    Where the family cuts images into tiles, the tokens are those of whole tiles; of
    LLaVA-NeXT and LLaVA-OneVision, those of the base picture and then of the tiled one, if any.

    Raises:
        UnsupportedModelError: the family is not known.
        OptionError: no image of the family has that number of tokens.
    """
    check_planned(config)
    if tokens < 1:
        raise OptionError(f"an image has at least one vision token, not {tokens}")
    if merge_side(config) or config.model_type in _ANY_NUMBER:
        return (squarest(tokens),)
    tile = tile_tokens(config)
    if config.model_type in ("llava_onevision", "llava_next") and tokens > tile:
        return squarest(tile), squarest(tokens - tile)
    if tokens % tile:
        raise OptionError(f"{config.model_type} images have a multiple of {tile} vision tokens, not {tokens}")
    return (squarest(tile),) * (tokens // tile)


def mix_layout(config: Any, images: Sequence[ImageGrids], text_tokens: int) -> PromptLayout:
    """One prompt: all images with their delimiters, then the text.

    Args:
        config: of the whole vision-language model.
        images: the images, in order.
        text_tokens: tokens of text after them.

    Raises:
        UnsupportedModelError: the family is not known.
        OptionError: the prompt has no token, or a negative number of them.
    """
    family_for(config)
    if text_tokens < 0 or (not images and not text_tokens):
        raise OptionError(f"a prompt has text or images; text tokens cannot be {text_tokens}")
    blocks: list[VisionBlock] = []
    at = 0
    for image, grids in enumerate(images):
        for index, (height, width) in enumerate(grids):
            before, after = (0, 0) if pixtral(config) else _delimiters(config.model_type, index, len(grids))
            start, end = at + before, at + before + height * width
            delimiters = (*range(at, start), *range(end, end + after))
            blocks.append(VisionBlock(start, end, "image", (1, height, width), image, delimiters))
            at = end + after
    return PromptLayout((RowLayout(at + text_tokens, 0, tuple(blocks)),))


def tile_tokens(config: Any) -> int:
    """Vision tokens of one tile (Gemma 3, LLaVA: of one picture) of a family with fixed tiles."""
    vision, kind = config.vision_config, config.model_type
    if kind == "gemma3":
        return int(config.mm_tokens_per_image)
    if kind in ("internvl", "qianfan_ocr"):
        return int(config.image_seq_length)
    if kind in _LLAVA:
        return base_tokens(config)
    scales = {
        "smolvlm": "scale_factor",
        "idefics3": "scale_factor",
        "cohere2_vision": "downsample_factor",
        "ovis2": "hidden_stride",
    }
    scale = getattr(vision if kind == "ovis2" else config, scales[kind]) if kind in scales else 1
    return int(vision.image_size // vision.patch_size // scale) ** 2


def squarest(tokens: int) -> Grid:
    """The grid of `tokens` tokens, height at most width, that is nearest to a square."""
    height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
    return height, tokens // height


def _delimiters(kind: str, index: int, tiles: int) -> tuple[int, int]:
    """Delimiter tokens that processors write before and after tile `index` of an image of `tiles` tiles."""
    first, last = index == 0, index == tiles - 1
    if kind in (*_LLAVA, *_BARE):
        return 0, 0
    if kind == "cohere2_vision":
        return int(first), 1 + last
    if kind == "ovis2":
        return int(first), 1 + (tiles == 1)
    if kind == "llava_onevision":
        return 0, int(last and tiles == 1)
    if kind in ("internvl", "qianfan_ocr"):
        return int(first), int(last)
    if kind in ("smolvlm", "idefics3"):
        return 2, int(last)
    return 1, 1
