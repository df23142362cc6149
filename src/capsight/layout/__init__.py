"""Prompt layouts: where the images lie in a batch of prompts, for every supported model family."""

from capsight.layout.build import build_layout
from capsight.layout.families import supported_families
from capsight.layout.prompt_layout import Grid, Kind, PromptLayout, RowLayout, Span, VisionBlock

__all__ = [
    "Grid",
    "Kind",
    "PromptLayout",
    "RowLayout",
    "Span",
    "VisionBlock",
    "build_layout",
    "supported_families",
]
