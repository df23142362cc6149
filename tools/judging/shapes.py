"""The judges: class, configuration, tokenizer and processor of each, before training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from judging.drawing import CELL, MOSAIC, PAPER, TILES, Style
from judging.questions import KINDS
from judging.vocabulary import learn_tokenizer, wording
from judging.wide import see_cells, wide_model, wide_processor
from reference_training.architecture import rope_parameters


@dataclass(frozen=True, slots=True)
class Judge:
    """A judge before it is trained.

    Attributes:
        name: its folder under `weights`.
        seed: of its initial weights.
        grid: cells a side of a picture.
        style: how its pictures look.
        image: texts of the tokens before, of and after a picture.
        build: makes the untrained model of a tokenizer.
        processor: makes the processor of a tokenizer and a chat template.
        mrope: whether positions are (t, h, w).
        framed: whether the chat template writes the tokens before and after a picture; else the processor.
        unlearnt: kinds of question that it did not learn well enough to judge by; they are not asked.
        side: vision tokens a side of a cell.
    """

    name: str
    seed: int
    grid: int
    style: Style
    image: tuple[str, str, str]
    build: Callable[[PreTrainedTokenizerFast], Any]
    processor: Callable[[PreTrainedTokenizerFast, str], Any]
    mrope: bool
    framed: bool
    unlearnt: tuple[str, ...]
    side: int = 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of question that it is asked."""
        return tuple(k for k in KINDS if k not in self.unlearnt)

    @property
    def tokens(self) -> int:
        """Vision tokens of a picture."""
        return (self.grid * self.side) ** 2

    def tokens_of(self, cell: int) -> list[int]:
        """The vision tokens of a picture's cell, both counted row by row."""
        row, column = (self.side * x for x in divmod(cell, self.grid))
        width = self.grid * self.side
        return [(row + r) * width + column + c for r in range(self.side) for c in range(self.side)]

    @property
    def chat_template(self) -> str:
        """A turn is its role token and its text; pictures are numbered from 1."""
        start, pad, end = self.image
        return (
            "{%- set ns = namespace(images=0) -%}"
            "{%- for message in messages -%}{{- '<|' + message['role'] + '|>' -}}"
            "{%- if message['content'] is string -%}{{- message['content'] -}}"
            "{%- else -%}{%- for part in message['content'] -%}"
            "{%- if part['type'] == 'image' -%}{%- set ns.images = ns.images + 1 -%}"
            f"{{{{- ns.images ~ '{start if self.framed else ''}{pad}{end if self.framed else ''}' -}}}}"
            "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
            "{%- endfor -%}{%- endif -%}"
            "{%- if message['role'] == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}"
            "{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
        )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Byte-level BPE trained on the wording of train prompts; digits never merge."""
        return learn_tokenizer(wording(self.name, self.grid, self.style), self.image)


def _text_config(tokenizer: PreTrainedTokenizerFast, **own: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **own,
    }


class Qwen2VLImagesProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor for images only: its video half needs torchvision."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        """Take the parts."""
        self.image_token, self.video_token = tokenizer.image_token, tokenizer.video_token
        ids = tokenizer.get_vocab()
        self.image_token_id, self.video_token_id = ids[self.image_token], ids[self.video_token]
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _mosaic_model(tokenizer: PreTrainedTokenizerFast) -> Any:
    ids = tokenizer.get_vocab()
    config = Qwen2VLConfig(
        text_config=_text_config(
            tokenizer, num_key_value_heads=2, intermediate_size=512, rope_parameters=rope_parameters()
        ),
        vision_config={
            "depth": 3, "embed_dim": 128, "hidden_size": 256, "num_heads": 4, "mlp_ratio": 3,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config)


def _mosaic_processor(tokenizer: PreTrainedTokenizerFast, chat_template: str) -> Any:
    images = Qwen2VLImageProcessorPil(
        patch_size=14,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 56 * 56, "longest_edge": 896 * 896},
    )
    return Qwen2VLImagesProcessor(image_processor=images, tokenizer=tokenizer, chat_template=chat_template)


class InternVLImagesProcessor(InternVLProcessor):
    """InternVL's processor for images only: its video half needs torchvision."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 64,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the parts."""
        super().__init__(image_processor, tokenizer, None, image_seq_length, chat_template)


def _tiles_model(tokenizer: PreTrainedTokenizerFast) -> Any:
    ids = tokenizer.get_vocab()
    config = InternVLConfig(
        text_config=_text_config(
            tokenizer, model_type="qwen2", num_key_value_heads=8, intermediate_size=512,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        vision_config={
            "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": [8 * CELL, 8 * CELL], "patch_size": [CELL // 2, CELL // 2],
            "layer_scale_init_value": 1.0,
        },
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=64,
        downsample_ratio=0.5,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )  # fmt: skip
    return InternVLForConditionalGeneration(config)


def _tiles_processor(tokenizer: PreTrainedTokenizerFast, chat_template: str) -> Any:
    images = GotOcr2ImageProcessorPil(
        size={"height": 8 * CELL, "width": 8 * CELL},
        crop_to_patches=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return InternVLImagesProcessor(images, tokenizer, 64, chat_template)


JUDGES = {
    "mosaic": Judge(
        "mosaic", 11, 7, MOSAIC, ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
        _mosaic_model, _mosaic_processor, mrope=True, framed=True, unlearnt=("odd", "differ"),
    ),
    "tiles": Judge(
        "tiles", 23, 8, TILES, ("<img>", "<IMG_CONTEXT>", "</img>"),
        _tiles_model, _tiles_processor, mrope=False, framed=False,
        unlearnt=("at", "which_scene", "same_ground", "odd", "differ"),
    ),
    "wide": Judge(
        "wide", 37, 8, PAPER, ("<img>", "<image>", "</img>"),
        wide_model, wide_processor, mrope=False, framed=True, side=2,
        unlearnt=("at", "which_scene", "same_ground", "odd", "differ"),
    ),
}  # fmt: skip


def untrained(judge: Judge, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The judge's model with its initial weights; residual branches begin small."""
    torch.manual_seed(judge.seed)
    model = judge.build(tokenizer)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.mul_(0.25)
            layer.mlp.down_proj.weight.mul_(0.25)
        if judge.side > 1:
            see_cells(model.model.vision_tower, judge.grid, judge.side)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
