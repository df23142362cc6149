"""The reference VLM's configuration, tokenizer, chat template and processor."""

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from capsight.reference.loader import IMAGE_PAD, VIDEO_PAD, ReferenceProcessor

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
SPECIAL_TOKENS = (PAD, SYSTEM, USER, ASSISTANT, END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)

#: A turn is its role token and its text; images are numbered from 1 across the conversation.
CHAT_TEMPLATE = (
    "{%- set ns = namespace(images=0) -%}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set ns.images = ns.images + 1 -%}"
    "{{- ns.images ~ '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part['type'] == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

PATCH, MERGE, TEMPORAL = 14, 2, 2

#: Rotary frequencies of the language model in radians per position, for the temporal, the row and the column
#: part of M-RoPE. The usual geometric series would leave columns only its slowest frequencies (0.01 and
#: below for heads of 32), too slow to tell neighbours apart; a faster base would turn every dimension and
#: leave none to match content over any distance. So each part has both. Written into the configuration as
#: ``longrope`` factors, which transformers applies unchanged.
ROTARY = (
    (2.2, 0.8, 0.0005, 0.0001),
    (2.4, 1.2, 0.4, 0.001, 0.0005, 0.0001),
    (2.4, 1.2, 0.4, 0.001, 0.0005, 0.0001),
)
HEAD_DIM, MAX_POSITIONS, ROPE_BASE = 32, 8192, 10000.0


def rope_parameters() -> dict[str, Any]:
    """`ROTARY` as ``rope_parameters`` of a transformers configuration."""
    wanted = [f for part in ROTARY for f in part]
    factors = [ROPE_BASE ** (-2 * i / HEAD_DIM) / f for i, f in enumerate(wanted)]
    return {
        "rope_type": "longrope",
        "rope_theta": ROPE_BASE,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "original_max_position_embeddings": MAX_POSITIONS,
        "mrope_section": [len(part) for part in ROTARY],
    }


def build_tokenizer(corpus: Iterable[str], vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the task's wording; digits never merge, other text falls back to bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in (PAD, END)],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> ReferenceProcessor:
    """The processor: images keep their size when it is a multiple of 28 px between 56 x 56 and 896 x 896."""
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=TEMPORAL,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        size={"shortest_edge": 56 * 56, "longest_edge": 896 * 896},
    )
    return ReferenceProcessor(
        image_processor=image_processor, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """About 9 M parameters: 8 LM layers (8 query / 4 KV heads of 32), 4 vision layers (2 windowed)."""
    ids = tokenizer.get_vocab()
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": MAX_POSITIONS,
            "rms_norm_eps": 1e-6,
            "rope_parameters": rope_parameters(),
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": ids[END],
            "pad_token_id": ids[PAD],
        },
        vision_config={
            "depth": 4,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_heads": 6,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": 256,
        },
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
    )


def build_model(config: Qwen2_5_VLConfig) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained model in float32, with greedy generation defaults."""
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():  # small residual branches: a layer at first leaves what it is given almost as it is
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.mul_(0.25)
            layer.mlp.down_proj.weight.mul_(0.25)
    model.generation_config.eos_token_id = config.get_text_config().eos_token_id
    model.generation_config.pad_token_id = config.get_text_config().pad_token_id
    return model
