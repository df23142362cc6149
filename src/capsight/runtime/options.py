"""Generation options that a cache of capsules cannot go with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from capsight.errors import LayoutError, OptionError
from capsight.kvcapsule.cache.reader import ATTENTION_NAME
from capsight.runtime.wrapped import inner_model

GUESSING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


def check_options(options: Mapping[str, Any], seen: int, model: Any) -> None:
    """Refuse what would give other tokens than it should.

    Args:
        options: what `generate` was given.
        seen: tokens per row that the cache holds already.
        model: its generation config says what is not asked.

    Raises:
        OptionError: an option cannot be had, or pixels are not numbers.
    """
    if asked(options, "use_cache") is False:
        raise OptionError("use_cache=False leaves no cache to keep capsules in; leave it out")
    if asked(options, "cache_implementation") is not None:
        raise OptionError("cache_implementation would take the place of the cache in use; leave it out")
    generation_config = model.generation_config
    if asked(options, "output_attentions") or generation_config.output_attentions:
        check_attentions(model)
    guessing = next((x for x in GUESSING if asked(options, x) or getattr(generation_config, x, None)), None)
    if seen and guessing is not None:
        raise OptionError(
            f"{guessing} cannot go on from a filled cache; leave it out, or pass the whole prompt without "
            "past_key_values"
        )
    for name, value in options.items():
        if not name.startswith("pixel_values") or not isinstance(value, Tensor):
            continue
        if not torch.isfinite(value.sum(dtype=torch.float32)):  # a sum takes no memory
            raise OptionError(f"{name} holds NaN or infinite numbers; process the images again")


def check_attentions(model: Any) -> None:
    """Refuse to give attention weights while capsight's attention runs, which has none.

    Raises:
        OptionError: it does.
    """
    if inner_model(model).config.get_text_config()._attn_implementation == ATTENTION_NAME:
        raise OptionError(
            "output_attentions: attention over capsules as they are gives no weights; leave it out, or "
            "enable with decode='materialise', a joint or adaptive capsule and no head map"
        )


def unset(cache: Any, model: Any) -> dict[str, Any]:
    """Options that take back what the model's own generation config would do to a cache that is given."""
    implementation = getattr(model.generation_config, "cache_implementation", None)
    return {} if cache is None or implementation is None else {"cache_implementation": None}


def check_rows(options: Mapping[str, Any], rows: int, held: int, model: Any) -> None:
    """Refuse prompts that are not as many as the rows of a filled cache.

    Args:
        options: what `generate` was given.
        rows: of the prompts, before `generate` repeats them for beams and several sequences.
        held: of the cache.
        model: its generation config says what is not asked.

    Raises:
        LayoutError: they are neither as many before they are repeated, nor after.
    """
    if held not in (rows, rows * repeats(options, model)):
        raise LayoutError(
            f"the cache holds {held} rows, the prompts are {rows}; after beams or several sequences pass a "
            f"prompt for each row, or keep one of each with cache.batch_select_indices"
        )


def beams(options: Mapping[str, Any], model: Any) -> int:
    """How many beams `generate` follows."""
    return int(asked(options, "num_beams") or getattr(model.generation_config, "num_beams", None) or 1)


def repeats(options: Mapping[str, Any], model: Any) -> int:
    """How many rows `generate` makes of a prompt."""
    several = asked(options, "num_return_sequences")
    return max(beams(options, model), int(several or model.generation_config.num_return_sequences or 1))


def asked(options: Mapping[str, Any], name: str) -> Any:
    """An option as a keyword, or in the generation config that was passed."""
    value = options.get(name)
    return getattr(options.get("generation_config"), name, None) if value is None else value
