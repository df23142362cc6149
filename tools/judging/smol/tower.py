"""The judge itself: SmolVLM's class with SmolLM2 inside, a small tower, and 64 tokens an image."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

IMAGE, FAKE, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
SIDE, PATCH, TOKENS, WIDTH = 64, 8, 64, 192

#: Images are numbered from 1; an answer follows the words "Answer:".
CHAT_TEMPLATE = (
    "{%- set ns = namespace(images=0) -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}{{- 'Answer:' -}}{%- endif -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set ns.images = ns.images + 1 -%}"
    "{{- 'Image ' ~ ns.images ~ ':<image>\\n' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\nAnswer:' -}}{%- endif -%}"
)


class Block(nn.Module):
    """Convolution, normalisation, ReLU; added to its input where the shape stays."""

    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        """Set the channels and the stride."""
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outer)
        self.residual = inner == outer and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """[B, inner, H, W] -> [B, outer, H / stride, W / stride]."""
        y = nn.functional.relu(self.norm(self.conv(x)), inplace=True)
        return x + y if self.residual else y


def stem() -> nn.Sequential:
    """What takes the place of the patch convolution: [B, 3, 64, 64] -> [B, 192, 8, 8]; learns much faster."""
    return nn.Sequential(
        Block(3, 32, 2), Block(32, 64, 2), Block(64, 64), Block(64, 64),
        Block(64, WIDTH, 2), Block(WIDTH, WIDTH), Block(WIDTH, WIDTH),
    ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # fmt: skip


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer with the three tokens of an image."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        folder,
        padding_side="left",
        pad_token="<|im_end|>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": IMAGE, "fake_image_token": FAKE, "global_image_token": GLOBAL},
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [FAKE, GLOBAL, IMAGE]})
    return tokenizer


def processor_of(tokenizer: PreTrainedTokenizerFast) -> Any:
    """SmolVLM's processor: every picture is scaled to one tile of 64 px."""
    processing_smolvlm.num2words = processing_smolvlm.num2words or str  # wanted for videos only
    images = SmolVLMImageProcessorPil(
        size={"longest_edge": SIDE},
        max_image_size={"longest_edge": SIDE},
        do_image_splitting=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    processor = _Processor(
        image_processor=images, tokenizer=tokenizer, image_seq_len=TOKENS, chat_template=CHAT_TEMPLATE
    )
    return processor


class _Processor(SmolVLMProcessor):
    """Without a video processor, which would need torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, image_seq_len: int, chat_template: str) -> None:
        self.fake_image_token, self.image_token, self.global_image_token = FAKE, IMAGE, GLOBAL
        self.image_token_id, self.global_image_token_id = tokenizer.convert_tokens_to_ids([IMAGE, GLOBAL])
        self.fake_image_token_id = tokenizer.convert_tokens_to_ids(FAKE)
        self.end_of_utterance_token, self.video_token = "<|im_end|>", "<video>"
        self.image_seq_len, self.do_image_splitting = image_seq_len, False
        super(SmolVLMProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """The plain one: SmolVLM's looks up how many frames a video has."""
        return super(SmolVLMProcessor, self).apply_chat_template(*args, **kwargs)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def build(tokenizer: PreTrainedTokenizerFast) -> SmolVLMForConditionalGeneration:
    """The model with random weights in float32; `load_language` and the tower's file fill it."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = SmolVLMConfig(
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer),
            "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "bos_token_id": 1, "eos_token_id": end, "pad_token_id": end,
        },
        vision_config={
            "hidden_size": WIDTH, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 6,
            "image_size": SIDE, "patch_size": PATCH,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        scale_factor=1,
        tie_word_embeddings=True,
        pad_token_id=end,
    )  # fmt: skip
    model = SmolVLMForConditionalGeneration(config)
    model.model.vision_model.embeddings.patch_embedding = stem()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    return model


def load_language(model: SmolVLMForConditionalGeneration, folder: Path) -> None:
    """Fill in SmolLM2; the three tokens of an image start as the beginning of a turn."""
    state = {k.removeprefix("model."): v.float() for k, v in load_file(folder / "model.safetensors").items()}
    table = state["embed_tokens.weight"]
    extra = model.config.text_config.vocab_size - len(table)
    state["embed_tokens.weight"] = torch.cat([table, table[1:2].expand(extra, -1)])
    model.model.text_model.load_state_dict(state)
    model.tie_weights()
