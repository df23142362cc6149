"""Loads the reference VLM that ships with the package; needs no network."""

from importlib.resources import as_file, files
from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from capsight.errors import CapsightError
from capsight.reference.processor import ReferenceProcessor


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
