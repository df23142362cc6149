"""A tiny Mistral 3 (Pixtral tower, patches merged 2 x 2) and a tiny Pixtral 12B, which is a LLaVA."""

from __future__ import annotations

from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    ProcessorMixin,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from tiny.base import TinyVLM, byte_tokenizer, offline, seeded
from tiny.llava import llama

SPECIAL = {
    "pad": "<pad>",
    "turn": "<s>",
    "eos": "</s>",
    "image": "[IMG]",
    "break": "[IMG_BREAK]",
    "end": "[IMG_END]",
}
PATCH = 4


class PixtralTokens(ProcessorMixin):
    """Writes an image as Pixtral's processor does, which cannot be imported without torchvision."""

    def __init__(self, image_processor: object, tokenizer: object, patch: int) -> None:
        super().__init__(image_processor, tokenizer)
        self.patch, self.image_token = patch, SPECIAL["image"]
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: object) -> str:
        height, width = (int(side) // self.patch for side in image_inputs["image_sizes"][image_idx])
        lines = [SPECIAL["image"] * width] * height
        return SPECIAL["break"].join(lines) + SPECIAL["end"]

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "image_sizes"]


def build(name: str = "mistral3") -> TinyVLM:
    """A 64 x 64 picture of Mistral 3 makes 8 rows of 8 tokens and their breaks; 96 x 64 8 rows of 12."""
    merge = 2 if name == "mistral3" else 1
    tokenizer = byte_tokenizer(list(SPECIAL.values()), pad=SPECIAL["pad"], eos=SPECIAL["eos"])
    side = PATCH * merge
    images = PixtralImageProcessorPil(size={"longest_edge": 128}, patch_size={"height": side, "width": side})
    processor = offline(PixtralTokens)(images, tokenizer, side)
    parts = {
        "text_config": llama(tokenizer),
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 128,
            "patch_size": PATCH,
        },
        "image_token_index": tokenizer.convert_tokens_to_ids(SPECIAL["image"]),
        "vision_feature_layer": -1,
    }
    if name == "mistral3":
        parts["text_config"] |= {"model_type": "mistral", "head_dim": 16, "sliding_window": None}
        config = Mistral3Config(**parts, spatial_merge_size=merge, tie_word_embeddings=False)
        model = seeded(Mistral3ForConditionalGeneration, config)
    else:
        config = LlavaConfig(**parts, vision_feature_select_strategy="full")
        model = seeded(LlavaForConditionalGeneration, config)
    return TinyVLM(
        name=name,
        model=model,
        processor=processor,
        placeholder=SPECIAL["image"],
        special=SPECIAL,
        size=(64 // 2 * merge, 64 // 2 * merge),
        other_size=(96 // 2 * merge, 64 // 2 * merge),
        template="<s>[INST]{images}{text}[/INST]",
    )
