"""What capsight asks of a processor, and how a command line names one of its user's own."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, TypeAlias, runtime_checkable

from transformers import ProcessorMixin

from capsight.errors import OptionError


@runtime_checkable
class Processor(Protocol):
    """A processor. Those of transformers are; one's own needs no base class.

    Attributes:
        tokenizer: turns text into ids and back. Of it are used `pad_token_id`, `padding_side` (set to
            "left"), `batch_decode(ids, skip_special_tokens=True)`, and, called with a text and
            `add_special_tokens=False`, the `input_ids` of what it returns.
    """

    tokenizer: Any

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt of a conversation, as text.

        Args:
            messages: `{"role": ..., "content": [{"type": "image"} or {"type": "text", "text": ...}, ...]}`.
            **options: `add_generation_prompt=True` and `tokenize=False`.
        """
        ...

    def __call__(
        self, text: Sequence[str], images: Sequence[Sequence[Any]] | None = None, **options: Any
    ) -> Mapping[str, Any]:
        """Model inputs of rendered prompts.

        Args:
            text: a prompt for each row.
            images: RGB PIL images of each row; None where no row has any.
            **options: `return_tensors="pt"` and `padding=True`.

        Returns:
            `input_ids` and `attention_mask` `[B, S]`, padded on the left, and what the model's forward takes
            besides: pixels, grids, token types.
        """
        ...


AnyProcessor: TypeAlias = ProcessorMixin | Processor
"""A processor of transformers, or one's own."""


def check_processor(processor: Any, name: str) -> Any:
    """The processor, set to pad on the left.

    Args:
        processor: any object.
        name: what to call it in messages.

    Raises:
        OptionError: it lacks what `Processor` asks for.
    """
    missing = [
        part for part in ("apply_chat_template", "__call__", "tokenizer") if not hasattr(processor, part)
    ]
    if missing:
        raise OptionError(f"{name} gives a {type(processor).__name__} without {', '.join(missing)}")
    processor.tokenizer.padding_side = "left"
    return processor


def own_processor(source: str, model: str) -> Processor:
    """The processor that a user's function gives.

    Args:
        source: `module:factory`. The module is found as Python finds it, the current folder first. The
            factory is called with the model's name or folder, or with nothing if it takes nothing.
        model: the model's name or folder.

    Raises:
        OptionError: there is no such function, it fails, or what it gives is no processor.
    """
    module, colon, name = source.partition(":")
    if not (module and colon and name):
        raise OptionError(f"processor is {source!r}; give module:factory")
    path, sys.path = sys.path, ["", *sys.path]
    try:
        factory: Any = import_module(module)
        for part in name.split("."):
            factory = getattr(factory, part)
        processor = factory(*([model] if inspect.signature(factory).parameters else []))
    except (Exception, SystemExit) as error:  # of the user's own code
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise OptionError(f"processor {source!r} cannot be made: {reason}") from error
    finally:
        sys.path = path
    return check_processor(processor, f"processor {source!r}")
