"""Judge `wide`: LLaVA with a CLIP tower and a Llama, one KV head, four vision tokens for every cell."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PATCH = 14
SIDE = 224


def wide_model(tokenizer: PreTrainedTokenizerFast) -> Any:
    """The model of a tokenizer, with random weights."""
    config = LlavaConfig(
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 256, "intermediate_size": 512,
            "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 384,
            "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH,
            "projection_dim": 128,
        },
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def wide_processor(tokenizer: PreTrainedTokenizerFast, chat_template: str) -> Any:
    """The processor of a tokenizer: pictures become `SIDE` px a side."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=chat_template,
        num_additional_image_tokens=1,
    )


@torch.no_grad()
def see_cells(tower: Any, grid: int, side: int) -> None:
    """Let patches of one cell find each other from the start: a patch alone sees a quarter of a shape.

    Positions become sums of random vectors for the cell's row and column and for the place within the
    cell, and keys begin as queries.
    """

    def some(n: int) -> Tensor:
        return torch.randn(n, tower.config.hidden_size) * 0.5

    cell, place = (some(grid), some(grid)), (some(side), some(side))
    at = torch.arange(grid * side)
    y, x = at.repeat_interleave(grid * side), at.repeat(grid * side)
    cells = cell[0][y // side] + cell[1][x // side]
    tower.embeddings.position_embedding.weight[1:] = cells + place[0][y % side] + place[1][x % side]
    for layer in tower.encoder.layers:
        torch.nn.init.orthogonal_(layer.self_attn.q_proj.weight, 1.2)
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
