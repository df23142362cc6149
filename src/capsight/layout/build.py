"""From processor outputs to a `PromptLayout`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from capsight.errors import LayoutError
from capsight.layout.families import family_for
from capsight.layout.families.base import TokenRow
from capsight.layout.prompt_layout import PromptLayout, RowLayout


def build_layout(inputs: Mapping[str, Any], config: Any) -> PromptLayout:
    """Read where the images lie in a batch of prompts.

    Args:
        inputs: what the model's processor returned. `input_ids` (B, S) is needed;
            `attention_mask` (B, S) says what is padding (absent: nothing is); the family's own
            entries (`image_grid_thw`, `video_grid_thw`, `image_sizes`...) are flat over the batch
            in row order, as processors write them. Tensors, arrays and lists all do.
        config: the config of the whole vision-language model (`model.config`).

    Returns:
        A layout of B rows of S tokens.

    Raises:
        UnsupportedModelError: no adapter knows `config.model_type`.
        LayoutError: padding is not on the left, or the tokens are not what the family's processor
            writes for these images (missing delimiters, wrong counts, a truncated prompt).
    """
    family = family_for(config)
    rows = _token_rows(inputs)
    by_row = family.blocks(rows, inputs, config)
    layout = PromptLayout(
        tuple(
            RowLayout(len(row.ids), row.pad_left, tuple(blocks))
            for row, blocks in zip(rows, by_row, strict=True)
        )
    )
    for key in ("mm_token_type_ids", "token_type_ids"):
        if inputs.get(key) is not None:
            _check_token_types(layout, _matrix(inputs, key), key)
    return layout


def _token_rows(inputs: Mapping[str, Any]) -> list[TokenRow]:
    ids = _matrix(inputs, "input_ids")
    if inputs.get("attention_mask") is None:
        masks = [[1] * len(row) for row in ids]
    else:
        masks = _matrix(inputs, "attention_mask")
    if [len(row) for row in ids] != [len(mask) for mask in masks]:
        raise LayoutError("attention_mask and input_ids must have the same shape (batch, length)")
    pairs = zip(ids, masks, strict=True)
    return [TokenRow(i, tuple(row), _pad_left(i, mask)) for i, (row, mask) in enumerate(pairs)]


def _pad_left(index: int, mask: list[int]) -> int:
    if not any(mask):
        raise LayoutError(f"row {index} is padding only")
    pad = next(i for i, visible in enumerate(mask) if visible)
    if all(mask[pad:]):
        return pad
    if not mask[-1]:
        raise LayoutError(
            f"row {index} is padded on the right; set processor.tokenizer.padding_side = 'left' and "
            "process the prompts again"
        )
    raise LayoutError(
        f"row {index} has holes in its attention_mask (position {pad + mask[pad:].index(0)}); "
        "only padding on the left of the prompt is supported"
    )


def _matrix(inputs: Mapping[str, Any], key: str) -> list[list[int]]:
    if inputs.get(key) is None:
        raise LayoutError(f"the layout needs {key!r}; pass the processor's outputs as they are")
    value = inputs[key]
    rows = value.tolist() if hasattr(value, "tolist") else list(value)
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
    if not rows or not all(isinstance(row, list | tuple) and row for row in rows):
        raise LayoutError(f"{key} must have shape (batch, length), both at least 1")
    if not all({list, tuple}.isdisjoint(map(type, row)) for row in rows):
        raise LayoutError(f"{key} must have two dimensions (batch, length)")
    return [list(map(int, row)) for row in rows]


def _check_token_types(layout: PromptLayout, types: list[list[int]], key: str) -> None:
    if [len(row) for row in types] != [layout.length] * layout.batch_size:
        raise LayoutError(f"{key} and input_ids must have the same shape (batch, length)")
    for index, (row, row_types) in enumerate(zip(layout.rows, types, strict=True)):
        for block in row.blocks:
            if not all(row_types[block.start : block.end]):
                raise LayoutError(
                    f"row {index}: {key} says text inside the vision block [{block.start}, {block.end}); "
                    "was the prompt changed after processing?"
                )
