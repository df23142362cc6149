"""The reference VLM: a small trained model with its drawn task, so that everything can be judged offline."""

from capsight.reference.loader import load_reference_processor, load_reference_vlm, reference_path
from capsight.reference.prompts import Prompt, split_prompt

__all__ = ["Prompt", "load_reference_processor", "load_reference_vlm", "reference_path", "split_prompt"]
