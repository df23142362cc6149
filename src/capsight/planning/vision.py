"""`VisionShape`: what the vision tower computes for an image of a given number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from capsight.errors import OptionError
from capsight.layout.families import family_for

_OTHERS = (
    *("gemma3", "gemma4", "gemma4_unified", "internvl", "smolvlm", "idefics3"),
    *("llava", "vipllava", "llava_next", "llava_onevision", "deepseek_vl", "qianfan_ocr"),
    *("lfm2_vl", "cohere2_vision", "ovis2", "video_llama_3", "minicpmv4_6", "minicpmv4_7"),
)

Grid = tuple[int, int]
"""Height and width of a block of vision tokens, in tokens."""


@dataclass(frozen=True, slots=True)
class VisionShape:
    """Sizes of a vision tower.

    Attributes:
        pixels: weights of the convolution that makes a patch of pixels a vector.
        patch: weights that each patch is multiplied with in the tower's layers.
        token: weights that each vision token is multiplied with on its way to the language model.
        width: channels of all heads of a layer together.
        layers: attention layers over all patches of a block; where later ones see a quarter as many, each of
            those is a sixteenth.
        window_layers: attention layers within windows.
        window: side of a window in tokens; 0 where there are no windows.
        patches_per_token: patches that are merged into one vision token.
        class_tokens: tokens of a block beside its patches.
        breaks: columns of a block's grid that no patch makes.
    """

    pixels: int
    patch: int
    token: int
    width: int
    layers: float
    window_layers: int
    window: int
    patches_per_token: int
    class_tokens: int
    breaks: int

    @classmethod
    def of(cls, config: Any, pixels: int, patch: int, token: int) -> VisionShape:
        """Read the sizes of the tower of a known family; weights have been counted before."""
        vision, kind = config.vision_config, config.model_type
        depth = int(getattr(vision, "depth", None) or getattr(vision, "num_hidden_layers", None) or 0)
        late = window_layers = window = class_tokens = 0
        if merge := merge_side(config):
            merged = merge**2
        elif kind == "gemma3":
            merged = (vision.image_size // vision.patch_size) ** 2 // config.mm_tokens_per_image
        elif kind == "gemma4":
            merged = vision.pooling_kernel_size**2
        elif kind in ("lfm2_vl", "cohere2_vision"):
            merged = config.downsample_factor**2
        elif kind.startswith("minicpmv"):
            late = depth - merged_after(config)
            merged = 16 if late else 4
            if late:
                patch += 8 * vision.hidden_size  # where four become one, they see each other
        elif kind == "ovis2":
            merged = vision.hidden_stride**2
        elif kind in ("internvl", "qianfan_ocr"):
            merged, class_tokens = round(1 / config.downsample_ratio**2), 1
        elif kind in ("smolvlm", "idefics3"):
            merged = config.scale_factor**2
        else:
            merged, class_tokens = 1, int(vision.model_type == "clip_vision_model")
        if kind == "muse_glimmer":
            window_layers = vision.layer_types.count("window_attention")
            window = vision.pos_emb_height // merge
        if kind in ("qwen2_5_vl", "exaone4_5"):
            window_layers = depth - len(vision.fullatt_block_indexes)
            window = vision.window_size // vision.patch_size // vision.spatial_merge_size
        # Gemma 4 Unified has no tower, only linear layers over patches.
        width = vision.embed_dim if kind == "qwen2_vl" else getattr(vision, "hidden_size", 0)
        full = depth - window_layers - late + late / 16
        return cls(
            pixels,
            patch,
            token,
            width,
            full,
            window_layers,
            window,
            merged,
            class_tokens,
            int(pixtral(config)),
        )

    def flops(self, grid: Grid) -> int:
        """FLOPs for one block of vision tokens (an image or a tile).

        With n tokens of P patches each, c class tokens, and windows of at most m^2 tokens:
        `2 * (pixels * n P + patch * (n P + c) + token * n)
        + 4 * width * (layers * (n P + c)^2 + window_layers * sum over windows of (m^2 P)^2)`.
        """
        height, width = grid[0], grid[1] - self.breaks
        tokens = height * width
        patches = tokens * self.patches_per_token
        linear = self.pixels * patches + self.patch * (patches + self.class_tokens) + self.token * tokens
        pairs = self.layers * (patches + self.class_tokens) ** 2
        if self.window_layers:
            down, across = _windows(height, self.window), _windows(width, self.window)
            inside = sum((a * b * self.patches_per_token) ** 2 for a in down for b in across)
            pairs += self.window_layers * inside
        return 2 * linear + round(4 * self.width * pairs)


def check_planned(config: Any) -> None:
    """Refuse families whose images and vision tower are not planned for.

    Raises:
        UnsupportedModelError: `build_layout` does not know the family.
        OptionError: only plans do not know it.
    """
    family_for(config)
    if not merge_side(config) and config.model_type not in _OTHERS:
        raise OptionError(
            f"plans are not made for {config.model_type}: how its vision tower merges patches is not known; "
            "`capsight bench` measures what `plan` would have worked out"
        )


def merge_side(config: Any) -> int:
    """Patches along a token, of families whose images have as many tokens as their size gives; else 0."""
    if config.vision_config.model_type == "pixtral":
        return int(getattr(config, "spatial_merge_size", 1))
    if config.model_type == "muse_glimmer":
        return int(config.vision_config.merge_size)
    return int(getattr(config.vision_config, "spatial_merge_size", 0))


def merged_after(config: Any) -> int:
    """Layers of MiniCPM-V's vision tower that see all patches; the others see one for each four."""
    vision = config.vision_config
    return int(vision.num_hidden_layers if config.downsample_mode == "4x" else vision.insert_layer_id + 1)


def pixtral(config: Any) -> bool:
    """Whether images are written as rows of tokens with a break after each, the last column of a grid."""
    return bool(config.vision_config.model_type == "pixtral" and config.model_type != "lighton_ocr")


def _windows(length: int, side: int) -> list[int]:
    """Lengths of the windows along one side; the last may be shorter."""
    return [min(side, length - start) for start in range(0, length, side)]
