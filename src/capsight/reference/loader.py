"""Loads the reference VLM that ships with the package; needs no network."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from capsight.errors import CapsightError


def reference_path() -> Path:
    """Folder of the shipped weights, config, tokenizer and processor files.

    Raises:
        CapsightError: the installation lacks them.
    """
    with as_file(files("capsight.reference") / "weights") as folder:
        if not (folder / "model.safetensors").is_file():
            raise CapsightError(
                f"the reference VLM's weights are missing from {folder}; reinstall capsight, or train them "
                "with `make train-reference`"
            )
        return Path(folder)


def load_reference_vlm(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[Qwen2_5_VLForConditionalGeneration, ReferenceProcessor]:
    """Load the small trained VLM that ships with capsight.

    Args:
        dtype: compute type; the weights are stored in bfloat16.
        device: where to put the model.

    Returns:
        The model in eval mode and its processor (left padding, images in RGB).
    """
    folder = reference_path()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval(), load_reference_processor()


def load_reference_processor() -> ReferenceProcessor:
    """Load the processor alone."""
    return ReferenceProcessor.from_pretrained(reference_path(), local_files_only=True)


IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"


class ReferenceProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor for images only: its video half needs torchvision, which we do not ask for."""

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessorPil | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Take the parts; the image token is the tokenizer's ``<|image_pad|>``."""
        self.image_token, self.video_token = IMAGE_PAD, VIDEO_PAD
        if tokenizer is not None:
            ids = tokenizer.get_vocab()
            self.image_token_id, self.video_token_id = ids[IMAGE_PAD], ids[VIDEO_PAD]
        super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)
